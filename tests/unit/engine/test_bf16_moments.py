"""AdamW with moments in bf16: fp32's steps up to a rounding that is right on average, in half of the memory."""

from __future__ import annotations

import pytest
import torch

from megadpo.engine import bf16_moments as narrow_adamw
from megadpo.engine.bf16_moments import AdamWWithBf16Moments
from megadpo.errors import UserError
from megadpo.parallel.layout import Layout
from megadpo.validation.load import load_config
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, outcomes

SIZE = 1000


def gradients(num_steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_steps)
    sizes = torch.logspace(-6, 0, SIZE)
    return [scale * sizes * (torch.randn(SIZE, generator=generator) + 0.5) for _ in range(num_steps)]


def stepped(optimizer: torch.optim.Optimizer, some: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the one parameter after steps with these gradients."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for gradient in some:
        parameter.grad = gradient
        optimizer.step()
    return {kind: optimizer.state[parameter][kind].float() for kind in narrow_adamw.MOMENTS}


def test_moments_follow_those_of_fp32_even_where_a_step_is_less_than_a_last_place():
    # Large gradients, then small ones: rounded to the nearest, exp_avg_sq would stay where the large ones brought it.
    large_then_small = gradients(100) + gradients(3000, 1e-3)
    start = torch.randn(SIZE)
    wide, narrow = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    exact = stepped(torch.optim.AdamW([wide], lr=1e-4), large_then_small)
    found = stepped(AdamWWithBf16Moments([narrow], lr=1e-4), large_then_small)
    ratio = found["exp_avg_sq"] / exact["exp_avg_sq"]
    assert abs(float(ratio.mean()) - 1) < 0.01 and float((ratio - 1).abs().max()) < 0.1
    assert float((found["exp_avg"] - exact["exp_avg"]).norm() / exact["exp_avg"].norm()) < 0.01
    assert float((narrow - wide).detach().norm() / (wide - start).detach().norm()) < 0.01


def test_gone_on_from_its_state_it_takes_the_same_steps():
    start, some = torch.randn(SIZE), gradients(6)
    whole, resumed = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    expected = stepped(AdamWWithBf16Moments([whole], weight_decay=0.1), some)
    first, second = (AdamWWithBf16Moments([resumed], weight_decay=0.1) for _ in range(2))
    stepped(first, some[:3])
    second.state[resumed] = {kind: value.clone() for kind, value in first.state[resumed].items()}
    assert all(torch.equal(moment, expected[kind]) for kind, moment in stepped(second, some[3:]).items())
    assert torch.equal(resumed, whole)


def test_tiles_leave_no_element_out(monkeypatch):
    start, some = torch.randn(SIZE), gradients(3)
    whole, tiled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    expected = stepped(AdamWWithBf16Moments([whole]), some)
    monkeypatch.setitem(narrow_adamw.TILE_ELEMENTS, "cpu", 192)
    found = stepped(AdamWWithBf16Moments([tiled]), some)
    assert all(float((found[kind] - moment).norm() / moment.norm()) < 0.01 for kind, moment in expected.items())
    assert all(bool(moment.all()) for moment in found.values())
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_learns_as_with_fp32_moments_and_keeps_half_of_their_bytes(tmp_path):
    size = {"num_hidden_layers": 2, "tokenizer": False}
    policy, reference = (save_model(tmp_path / str(seed), "qwen3", seed=seed, **size) for seed in (0, 1))
    some = [Case(Layout(data=2), moments_dtype=dtype) for dtype in ("fp32", "bf16")]
    for dtype in (torch.float32, torch.bfloat16):
        found = run_world(2, outcomes, policy, reference, random_groups(9, seed=3), some, 6, dtype)[0]
        wide, narrow = found
        assert wide.losses[-1] < wide.losses[0] / 3, "something is learnt"
        assert narrow.losses == pytest.approx(wide.losses, rel=0.02)
        assert narrow.num_bytes_of_moments * 2 == wide.num_bytes_of_moments > 0


@pytest.mark.parametrize("keeper", ["parallel.engine=deepspeed", "parallel.offload=cpu"])
def test_another_optimizer_s_moments_stay_in_fp32(keeper):
    what, value = keeper.split("=")
    with pytest.raises(UserError, match=rf"^train\.moments_dtype is bf16, but {what} is {value}, wh.* in fp32; use "):
        load_config({}, ["train.moments_dtype=bf16", keeper])
