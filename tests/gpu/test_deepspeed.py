"""DeepSpeed's engine on a CUDA device: every ZeRO stage, and offload, give what Megatron's engine gives there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.gpu.machine import on
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.parity.zero_worker import Case, Outcome, outcomes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("deepspeed"),
]

STAGES = [(stage, where) for where in ("none", "cpu") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, list]:
    pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("zero")
    size = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "tokenizer": False}
    policy, reference = (save_model(directory / str(seed), "qwen3", seed=seed, **size) for seed in (0, 1))
    return policy, reference, random_groups(7)


@pytest.fixture(scope="module")
def by_megatron(files) -> dict[torch.dtype, Outcome]:
    dtypes = (torch.float32, torch.bfloat16)
    return dict(zip(dtypes, on("cuda", outcomes, *files, [Case(Layout(), dtype=dtype) for dtype in dtypes]), strict=True))


def assert_equal(found: Outcome, base: Outcome, files: tuple, dtype: torch.dtype) -> None:
    gradient, rest = (1e-5, 1e-3) if dtype is torch.float32 else (1e-2, 1e-2)
    worst, name = oracle.worst_relative_error(found.gradients, base.gradients)
    assert worst <= gradient, f"{name} {worst}"
    assert found.loss == pytest.approx(base.loss, rel=rest)
    assert found.grad_norm == pytest.approx(base.grad_norm, rel=rest)
    if dtype is torch.float32:  # in bf16 AdamW's first steps make of the smallest gradient's rounding a whole step
        before = {name: tensor.detach() for name, tensor in oracle.load(files[0]).named_parameters()}
        apart = torch.stack([(found.weights[name] - base.weights[name]).norm() for name in before]).norm()
        moved = torch.stack([(base.weights[name] - before[name]).norm() for name in before]).norm()
        assert float(apart / moved) <= rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "where"), STAGES, ids=str)
def test_every_stage_gives_the_gradients_and_weights_of_megatrons_engine(files, by_megatron, stage, where, dtype):
    (found,) = on("cuda", outcomes, *files, [Case(Layout(), stage, offload=where, dtype=dtype)])
    assert_equal(found, by_megatron[dtype], files, dtype)


def test_offload_to_files_does_too(files, by_megatron, tmp_path):
    from megadpo.engine.deepspeed.offload import can_swap_to_nvme

    if not can_swap_to_nvme():
        pytest.skip("DeepSpeed's async_io does not build here: install libaio-dev and a C++ compiler")
    case = Case(Layout(), 3, offload="nvme", offload_dir=str(tmp_path))
    (found,) = on("cuda", outcomes, *files, [case], in_new_processes=True)  # it locks its directory until the process ends
    assert_equal(found, by_megatron[torch.float32], files, torch.float32)
