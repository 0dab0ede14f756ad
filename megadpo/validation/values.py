"""What values the options may have: choices, ranges, contradictions, and what this version does not have yet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megadpo.config import strict
from megadpo.errors import UserError
from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.attention.backends import BACKENDS
from megadpo.objectives.specs import ALIASES, GENERAL_OPTIONS, SPECS, has_reward_head, kinds_of, measures_kl, needs_reference
from megadpo.validation.adapters import check_adapter_options
from megadpo.validation.combinations import check_combinations
from megadpo.validation.deepspeed import check_deepspeed_options
from megadpo.validation.evaluation import check_evaluation
from megadpo.validation.hub import check_hub_options
from megadpo.validation.logging import check_logging_options
from megadpo.validation.memory import check_memory_options
from megadpo.validation.optimizer import check_optimizer_options, check_schedule
from megadpo.validation.quantization import check_quantization_options
from megadpo.validation.reference import check_moving_reference
from megadpo.validation.streaming import check_streaming

if TYPE_CHECKING:
    from megadpo.config.schema import Config, ObjectiveConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "fp32", "bf16"),
    "model.kernels": ("auto", "torch", "native"),
    "model.attention": ("auto", *BACKENDS),
    "model.small_ops": ("auto", "torch", "triton"),
    "model.linear_attention": ("auto", "torch", "fla"),
    "model.expert_products": ("auto", "loop", "grouped", "grouped_mm"),
    "model.layers": ("local", "transformer_engine"),
    "model.quantization": ("none", "nf4"),
    "adapter.kind": ("none", "lora"),
    "adapter.init": ("kaiming", "gaussian", *DECOMPOSED),
    "reference.mode": ("auto", "adapter", "resident", "precomputed", "cached", "none"),
    "data.truncation": ("prompt_left", "keep_start", "keep_end"),
    "objective.f_divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
    "objective.ipo_normalization": ("mean", "sum"),
    "objective.list_weights": ("uniform", "score", "lambda"),
    "parallel.engine": ("megatron", "deepspeed"),
    "parallel.context_method": ("auto", "ulysses", "allgather"),
    "parallel.gradient_dtype": ("fp32", "bf16"),
    "parallel.offload": ("none", "cpu", "nvme"),
    "checkpoint.changed_inputs": ("refuse", "accept"),
    "schedule.name": ("megatron", "1f1b"),
    "schedule.reference": ("before", "interleaved"),
    "checkpoint.on_failed_write": ("stop", "skip"),
    "train.schedule": ("cosine", "linear", "constant", "cosine_with_restarts", "polynomial", "inverse_sqrt", "wsd"),
    "train.decay_shape": ("cosine", "linear", "1-sqrt"),
    "train.moments_dtype": ("fp32", "bf16"),
    "train.optimizer": ("adamw", "adamw_8bit", "sgd", "lion", "muon"),
    "train.on_spike": ("warn", "skip", "stop"),
    "train.recompute": ("auto", "none", "small", "selective", "full"),
    "train.recompute_method": ("uniform", "block"),
    "train.activation_offload": ("none", "cpu", "disk"),
    "eval.best_direction": ("auto", "min", "max"),
}
"""The values each option may have in this version."""

DTYPES = {"float32": "fp32", "torch.float32": "fp32", "bfloat16": "bf16", "torch.bfloat16": "bf16"}
SPELLINGS: dict[str, dict[str, str]] = {
    "model.dtype": DTYPES,
    "train.moments_dtype": DTYPES,
    "train.optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
        "adamw_bnb_8bit": "adamw_8bit",
        "lion_32bit": "lion",
    },
    "train.schedule": {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"},
    "parallel.gradient_dtype": DTYPES,
}
"""Other spellings that an option takes, and the choice that each stands for: the resolved configuration has the choice."""

HALF = ("fp16", "float16", "half", "torch.float16", "torch.half")
NOT_BUILT: dict[str, tuple[str, ...]] = {
    "adapter.kind": ("qlora",),
    "model.quantization": ("fp4", "int8"),
    "adapter.init": ("loftq",),
    "parallel.context_method": ("ring",),
    "model.dtype": HALF,
    "train.moments_dtype": HALF,
    "train.optimizer": (
        *("adafactor", "adagrad", "rmsprop", "galore_adamw", "apollo_adamw", "lomo", "shampoo", "soap", "adam"),
        *("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
        *("paged_lion", "paged_lion_32bit", "paged_lion_8bit", "lion_8bit"),
    ),
}
"""Values that are well known but that this version does not have: refused by name, never ignored."""

WHY_NOT = {
    "loftq": " (what it trains makes up for the error of 4 bits, and so fits neither other bits nor the model as it was)",
    "qlora": " under that name (it is adapter.kind lora with model.quantization nf4)",
}
"""Why such a value is not built, where that says more than that it is not."""

NEAREST = {
    **dict.fromkeys(HALF, "bf16"),
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw": "adamw with parallel.offload cpu",
    "paged_adamw_32bit": "adamw with parallel.offload cpu",
    "paged_lion": "lion",
    "paged_lion_32bit": "lion",
    "paged_lion_8bit": "lion",
    "lion_8bit": "lion",
    "adam": "adamw",
}
"""What to use in place of a well-known value, where its spelling does not lead there."""

AT_LEAST: dict[str, int] = {
    "adapter.rank": 1,
    "reference.tokens_per_micro_batch": 1,
    "reference.sync_every": 1,
    "data.max_length": 2,
    "data.step_tokens_multiple_of": 1,
    "data.num_workers": 1,
    "data.streaming_buffer": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.context": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 1,
    "objective.nll_coef": 0,
    "objective.dpop_lambda": 0,
    "objective.desirable_weight": 0,
    "objective.undesirable_weight": 0,
    "objective.reward_center_coef": 0,
    "train.steps": 1,
    "train.pairs_per_step": 1,
    "train.tokens_per_micro_batch": 1,
    "train.learning_rate": 0,
    "train.min_learning_rate": 0,
    "train.warmup_steps": 0,
    "train.schedule_cycles": 1,
    "train.weight_decay": 0,
    "train.clip_norm": 0,
    "train.router_aux_coef": 0,
    "train.router_bias_update_rate": 0,
    "train.recompute_num_layers": 1,
    "train.activation_offload_window_mib": 1,
    "train.hang_timeout": 0,
    "train.seed": 0,
    "eval.every": 0,
    "eval.pairs": 1,
    "eval.patience": 1,
    "eval.min_improvement": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "logging.every": 1,
}
ABOVE_ZERO: Sequence[str] = (
    "adapter.alpha",
    "objective.beta",
    "objective.discopop_tau",
    "objective.rpo_eta",
    "train.epochs",
    "train.eps",
    "train.schedule_power",
    "train.neftune_alpha",
    "train.decay_ratio",
    "train.spike_deviations",
    "checkpoint.before_deadline",
    "logging.peak_tflops",
)


def replace_spellings(config: Config) -> None:
    """Puts the choice in place of another spelling of it (`torch.bfloat16` becomes `bf16`)."""
    for dotted, spellings in SPELLINGS.items():
        section, name = dotted.split(".")
        value = _value(config, dotted)
        setattr(getattr(config, section), name, spellings.get(value, value))


def validate(config: Config) -> None:
    """Raises UserError for the first value that this version cannot honour."""
    _check_choices(config)
    _check_words(config)
    _check_ranges(config)
    _check_numbers(config)
    _check_objective(config)
    check_quantization_options(config)
    check_adapter_options(config)
    check_moving_reference(config)
    _check_contradictions(config)
    check_streaming(config)
    check_deepspeed_options(config)
    check_memory_options(config)
    check_schedule(config.train)
    check_optimizer_options(config)
    check_evaluation(config)
    check_logging_options(config.logging)
    check_hub_options(config)
    check_combinations(config)


def _check_objective(config: Config) -> None:
    """The losses are known, their weights fit, and every option that was set is read by one of them."""
    options = config.objective
    losses = options.loss_types
    for name in losses:
        if name not in SPECS:
            guess = ALIASES.get(name.lower()) or strict.closest(name.lower(), SPECS)
            hint = f"did you mean {guess!r}?" if guess else f"choose from {', '.join(SPECS)}"
            raise UserError(f"objective.loss_type: {name!r} is not known; {hint}")
    if not losses or len(set(losses)) < len(losses):
        raise UserError(f"objective.loss_type is {losses}; name each loss once, and at least one")
    if options.loss_weights is not None and len(options.loss_weights) != len(losses):
        raise UserError(
            f"objective.loss_weights has {len(options.loss_weights)} weights for {len(losses)} losses; give one each"
        )
    if not all(math.isfinite(weight) for weight in options.weights):
        raise UserError(f"objective.loss_weights must be finite numbers, got {options.loss_weights}")
    _check_kinds(losses)
    _check_options_are_read(options)
    _check_kl(config)
    if "custom" in losses and options.module is None:
        raise UserError("objective.loss_type is custom; name its function in objective.module as path.py:function")
    if "exo_pair" in losses and options.label_smoothing == 0:
        raise UserError("objective.label_smoothing is 0, for which exo_pair has no finite loss; set it to 0.001 or more")
    if options.ld_alpha is not None and not 0 <= options.ld_alpha <= 1:
        raise UserError(f"objective.ld_alpha must be in [0, 1], got {options.ld_alpha!r}")
    if needs_reference(losses) and config.reference.mode == "none":
        names = ", ".join(name for name in losses if SPECS[name].needs_reference)
        raise UserError(f"reference.mode is none, but {names} needs a reference; use resident, precomputed or cached")
    if not needs_reference(losses) and config.reference.mode not in ("none", "auto"):
        raise UserError(
            f"objective.loss_type {', '.join(losses)} reads no reference, but reference.mode is {config.reference.mode}; "
            "set reference.mode to auto or none"
        )


def _check_kinds(losses: list[str]) -> None:
    """The losses read the same kind of rows, and the same head."""
    kinds = kinds_of(losses)
    if len(kinds) > 1:
        raise UserError(
            f"objective.loss_type: {', '.join(losses)} read different rows ({' and '.join(kinds)}); "
            "name losses that read the same, they cannot be added up otherwise"
        )
    if has_reward_head(losses) and len(losses) > 1:
        raise UserError("objective.loss_type: reward trains a scalar head and stands alone; remove the other losses")


def _check_kl(config: Config) -> None:
    """KTO's KL needs other rows' answers."""
    if measures_kl(config.objective.loss_types) and config.train.pairs_per_step < 2:
        raise UserError("train.pairs_per_step is 1, but kto compares each prompt with another row's answer; set 2 or more")


def _check_options_are_read(options: ObjectiveConfig) -> None:
    losses, defaults = options.loss_types, type(options)()
    read = frozenset().union(*(SPECS[name].options for name in losses)) | GENERAL_OPTIONS
    for field in dataclasses.fields(options):
        if field.name not in read and getattr(options, field.name) != getattr(defaults, field.name):
            having = [name for name, spec in SPECS.items() if field.name in spec.options]
            raise UserError(
                f"objective.{field.name} has no effect on {', '.join(losses)}; remove it, or use one of {', '.join(having)}"
            )
    if options.f_alpha != defaults.f_alpha and options.f_divergence != "alpha":
        raise UserError("objective.f_alpha has no effect unless objective.f_divergence is alpha; remove it")
    for option, allowed, is_set in (
        ("f_divergence", "divergences", options.f_divergence != "reverse_kl"),
        ("wpo", "weighting", options.wpo),
        ("ld_alpha", "lengths_weighted", options.ld_alpha is not None),
        ("nll_coef", "nll_term", options.nll_coef != 0),
        ("row_weights", "row_weighting", options.row_weights),
    ):
        # sft reads none of them: it may stand beside a loss that does, but not alone.
        wrong = [name for name in losses if not getattr(SPECS[name], allowed) and (name != "sft" or len(losses) == 1)]
        if is_set and wrong:
            raise UserError(f"objective.{option} is not defined for {', '.join(wrong)}; remove it or the loss")


def _value(config: Config, dotted: str) -> Any:
    section, name = dotted.split(".")
    return getattr(getattr(config, section), name)


def _check_choices(config: Config) -> None:
    for dotted, choices in CHOICES.items():
        value = _value(config, dotted)
        if value in choices:
            continue
        allowed = f"choose one of: {', '.join(choices)}" if len(choices) > 1 else f"use {choices[0]!r}"
        if value in NOT_BUILT.get(dotted, ()):
            allowed = f"use {NEAREST[value]}" if value in NEAREST else allowed
            why = WHY_NOT.get(value, "")
            raise UserError(f"{dotted}: {value!r} is not available in this version of megadpo{why}; {allowed}")
        section, guess = dotted.partition(".")[0], _choice_meant(dotted, str(value))
        hint = f" (did you mean {guess!r}?)" if guess else ""
        if isinstance(getattr(getattr(config, section), str(value), None), bool):
            hint = f" ({section}.{value} is an option of its own, true or false)"
        raise UserError(f"{dotted}: {value!r} is not known; {allowed}{hint}")


def _choice_meant(dotted: str, value: str) -> str | None:
    """The choice that a misspelt value was probably meant to be."""
    spellings = {choice: choice for choice in CHOICES[dotted]} | SPELLINGS.get(dotted, {})
    guess = strict.closest(value.lower(), spellings)
    return None if guess is None else spellings[guess]


def _check_words(config: Config) -> None:
    """Refuse no, off, yes and on as a text: who writes them means nothing or a boolean, and a path of that name is rare."""
    for dotted, value in _options(config):
        if isinstance(value, str) and value.lower() in strict.WORDS:
            instead = "auto, never or the path of a step directory" if dotted == "checkpoint.resume" else "null for nothing"
            raise UserError(f"{dotted} is {value!r}, which is no text here; use {instead} (a path of that name: ./{value})")


def _check_numbers(config: Config) -> None:
    """Refuse nan where no range does."""
    for dotted, value in _options(config):
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{dotted} is nan, which is no number; give one")


def _options(config: Config) -> Iterator[tuple[str, Any]]:
    """Every option's dotted path and value."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values):
            yield section.name, values
            continue
        for option in dataclasses.fields(values):
            yield f"{section.name}.{option.name}", getattr(values, option.name)


