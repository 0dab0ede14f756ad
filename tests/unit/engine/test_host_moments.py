"""AdamW with moments in host memory: to the bit the steps of torch's, however parameters lie in the tiles."""

from __future__ import annotations

import itertools

import pytest
import torch

from megadpo.engine import host_moments
from megadpo.engine.host_moments import MOMENTS, AdamWWithHostMoments
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.optimizer_worker import stepped
from tests.parity.worker import Case, outcomes

SIZES = ((64, 1024), (8, 192, 2000, 64))
"""Of two groups; tiles hold 256: some parameters share one, some are spread over several."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(host_moments, "TILE_ELEMENTS", 256)


def parameters_and_optimizer() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(0)
    groups = [[torch.nn.Parameter(torch.randn(size)) for size in sizes] for sizes in SIZES]
    options = ({"lr": 1e-3, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-6})
    both = [{"params": group, **some} for group, some in zip(groups, options, strict=True)]
    return [parameter for group in groups for parameter in group], torch.optim.AdamW(both, fused=True)


def step(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.param_groups[0]["lr"] = 1e-3 / (number + 1)  # a schedule writes into the group
    optimizer.step()


def test_steps_are_torch_s_to_the_bit():
    theirs, torch_s = parameters_and_optimizer()
    ours, optimizer = parameters_and_optimizer()
    host = AdamWWithHostMoments.with_groups_of(optimizer)
    for number in range(5):
        step(torch_s, theirs, number)
        step(host, ours, number)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        moments = host.moments(mine)
        assert all(torch.equal(moments[kind], torch_s.state[other][kind]) for kind in MOMENTS)


def test_moments_are_zeros_before_the_first_step():
    parameters, optimizer = parameters_and_optimizer()
    host = AdamWWithHostMoments.with_groups_of(optimizer)
    for parameter in parameters:
        assert all(moment.shape == parameter.shape and not moment.any() for moment in host.moments(parameter).values())


def test_gone_on_from_its_moments_it_takes_the_same_steps():
    whole, optimizer = parameters_and_optimizer()
    expected = AdamWWithHostMoments.with_groups_of(optimizer)
    for number in range(5):
        step(expected, whole, number)
    resumed, optimizer = parameters_and_optimizer()
    first, second = (AdamWWithHostMoments.with_groups_of(optimizer) for _ in range(2))
    for number in range(3):
        step(first, resumed, number)
    for parameter in resumed:
        second.set_moments(parameter, first.moments(parameter), num_steps=3)
    for number in range(3, 5):
        step(second, resumed, number)
    assert all(torch.equal(*both) for both in zip(resumed, whole, strict=True))


def test_parameters_fill_as_few_tiles_as_they_need_and_no_element_is_left_out():
    _, optimizer = parameters_and_optimizer()
    tiles = host_moments._tiles(optimizer.param_groups)
    assert len(tiles) == -(-sum(map(sum, SIZES)) // 256)  # the one of 8 takes 64
    for tile in tiles:
        places = sorted((piece.place.start, piece.place.stop) for piece in tile.pieces)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(places)) and places[-1][1] <= 256
    parts: dict[torch.Tensor, int] = {}
    for piece in (piece for tile in tiles for piece in tile.pieces):
        assert piece.part.start == parts.get(piece.parameter, 0)
        parts[piece.parameter] = piece.part.stop
    assert all(parts[parameter] == len(parameter) for parameter in parts) and len(parts) == sum(map(len, SIZES))


@pytest.mark.slow
def test_an_engine_s_weights_are_those_of_moments_that_stay(tmp_path):
    size = {"num_hidden_layers": 2, "tokenizer": False}
    policy, reference = (save_model(tmp_path / str(seed), "qwen3", seed=seed, **size) for seed in (0, 1))
    cases = [Case(Layout(), offload=where) for where in ("none", "cpu")]
    for dtype in (torch.float32, torch.bfloat16):
        stays, moves = run_world(1, outcomes, policy, reference, random_groups(5, seed=3), cases, 3, dtype)[0]
        assert stays.losses == moves.losses and stays.losses[0] > stays.losses[-1]
        assert all(torch.equal(moves.weights[name], weights) for name, weights in stays.weights.items())
        assert all(torch.equal(moves.model_weights[name], weights) for name, weights in stays.model_weights.items())


@pytest.mark.slow
def test_an_engine_goes_on_from_its_state(tmp_path):
    policy = save_model(tmp_path, "qwen3", seed=0, num_hidden_layers=1, tokenizer=False)
    whole, resumed = (run_world(1, stepped, policy, "cpu", torch.bfloat16, 4, at)[0] for at in (None, 2))
    stays = run_world(1, stepped, policy, "none", torch.bfloat16, 4, 2)[0]
    assert all(torch.equal(resumed[name], tensor) and torch.equal(stays[name], tensor) for name, tensor in whole.items())
    assert {name.split()[0] for name in whole} == {"weights", "exp_avg", "exp_avg_sq", "model"}
