"""What a rank holds of a quantised matrix is what bitsandbytes makes of that part alone."""

from __future__ import annotations

import weakref

import pytest
import torch

from megadpo.checkpoint.merged import MemorySource
from megadpo.model.families import logical_shapes, shape_of, shard_parameters
from megadpo.model.four_bit.weight import FourBit, FourBitWeight
from tests.helpers.families import config_of


class Watched(MemorySource):
    """Knows how many bytes of what was read were held at once, and are held now."""

    most = held = 0

    def read(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        values = super().read(name, dim, start, length).clone()
        self.held += values.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(values, self._gone, values.nbytes)
        return values

    def _gone(self, num_bytes: int) -> None:
        self.held -= num_bytes


functional = pytest.importorskip("bitsandbytes.functional")


def quantised(values: torch.Tensor, options: FourBit) -> torch.Tensor:
    """What 4 bits leave of a matrix."""
    packed, state = functional.quantize_4bit(
        values.contiguous(), blocksize=options.block_size, compress_statistics=options.double, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("options", [FourBit(), FourBit(32, double=False)])
@pytest.mark.parametrize("num_tensor", [1, 2])
def test_each_hugging_face_matrix_is_quantised_for_itself_as_far_as_a_rank_has_it(num_tensor, options):
    shape = shape_of(config_of("qwen3"))
    source = MemorySource({name: torch.randn(size) for name, size in logical_shapes(shape).items()})
    for rank in range(num_tensor):
        sizes = {"tensor_rank": rank, "num_tensor": num_tensor, "layers": range(1)}
        shards = shard_parameters(shape, **sizes, has_embedding=False, has_head=False)
        matrices = [
            shard for shard in shards if shard.name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
        ]
        assert len(matrices) == 4
        for shard in matrices:
            weight = FourBitWeight(options, torch.float32, torch.device("cpu"))
            weight.fill(shard, source)
            dense, num_bytes = weight.dense(), 0
            assert dense.shape == shard.shape
            for name in {piece.logical_name for piece in shard.pieces}:
                pieces = [piece for piece in shard.pieces if piece.logical_name == name]
                dim, first = pieces[0].dim, min(piece.logical_start for piece in pieces)
                length = sum(piece.length for piece in pieces)
                expected = quantised(source.read(name, dim, first, length), options)
                num_bytes += options.num_bytes(expected.numel())
                for piece in pieces:
                    found = dense.narrow(dim, piece.local_start, piece.length)
                    assert torch.equal(found, expected.narrow(dim, piece.logical_start - first, piece.length)), piece
            assert weight.num_bytes == num_bytes


def test_one_matrix_at_a_time_is_read_and_nothing_of_it_is_kept():
    shape = shape_of(config_of("llama"))
    source = Watched({name: torch.randn(size) for name, size in logical_shapes(shape).items()})
    shards = shard_parameters(
        shape, tensor_rank=0, num_tensor=1, layers=range(shape.num_layers), has_embedding=False, has_head=False
    )
    held = []
    for shard in shards:
        if len(shard.shape) == 2:
            held.append(FourBitWeight(FourBit(), torch.float32, torch.device("cpu")))
            held[-1].fill(shard, source)
    largest = max(4 * size[0] * size[1] for name, size in logical_shapes(shape).items() if "proj.weight" in name)
    assert source.held == 0 and 0 < source.most <= largest, (source.held, source.most, largest)
