"""The learning rate of a step equals that of transformers' schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from megadpo.config.schema import TrainConfig
from megadpo.training.lr_schedule import learning_rate_at

THEIRS = {
    "cosine": ("cosine", {}, {}),
    "linear": ("linear", {}, {}),
    "constant": ("constant_with_warmup", {}, {}),
    "cosine_with_restarts": ("cosine_with_restarts", {"schedule_cycles": 3}, {"num_cycles": 3}),
    "polynomial": ("polynomial", {"schedule_power": 2.0, "min_learning_rate": 1e-5}, {"power": 2.0, "lr_end": 1e-5}),
    "inverse_sqrt": ("inverse_sqrt", {}, {}),
    **{
        f"wsd {shape}": (
            "warmup_stable_decay",
            {"decay_ratio": 0.2, "decay_shape": shape, "min_learning_rate": 3e-5},
            {"num_decay_steps": 10, "decay_type": shape, "min_lr_ratio": 0.1},
        )
        for shape in ("cosine", "linear", "1-sqrt")
    },
}
"""Ours -> transformers' name, our options, theirs."""


# transformers' warm-up of wsd begins at the minimum, ours at 0 as in the others: see below.
@pytest.mark.parametrize(("ours", "warmup"), [(ours, n) for ours in THEIRS for n in (0, 7) if not (n and "wsd" in ours)])
def test_every_schedule_is_transformers(ours, warmup):
    theirs, options, their_options = THEIRS[ours]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(
        theirs, optimizer, num_warmup_steps=warmup, num_training_steps=50, scheduler_specific_kwargs=their_options
    )
    train = TrainConfig(learning_rate=3e-4, schedule=ours.split()[0], warmup_steps=warmup, **options)
    for step in range(50):
        assert learning_rate_at(step, 50, train) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        scheduler.step()


def test_wsd_rises_from_0_stays_and_falls_over_the_last_steps():
    train = TrainConfig(learning_rate=1.0, schedule="wsd", warmup_ratio=0.2, decay_ratio=0.3, decay_shape="linear")
    rates = [learning_rate_at(step, 10, train) for step in range(11)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0])


def test_a_ratio_is_rounded_up_to_steps_as_in_transformers():
    from transformers import TrainingArguments

    for num_steps, ratio in ((7, 0.1), (10, 0.25), (1000, 0.03), (5, 0.0), (4, 1.0)):
        theirs = TrainingArguments("unused", warmup_steps=ratio if ratio < 1 else num_steps, use_cpu=True)
        assert TrainConfig(warmup_ratio=ratio).num_warmup_steps(num_steps) == theirs.get_warmup_steps(num_steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial"])
def test_it_falls_to_the_minimum_and_no_further(schedule):
    train = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-4, schedule=schedule, warmup_steps=2)
    rates = [learning_rate_at(step, 10, train) for step in range(2, 11)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)
