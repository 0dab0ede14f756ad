"""The learning rate of a step, a pure function of its number, as transformers' schedulers have it."""

from __future__ import annotations

import math

from megadpo.config.schema import TrainConfig


def learning_rate_at(step: int, num_steps: int, train: TrainConfig) -> float:
    """Linear warm-up from 0, then the chosen schedule down to `min_learning_rate` at `num_steps`.

    Args:
        step: optimizer steps already taken (0 for the first).
        num_steps: of the whole run.
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, num_steps - train.warmup_steps)
    share = {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
    }[train.schedule]
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * share
