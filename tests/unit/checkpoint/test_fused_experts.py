"""Experts that are one tensor in the files are the tensors of single experts here, and go back bit for bit; MXFP4 too."""

from __future__ import annotations

import pytest
import torch

from megadpo.checkpoint.fused_experts import SingleExperts, from_mxfp4, fused, fused_names
from megadpo.errors import UserError
from tests.helpers.families import DictSource

BLOCK = "model.layers.1.mlp.experts"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """3 experts, 8 hidden columns, 6 inner ones, and a tensor that is no expert's."""
    torch.manual_seed(0)
    shapes = {"gate_up_proj": (3, 8, 12), "gate_up_proj_bias": (3, 12), "down_proj": (3, 6, 8), "down_proj_bias": (3, 8)}
    made = {f"{BLOCK}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return made | {"model.layers.1.mlp.router.bias": torch.randn(3)}


COLUMNS = {"in_turns": (slice(0, None, 2), slice(1, None, 2)), "in_halves": (slice(0, 6), slice(6, None))}
"""Of gate and up."""


@pytest.mark.parametrize("order", COLUMNS)
def test_a_single_expert_computes_what_the_fused_one_does_and_any_part_of_it_can_be_read(tensors, order) -> None:
    source = SingleExperts(DictSource(tensors), order)
    of_gate, of_up = COLUMNS[order]
    token = torch.randn(8)
    for number in range(3):
        both = token @ tensors[f"{BLOCK}.gate_up_proj"][number] + tensors[f"{BLOCK}.gate_up_proj_bias"][number]
        for part, theirs in (("gate_proj", both[of_gate]), ("up_proj", both[of_up])):
            name = f"{BLOCK}.{number}.{part}"
            weight, bias = (source.read(f"{name}.{kind}", 0, 0, 6) for kind in ("weight", "bias"))
            torch.testing.assert_close(weight @ token + bias, theirs)
            assert torch.equal(source.read(f"{name}.weight", 0, 2, 3), weight[2:5])
            assert torch.equal(source.read(f"{name}.weight", 1, 4, 4), weight[:, 4:])
            assert source.shape(f"{name}.weight") == weight.shape and source.shape(f"{name}.bias") == bias.shape
        down = source.read(f"{BLOCK}.{number}.down_proj.weight", 1, 0, 6)
        assert torch.equal(down, tensors[f"{BLOCK}.down_proj"][number].mT)
    router = "model.layers.1.mlp.router.bias"
    assert torch.equal(source.read(router, 0, 0, 3), tensors[router])


@pytest.mark.parametrize("order", COLUMNS)
def test_single_experts_go_back_into_the_files_bit_for_bit(tensors, order) -> None:
    source = SingleExperts(DictSource(tensors), order)
    single = {name: source.read(name, 0, 0, source.shape(name)[0]) for name in source.names()}
    assert len(single) == 1 + 3 * 6
    assert set(fused_names(single)) == tensors.keys()
    back = fused(dict(reversed(single.items())), order)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def _packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    packed = {f"{BLOCK}.gate_up_proj_blocks": torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8)}
    packed[f"{BLOCK}.gate_up_proj_scales"] = torch.randint(110, 135, (3, 12, 2), dtype=torch.uint8)
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith(".gate_up_proj")}
    return others | packed


def test_mxfp4_is_read_as_transformers_reads_it_bit_for_bit(tensors) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = _packed(tensors)
    theirs = convert_moe_packed_tensors(*(packed[f"{BLOCK}.gate_up_proj_{kind}"] for kind in ("blocks", "scales")))
    source = SingleExperts(DictSource(packed))
    for number in range(3):
        for part, first in (("gate_proj", 0), ("up_proj", 1)):
            name = f"{BLOCK}.{number}.{part}.weight"
            ours = source.read(name, 0, 0, 6)
            assert ours.dtype is source.dtype(name) is torch.bfloat16 and source.shape(name) == (6, 64)
            assert torch.equal(ours, theirs[number, :, first::2].mT)
    assert from_mxfp4(torch.tensor([[[0x2F] + [0] * 15]]), torch.tensor([[126]]))[0, :2].tolist() == [-3.0, 0.5]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("gate_up_proj_scales", torch.zeros(3, 12, 1, dtype=torch.uint8), "are not MXFP4's: uint8, 16 bytes to each scale"),
        ("gate_up_proj_scales", torch.zeros(3, 12, 2), "are not MXFP4's"),
        ("gate_up_proj_scales", None, r"gate_up_proj_blocks, but no \S*gate_up_proj_scales; get it again"),
        ("down_proj", torch.zeros(6, 8), r"down_proj has shape \[6, 8\], which is not all experts'"),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(tensors, name, tensor, says) -> None:
    packed = _packed(tensors) | {f"{BLOCK}.{name}": tensor}
    with pytest.raises(UserError, match=says):
        SingleExperts(DictSource({key: value for key, value in packed.items() if value is not None}))
