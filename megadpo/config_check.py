"""What values the options may have: choices, ranges, contradictions, and what this version does not have yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megadpo import strict
from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.config import Config

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "fp32", "bf16"),
    "reference.mode": ("resident", "precomputed"),
    "data.truncation": ("prompt_left", "keep_start", "keep_end"),
    "objective.loss_type": ("sigmoid",),
    "parallel.engine": ("megatron",),
    "parallel.context_method": ("auto",),
    "parallel.offload": ("none",),
    "train.schedule": ("cosine", "linear", "constant"),
    "train.recompute": ("none", "full", "selective"),
}
"""The values each option may have in this version."""

NOT_BUILT: dict[str, tuple[str, ...]] = {
    "reference.mode": ("adapter", "none"),
    "parallel.engine": ("deepspeed",),
    "parallel.context_method": ("ring", "ulysses"),
    "parallel.offload": ("cpu", "nvme"),
}
"""Values that are well known but that this version does not have: refused by name, never ignored."""

ONLY: dict[str, tuple[Any, str]] = {
    "parallel.virtual_pipeline": (1, "interleaved pipeline schedules"),
    "parallel.context": (1, "context parallelism"),
    "parallel.expert": (1, "expert parallelism"),
    "parallel.expert_tensor": (1, "expert tensor parallelism"),
    "parallel.zero_stage": (1, "other ZeRO stages"),
    "parallel.deepspeed_config": (None, "DeepSpeed"),
}
"""Options with a single value in this version, and the feature any other value asks for."""

AT_LEAST: dict[str, int] = {
    "reference.tokens_per_micro_batch": 1,
    "data.max_length": 2,
    "data.num_workers": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "train.steps": 1,
    "train.pairs_per_step": 1,
    "train.tokens_per_micro_batch": 1,
    "train.learning_rate": 0,
    "train.min_learning_rate": 0,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.clip_norm": 0,
    "train.seed": 0,
    "eval.every": 0,
    "eval.pairs": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "logging.every": 1,
}
ABOVE_ZERO: Sequence[str] = ("objective.beta", "train.epochs", "train.eps")


def check(config: Config) -> None:
    """Raises UserError for the first value that this version cannot honour."""
    _check_choices(config)
    _check_ranges(config)
    _check_contradictions(config)


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
            raise UserError(f"{dotted}: {value!r} is not available in this version of megadpo; {allowed}")
        guess = strict.closest(str(value), choices)
        raise UserError(f"{dotted}: {value!r} is not known; {allowed}" + (f" (did you mean {guess!r}?)" if guess else ""))
    for dotted, (only, feature) in ONLY.items():
        value = _value(config, dotted)
        if value != only:
            raise UserError(
                f"{dotted} is {value!r}, but this version of megadpo does not have {feature}; "
                f"leave it at {strict.yaml_text(only)}"
            )


def _check_ranges(config: Config) -> None:
    for dotted, least in AT_LEAST.items():
        value = _value(config, dotted)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"{dotted} must be at least {least}, got {value!r}")
    for dotted in ABOVE_ZERO:
        value = _value(config, dotted)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{dotted} must be greater than 0, got {value!r}")
    if not 0 <= config.objective.label_smoothing < 0.5:
        raise UserError(f"objective.label_smoothing must be in [0, 0.5), got {config.objective.label_smoothing!r}")
    if not all(0 <= beta < 1 for beta in config.train.betas):
        raise UserError(f"train.betas must both be in [0, 1), got {list(config.train.betas)!r}")
    if not config.checkpoint.resume:
        raise UserError("checkpoint.resume is empty; use auto, never or the path of a step directory")


def _check_contradictions(config: Config) -> None:
    train, data = config.train, config.data
    if train.steps is not None and train.epochs is not None:
        raise UserError(
            f"train.steps ({train.steps}) and train.epochs ({train.epochs:g}) are both given; set one of them to null"
        )
    if train.min_learning_rate > train.learning_rate:
        raise UserError(
            f"train.min_learning_rate ({train.min_learning_rate!r}) is above learning_rate ({train.learning_rate!r})"
        )
    if train.schedule == "constant" and train.min_learning_rate > 0:
        raise UserError(
            "train.min_learning_rate has no effect with train.schedule constant; remove it or choose cosine or linear"
        )
    if train.steps is not None and train.warmup_steps > train.steps:
        raise UserError(f"train.warmup_steps ({train.warmup_steps}) is more than train.steps ({train.steps})")
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise UserError("parallel.sequence is true, but sequence parallelism needs parallel.tensor > 1; leave it at null")
    if config.reference.mode == "resident" and config.reference.tokens_per_micro_batch is not None:
        raise UserError(
            "reference.tokens_per_micro_batch is only for reference.mode precomputed: a resident reference runs on "
            "train's micro-batches; remove it"
        )
    if data.eval is None and (config.eval.every or config.eval.pairs is not None):
        option = "eval.every" if config.eval.every else "eval.pairs"
        raise UserError(f"{option} is set, but there is nothing to evaluate on; set data.eval as well")
