"""`parallel.gradient_dtype: bf16`: the gradients of fp32's sums up to bf16's rounding, in half of their bytes."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.schema import ParallelConfig
from megadpo.errors import UserError
from megadpo.model.weight_gradients import choose_fusion
from megadpo.parallel.layout import Layout
from megadpo.validation.load import load_config
from megadpo.validation.memory import check_gradient_dtype
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, outcomes

ROUNDING = 2.0**-8
"""Of a bf16 number, at most: half of the last of its 8 binary digits, relative to the number."""


@pytest.mark.slow
@pytest.mark.parametrize("ways", [{}, {"overlap": True, "fusion": True}], ids=["plain", "overlapped and fused"])
def test_two_replicas_add_up_bf16_gradients_in_fp32_and_keep_half_of_the_bytes(tmp_path, ways):
    size = {"num_hidden_layers": 1, "tokenizer": False}
    policy, reference = (save_model(tmp_path / str(seed), "qwen3", seed=seed, **size) for seed in (0, 1))
    cases = [Case(Layout(data=2), tokens_per_micro_batch=200, gradient_dtype=dtype, **ways) for dtype in ("fp32", "bf16")]
    wide, narrow = run_world(2, outcomes, policy, reference, random_groups(7, seed=3), cases, 1, torch.bfloat16)[0]
    assert narrow.num_bytes_of_gradients * 2 == wide.num_bytes_of_gradients > 0
    worst, name = oracle.worst_relative_error(narrow.gradients, wide.gradients)
    # A rounding for each of some micro-batches and tiles of the head, and one of the sum.
    assert 0 < worst <= 4 * ROUNDING, name
    assert narrow.grad_norm == pytest.approx(wide.grad_norm, rel=ROUNDING)
    assert all(gradient.dtype is torch.float32 for gradient in narrow.gradients.values())


def test_products_add_to_bf16_gradients_by_torch_as_apex_adds_to_fp32_ones(monkeypatch):
    from megadpo.model import weight_gradients

    monkeypatch.setattr(weight_gradients.tensor_parallel_layers, "_grad_accum_fusion_available", True)
    cuda = torch.device("cuda", 0)
    assert choose_fusion(None, cuda, torch.bfloat16) == "apex"
    assert choose_fusion(None, cuda, torch.bfloat16, gradient_dtype=torch.bfloat16) == "torch"
    assert choose_fusion(None, torch.device("cpu"), torch.bfloat16, gradient_dtype=torch.bfloat16) == "off"


def test_an_fp32_model_and_another_engine_refuse_them_in_a_sentence():
    with pytest.raises(UserError, match=r"^parallel\.gradient_dtype is bf16, but the model is computed in fp32, .*; set "):
        check_gradient_dtype(ParallelConfig(gradient_dtype="bf16"), is_bf16=False)
    check_gradient_dtype(ParallelConfig(gradient_dtype="bf16"), is_bf16=True)
    check_gradient_dtype(ParallelConfig(), is_bf16=False)
    with pytest.raises(UserError, match=r"^parallel\.gradient_dtype is bf16, but parallel\.engine is deepspeed, .*; set "):
        load_config({}, ["parallel.gradient_dtype=bf16", "parallel.engine=deepspeed"])