def _check_ranges(config: Config) -> None:
    for dotted, least in AT_LEAST.items():
        value = _value(config, dotted)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"{dotted} must be at least {least}, got {value!r}")
    for dotted in ABOVE_ZERO:
        value = _value(config, dotted)
        if value is not None and not isinstance(value, str) and not (math.isfinite(value) and value > 0):
            raise UserError(f"{dotted} must be greater than 0, got {value!r}")
    if not 0 <= config.objective.label_smoothing < 0.5:
        raise UserError(f"objective.label_smoothing must be in [0, 0.5), got {config.objective.label_smoothing!r}")
    if not all(0 <= beta < 1 for beta in config.train.betas):
        raise UserError(f"train.betas must both be in [0, 1), got {list(config.train.betas)!r}")
    before = config.checkpoint.before_deadline
    if isinstance(before, str) and before != "slurm":
        raise UserError(f"checkpoint.before_deadline must be a number of seconds or slurm, got {before!r}")
    if not config.checkpoint.resume:
        raise UserError("checkpoint.resume is empty; use auto, never or the path of a step directory")


def _check_contradictions(config: Config) -> None:
    train = config.train
    if train.steps is not None and train.epochs is not None:
        raise UserError(
            f"train.steps ({train.steps}) and train.epochs ({train.epochs:g}) are both given; set one of them to null"
        )
    if train.min_learning_rate > train.learning_rate:
        raise UserError(
            f"train.min_learning_rate ({train.min_learning_rate!r}) is above learning_rate ({train.learning_rate!r})"
        )
    if config.parallel.context == 1 and config.parallel.context_method != "auto":
        raise UserError(
            f"parallel.context_method is {config.parallel.context_method}, which has no effect with parallel.context 1; "
            "raise parallel.context or leave the method at auto"
        )
    if config.model.fp8 and config.model.layers != "transformer_engine":
        raise UserError(
            f"model.fp8 is true, but model.layers is {config.model.layers}; only transformer_engine multiplies in FP8, set "
            "layers to that or remove fp8"
        )
    if config.schedule.reference == "interleaved" and config.reference.mode == "none":
        raise UserError("schedule.reference is interleaved, but reference.mode is none; leave it at before")
    if config.reference.mode in ("adapter", "resident", "cached") and config.reference.tokens_per_micro_batch is not None:
        raise UserError(
            f"reference.tokens_per_micro_batch is only for reference.mode precomputed: a reference that is "
            f"{config.reference.mode} runs on train's micro-batches; remove it"
        )
