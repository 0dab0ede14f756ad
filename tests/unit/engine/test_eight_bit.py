"""Moments in 8 bits: bitsandbytes' AdamW on pieces of flat parameters, whose codes a checkpoint's values give back."""

from __future__ import annotations

import itertools

import pytest
import torch

from megadpo.config.schema import TrainConfig
from megadpo.engine.optimizer import OverPieces, Piece, moments_of, set_moments
from megadpo.engine.parameter_groups import KEPT, Settings

bitsandbytes = pytest.importorskip("bitsandbytes")

TRAIN = TrainConfig(optimizer="adamw_8bit", learning_rate=1e-2, weight_decay=0.1)
SIZES = (5000, 4096 + 77, 100)
"""The last is too small for 8 bits."""


def over_pieces(main: torch.Tensor) -> OverPieces:
    bounds = [0, SIZES[0], SIZES[0] + SIZES[1], sum(SIZES)]
    settings = [Settings("adamw_8bit", 1.0, True), Settings("adamw_8bit", 0.5, False), Settings("adamw_8bit", 1.0, True)]
    places = [slice(*both) for both in itertools.pairwise(bounds)]
    pieces = [Piece.of(main, place, each) for place, each in zip(places, settings, strict=True)]
    return OverPieces(torch.optim.AdamW([main], lr=1e-2), pieces, TRAIN, "fp32", {})


def drawn(number: int) -> torch.Tensor:
    return torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(number)) * 10.0 ** -(number % 5)


@pytest.mark.slow
def test_fifty_steps_are_bitsandbytes():
    main = torch.nn.Parameter(drawn(0))
    theirs = [torch.nn.Parameter(part.detach().clone()) for part in main.split(SIZES)]
    options = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 5e-3, "weight_decay": 0.0}, {"lr": 1e-2, "weight_decay": 0.1}]
    groups = [{"params": [part], **each} for part, each in zip(theirs, options, strict=True)]
    expected = bitsandbytes.optim.AdamW8bit(groups, betas=TRAIN.betas, eps=TRAIN.eps)
    ours = over_pieces(main)
    for step in range(50):
        main.grad = drawn(step)
        for part, gradient in zip(theirs, main.grad.split(SIZES), strict=True):
            part.grad = gradient.clone()
        ours.step()
        expected.step()
    torch.testing.assert_close(main.detach(), torch.cat([part.detach() for part in theirs]), rtol=0, atol=1e-6)
    states = [state for each in ours.rules.values() for state in each.state.values()]
    assert [state["state1"].dtype for state in states].count(torch.uint8) == 2


def test_what_a_checkpoint_has_gives_the_same_bits_back():
    main = torch.nn.Parameter(drawn(0))
    whole = over_pieces(main)
    for step in range(7):
        main.grad = drawn(step)
        whole.step()
    kept = {kind: values.clone() for kind, values in moments_of(whole, main, KEPT["adamw_8bit"]).items()}
    assert set(kept) == set(KEPT["adamw_8bit"]) and all(values.any() for values in kept.values())
    other = torch.nn.Parameter(main.detach().clone())
    resumed = over_pieces(other)
    set_moments(resumed, other, kept, 7)
    again = moments_of(resumed, other, KEPT["adamw_8bit"])
    assert all(torch.equal(again[kind], kept[kind]) for kind in kept)
    for step in range(7, 12):
        for parameter, optimizer in ((main, whole), (other, resumed)):
            parameter.grad = drawn(step)
            optimizer.step()
    assert torch.equal(main, other)


def test_other_blocks_round_moments_once_more():
    main = torch.nn.Parameter(drawn(0))
    whole = over_pieces(main)
    main.grad = drawn(1)
    whole.step()
    kept = moments_of(whole, main, KEPT["adamw_8bit"])
    shifted = {kind: values[100:9000].clone() for kind, values in kept.items()}
    other = torch.nn.Parameter(main.detach()[100:9000].clone())
    pieces = [Piece.of(other, slice(0, 8900), Settings("adamw_8bit", 1.0, True))]
    resumed = OverPieces(torch.optim.AdamW([other], lr=1e-2), pieces, TRAIN, "fp32", {})
    set_moments(resumed, other, shifted, 1)
    found = moments_of(resumed, other, KEPT["adamw_8bit"])
    assert float((found["exp_avg"] - shifted["exp_avg"]).abs().max()) < 0.05 * float(shifted["exp_avg"].abs().max())
