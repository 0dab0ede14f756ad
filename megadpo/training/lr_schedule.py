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
    num_warmup = train.num_warmup_steps(num_steps)
    if step < num_warmup:
        return train.learning_rate * step / num_warmup
    share = _share_at(step, num_steps, num_warmup, train)
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * share


UNWARMED_TIMESCALE = 10_000
"""Of `inverse_sqrt` without a warm-up, as in transformers; with one its steps are the timescale."""


def _share_at(step: int, num_steps: int, num_warmup: int, train: TrainConfig) -> float:
    """What is left of the way from the peak to `min_learning_rate` after the warm-up, in [0, 1]."""
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    match train.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case "cosine":
            return _half_cosine(progress)
        case "cosine_with_restarts":
            return _half_cosine(train.schedule_cycles * progress % 1.0) if progress < 1 else 0.0
        case "polynomial":
            return (1.0 - progress) ** train.schedule_power
        case "inverse_sqrt":
            timescale = num_warmup or UNWARMED_TIMESCALE
            return math.sqrt(timescale / (step - num_warmup + timescale))
        case "wsd":
            num_decay = max(1, min(num_steps - num_warmup, round(num_steps * train.decay_ratio)))
            return _decay(max(0.0, (step - (num_steps - num_decay)) / num_decay), train.decay_shape)
    raise AssertionError(train.schedule)


def _decay(progress: float, shape: str) -> float:
    if shape == "cosine":
        return _half_cosine(progress)
    return 1.0 - (progress if shape == "linear" else math.sqrt(progress))


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
