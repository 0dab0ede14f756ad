"""Weights in 4 bits on CUDA: what bitsandbytes makes there of a matrix is what it makes on a CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megadpo.checkpoint.merged import MemorySource
from megadpo.model.families import ParameterShard, ShardPiece
from megadpo.model.four_bit.weight import FourBit, FourBitWeight

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]


@pytest.mark.parametrize("options", [FourBit(), FourBit(128, double=False)], ids=str)
def test_a_matrix_on_cuda_is_that_on_a_cpu(options):
    source = MemorySource({"m.weight": torch.randn(384, 512)})
    shard = ParameterShard("m.weight", (384, 512), 0, (ShardPiece("m.weight", 0, 0, 0, 384),))
    weights = [FourBitWeight(options, torch.float32, torch.device(device)) for device in ("cpu", "cuda")]
    for weight in weights:
        weight.fill(shard, source)
    on_cpu, on_cuda = (weight.dense().cpu() for weight in weights)
    assert [weight.num_bytes for weight in weights] == [options.num_bytes(384 * 512)] * 2
    differs = (on_cpu - on_cuda).abs() > 1e-5 * on_cpu.abs().clamp(min=1e-3)
    assert float(differs.double().mean()) <= 1e-4  # a value between two of the 16 may go to either
