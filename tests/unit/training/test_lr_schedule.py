"""The learning rate of a step equals that of transformers' schedulers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from megadpo.config.schema import TrainConfig
from megadpo.training.lr_schedule import learning_rate_at


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_every_schedule_is_transformers(ours, theirs, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    train = TrainConfig(learning_rate=3e-4, schedule=ours, warmup_steps=warmup)
    for step in range(40):
        assert learning_rate_at(step, 40, train) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_falls_to_the_minimum_and_no_further(schedule):
    train = TrainConfig(learning_rate=1e-3, min_learning_rate=1e-4, schedule=schedule, warmup_steps=2)
    rates = [learning_rate_at(step, 10, train) for step in range(2, 11)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)
