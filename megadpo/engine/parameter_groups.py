"""How each Hugging Face tensor is updated, what the optimizer keeps of it, and where it lies in a shard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megadpo.config.schema import TrainConfig
from megadpo.model.by_name import first_match
from megadpo.model.families import ParameterShard, is_correction_bias, names_in

KEPT = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_8bit": ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"),
    "sgd": ("momentum_buffer",),
    "muon": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "frozen": (),
}
"""What each rule keeps of a parameter between steps, by the names that torch's optimizers give it."""


@dataclass(frozen=True)
class Settings:
    """How a tensor is updated.

    Attributes:
        rule: one of KEPT.
        factor: its learning rate is this times the schedule's.
        decays: it has weight decay.
    """

    rule: str
    factor: float
    decays: bool


FROZEN = Settings("frozen", 0.0, False)

NORMS_OF_HEADS = ("q_norm.weight", "k_norm.weight")
"""Vectors, though some have a row for each head."""


def settings_of(name: str, num_dimensions: int, train: TrainConfig) -> Settings:
    """What the options say of the tensor with this Hugging Face name.

    Vectors, which norms and biases are, have weight decay only with `train.decay_norms_and_biases`. Muon is for the matrices
    of the layers; embedding, head and vectors are AdamW's then. A router's correction bias is no optimizer's.
    """
    if is_correction_bias(name) or first_match(train.freeze, name) is not None:
        return FROZEN
    pattern = first_match(train.learning_rates, name)
    factor = 1.0 if pattern is None else train.learning_rates[pattern] / train.learning_rate
    is_matrix = num_dimensions > 1 and not name.endswith(NORMS_OF_HEADS)
    decays = train.decay_norms_and_biases or is_matrix
    rule = train.optimizer
    if rule == "muon" and not (is_matrix and num_dimensions == 2 and name.startswith("model.layers.")):
        rule = "adamw"
    return Settings(rule, factor, decays)


def kinds_of(settings: Settings, train: TrainConfig) -> tuple[str, ...]:
    """What is kept of a tensor beside its weights."""
    return () if settings.rule == "sgd" and train.momentum == 0 else KEPT[settings.rule]


def state_shapes(shapes: Mapping[str, tuple[int, ...]], train: TrainConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """What a checkpoint has of tensors with these shapes: name and shape of each, by kind ("weights", "exp_avg", …)."""
    kept: dict[str, dict[str, tuple[int, ...]]] = {"weights": dict(shapes)}
    for name, shape in shapes.items():
        for kind in kinds_of(settings_of(name, len(shape), train), train):
            kept.setdefault(kind, {})[name] = shape
    return kept


def kept_of(shard: ParameterShard, train: TrainConfig) -> tuple[str, ...]:
    """What is kept of any tensor that the shard has a part of."""
    found = (settings_of(name, len(shard.shape), train) for name in names_in(shard))
    return tuple(dict.fromkeys(kind for settings in found for kind in kinds_of(settings, train)))


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a flattened shard that are updated alike."""

    start: int
    end: int
    settings: Settings


def runs_of(shard: ParameterShard, train: TrainConfig) -> list[Run]:
    """The shard in runs. What no Hugging Face tensor has, the padding of a vocabulary, is in none: it stays zero."""
    runs: list[Run] = []
    for start, end, name in _places(shard):
        settings = settings_of(name, len(shard.shape), train)
        if runs and runs[-1].end == start and runs[-1].settings == settings:
            runs[-1] = Run(runs[-1].start, end, settings)
        else:
            runs.append(Run(start, end, settings))
    return runs


def _places(shard: ParameterShard) -> Iterator[tuple[int, int, str]]:
    """Where each piece lies in the flattened shard: pieces are rows, or one of all columns."""
    num_columns = math.prod(shard.shape[1:])
    for piece in sorted(shard.pieces, key=lambda piece: piece.local_start):
        if piece.dim == 0:
            yield piece.local_start * num_columns, (piece.local_start + piece.length) * num_columns, piece.logical_name
        else:
            assert len(shard.pieces) == 1 and piece.length == shard.shape[piece.dim], shard
            yield 0, math.prod(shard.shape), piece.logical_name


def is_plain(train: TrainConfig) -> bool:
    """Whether all tensors are updated by AdamW, alike but for the decay that Megatron knows of."""
    return train.optimizer == "adamw" and not (train.learning_rates or train.freeze or train.decay_norms_and_biases)
