"""What combines with what: one table, read by the option check, by `megadpo plan --layouts` and by docs/parallelism.md.

Two features combine unless EXCLUDED or NEEDS says otherwise, or they are values of one option. A new feature is a line in
FEATURES, a new exclusion one in EXCLUDED. `python -m tools.combinations_table --write` renews the page;
tests/unit/validation/test_combinations.py switches on each feature and each pair and holds the table to what happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.objectives.specs import kind_of, measures_kl

if TYPE_CHECKING:
    from megadpo.config.schema import Config


@dataclass(frozen=True)
class Feature:
    """Something that a configuration switches on.

    Attributes:
        setting: the option that does.
        is_on: whether it does.
        example: overrides that switch it on, with all that it needs.
    """

    name: str
    setting: str
    is_on: Callable[[Config], bool]
    example: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """`first` is refused with `second` (EXCLUDED) or without it (NEEDS), because of `why`, which says what to do too."""

    first: str
    second: str
    why: str


FEATURES: tuple[Feature, ...] = (
    Feature("tensor", "parallel.tensor", lambda c: c.parallel.tensor > 1, ("parallel.tensor=2",)),
    Feature(
        "sequence",
        "parallel.sequence",
        lambda c: bool(c.parallel.sequence),
        ("parallel.tensor=2", "parallel.sequence=true"),
    ),
    Feature("pipeline", "parallel.pipeline", lambda c: c.parallel.pipeline > 1, ("parallel.pipeline=2",)),
    Feature(
        "virtual pipeline",
        "parallel.virtual_pipeline",
        lambda c: c.parallel.virtual_pipeline > 1,
        ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
    Feature(
        "uneven stages",
        "parallel.pipeline_layout",
        lambda c: c.parallel.pipeline_layout is not None,
        ("parallel.pipeline_layout=3,5",),
    ),
    Feature("context", "parallel.context", lambda c: c.parallel.context > 1, ("parallel.context=2",)),
    Feature("experts", "parallel.expert", lambda c: c.parallel.expert > 1, ("parallel.expert=2",)),
    Feature("DeepSpeed", "parallel.engine", lambda c: c.parallel.engine == "deepspeed", ("parallel.engine=deepspeed",)),
    Feature(
        "TransformerEngine",
        "model.layers",
        lambda c: c.model.layers == "transformer_engine",
        ("model.layers=transformer_engine",),
    ),
    Feature(
        "offloaded activations",
        "train.activation_offload",
        lambda c: c.train.activation_offload != "none",
        ("train.activation_offload=disk", "train.activation_offload_dir=x"),
    ),
    Feature(
        "recomputation",
        "train.recompute",
        lambda c: c.train.recompute in ("selective", "full"),
        ("train.recompute=full",),
    ),
    Feature("small recomputation", "train.recompute", lambda c: c.train.recompute == "small", ("train.recompute=small",)),
    Feature(
        "precomputed reference",
        "reference.mode",
        lambda c: c.reference.mode in ("precomputed", "cached"),
        ("reference.mode=precomputed",),
    ),
    Feature("streaming", "data.streaming", lambda c: c.data.streaming, ("data.streaming=true", "train.steps=8")),
    Feature(
        "moving reference",
        "reference.sync_every",
        lambda c: c.reference.sync_every is not None,
        ("reference.sync_every=8",),
    ),
    Feature(
        "router replay",
        "reference.router_replay",
        lambda c: c.reference.router_replay,
        ("reference.router_replay=true",),
    ),
    Feature("adapters", "adapter.kind", lambda c: c.adapter.kind != "none", ("adapter.kind=lora",)),
    Feature(
        "4-bit weights",
        "model.quantization",
        lambda c: c.model.quantization != "none",
        ("model.quantization=nf4", "adapter.kind=lora"),
    ),
    Feature("own schedule", "schedule.name", lambda c: c.schedule.name != "megatron", ("schedule.name=1f1b",)),
    Feature(
        "interleaved reference",
        "schedule.reference",
        lambda c: c.schedule.reference == "interleaved",
        ("schedule.reference=interleaved", "schedule.name=1f1b", "parallel.pipeline=2"),
    ),
    Feature(
        "split pairs",
        "schedule.split_pairs",
        lambda c: c.schedule.split_pairs,
        ("schedule.split_pairs=true", "schedule.name=1f1b", "parallel.pipeline=2"),
    ),
    Feature(
        "zero bubble",
        "schedule.zero_bubble",
        lambda c: c.schedule.zero_bubble,
        ("schedule.zero_bubble=true", "schedule.name=1f1b", "parallel.pipeline=2"),
    ),
    Feature(
        "kto",
        "objective.loss_type",
        lambda c: measures_kl(c.objective.loss_types),
        ("objective.loss_type=kto",),
    ),
)

NOT_PAIRS = (
    "it sends the two answers of a pair one after the other, and objective.loss_type reads rows that are no pairs; "
    "set it to false"
)

EXCLUDED: tuple[Rule, ...] = (
    Rule("TransformerEngine", "DeepSpeed", "its layers are built for engine megatron only; use that, or local layers"),
    Rule("TransformerEngine", "experts", "experts are built with local layers only; use those"),
    Rule(
        "TransformerEngine",
        "offloaded activations",
        "what its layers keep for the backward pass is not moved away; use local layers, or recompute activations instead",
    ),
    Rule(
        "small recomputation",
        "TransformerEngine",
        "norms are built into TransformerEngine's layers, which keep their results; use local layers, or selective or full",
    ),
    Rule(
        "precomputed reference",
        "kto",
        "kto needs the reference for each step's mismatched prompts and answers, which cannot be known ahead; set "
        "reference.mode to auto",
    ),
    Rule(
        "moving reference",
        "precomputed reference",
        "that moves a resident reference, not log-probs that are computed once; set reference.mode to resident or remove it",
    ),
    Rule(
        "streaming",
        "precomputed reference",
        "log-probs are computed once for rows that are all known; set reference.mode to auto, or streaming to false",
    ),
    Rule(
        "router replay",
        "precomputed reference",
        "the policy goes by what the reference's routers chose for each micro-batch, and this reference has none; set "
        "reference.mode to resident, or adapter with adapters, or router_replay to false",
    ),
    Rule(
        "router replay",
        "interleaved reference",
        "a reference that runs among the policy's operations has not chosen yet when the policy needs it; set "
        "schedule.reference to before",
    ),
    Rule("TransformerEngine", "4-bit weights", "local layers only have weights in 4 bits; use those"),
    Rule("moving reference", "4-bit weights", "weights in 4 bits are frozen, those of the reference too; remove sync_every"),
    Rule("moving reference", "adapters", "no model is held beside that with adapters to be moved; remove sync_every"),
    Rule("TransformerEngine", "adapters", "adapters are built beside local layers only; use those"),
    Rule(
        "interleaved reference",
        "precomputed reference",
        "only a resident reference has forwards to interleave; set it to before, or reference.mode to resident",
    ),
    Rule("split pairs", "context", "halves of micro-batches are not cut over context ranks; leave parallel.context at 1"),
    Rule(
        "split pairs",
        "virtual pipeline",
        "several chunks of a stage take turns by whole micro-batches; leave parallel.virtual_pipeline at 1",
    ),
    Rule("split pairs", "kto", NOT_PAIRS),
    Rule("zero bubble", "DeepSpeed", "weight gradients are delayed by engine megatron only; use that or set it to false"),
    Rule("zero bubble", "TransformerEngine", "only local layers delay weight gradients; use those or set it to false"),
    Rule(
        "zero bubble",
        "virtual pipeline",
        "weight gradients are delayed with one chunk a stage only; leave parallel.virtual_pipeline at 1",
    ),
    Rule(
        "zero bubble",
        "recomputation",
        "delayed products keep what recomputing activations would free; set one of them to its default",
    ),
    Rule(
        "zero bubble",
        "offloaded activations",
        "delayed products keep what offloading activations would move away; set one of them to its default",
    ),
    Rule("zero bubble", "split pairs", "weight gradients are delayed for whole micro-batches only; set one to false"),
)

NEEDS: tuple[Rule, ...] = (
    Rule("sequence", "tensor", "sequence parallelism needs parallel.tensor > 1; leave it at null"),
    Rule(
        "virtual pipeline",
        "pipeline",
        "chunks take turns over several stages, which needs parallel.pipeline > 1; raise that or leave it at 1",
    ),
    Rule(
        "4-bit weights",
        "adapters",
        "weights in 4 bits are frozen, and without adapters they would be what is trained; set adapter.kind to lora, or "
        "model.quantization to none",
    ),
    Rule("interleaved reference", "own schedule", "Megatron's schedules know no reference; set schedule.name to 1f1b"),
    Rule("split pairs", "own schedule", "Megatron's schedules run whole micro-batches; set schedule.name to 1f1b"),
    Rule("interleaved reference", "pipeline", "without pipeline stages there are no bubbles to fill; leave it at before"),
    Rule("zero bubble", "own schedule", "Megatron's schedules do a backward in one; set schedule.name to 1f1b"),
    Rule("zero bubble", "pipeline", "without pipeline stages there is no bubble to fill; set it to false"),
    Rule("split pairs", "pipeline", "without pipeline stages there is no bubble to shorten; set it to false"),
)


def check_combinations(config: Config) -> None:
    """Refuse features that do not go together.

    Raises:
        UserError: naming the option, its value, and why.
    """
    on = {feature.name: feature.is_on(config) for feature in FEATURES}
    settings = {feature.name: feature.setting for feature in FEATURES}
    broken = [rule for rule in EXCLUDED if on[rule.first] and on[rule.second]]
    broken += [rule for rule in NEEDS if on[rule.first] and not on[rule.second]]
    if on["split pairs"] and kind_of(config.objective.loss_types) != "pairs":
        broken.append(Rule("split pairs", "", NOT_PAIRS))
    for rule in broken:
        section, name = settings[rule.first].split(".")
        raise UserError(f"{settings[rule.first]} is {_text(getattr(getattr(config, section), name))}, but {rule.why}")


def rule_between(first: str, second: str) -> Rule | None:
    """The exclusion of two features, in either order."""
    return next((rule for rule in EXCLUDED if {rule.first, rule.second} == {first, second}), None)


def are_of_one_option(first: str, second: str) -> bool:
    """Whether two features are values of the same option, so that there is nothing to combine."""
    setting, other = (next(feature.setting for feature in FEATURES if feature.name == name) for name in (first, second))
    return setting == other


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
