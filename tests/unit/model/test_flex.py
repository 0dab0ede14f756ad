"""FlexAttention's mask and map of blocks are the definition's, forward and backward, on a CPU and not compiled, in fp64."""

from __future__ import annotations

import pytest
import torch

from megadpo.data.batches.micro_batch import ShardSegment
from megadpo.model.attention.flex import _function, block_mask_of
from tests.helpers.attention import SCORES, SHAPES, operands, sinks_of, stream
from tests.helpers.attention import assert_same as held_to_the_definition

pytestmark = pytest.mark.slow

flex = pytest.importorskip("torch.nn.attention.flex_attention")

LONG = [(200, 90, 130), (20, 10, 12), (300, 1, 8)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch):
    """Its check refuses them there; what it computes them by uncompiled is plain torch and works."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None, raising=False)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


def assert_same(segments, num_queries, num_keys, window, heads=(4, 2), head_dim=16, **scores):
    tensors = operands(num_queries, num_keys, heads, torch.float64, head_dim, scores.pop("value_dim", None))
    held_to_the_definition("flex", segments, tensors, window, 1e-12, **scores)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 6])
def test_outputs_and_gradients_of_any_shape_and_window(window, shape):
    for share_prompts, part in ((True, None), (False, None), (True, 1)):
        assert_same(*stream(SHAPES[shape], share_prompts, part), window)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_outputs_and_gradients_of_heads_of_any_number_and_dimension(head_dim, heads):
    assert_same(*stream(SHAPES["single tokens"]), None, heads, head_dim)


@pytest.mark.parametrize(("softcap", "has_sinks", "value_dim"), SCORES, ids=str)
def test_softcaps_sinks_and_values_of_another_dimension(softcap, has_sinks, value_dim):
    for window, part in ((None, None), (6, None), (6, 1)):
        sinks_A = sinks_of(4, torch.float64) if has_sinks else None
        one = stream(SHAPES["pairs"], part=part)
        assert_same(*one, window, softcap=softcap, sinks_A=sinks_A, value_dim=value_dim)


def test_a_segment_may_be_empty_or_of_one_token():
    assert_same([ShardSegment(0, 2, 3, 5, 0, 3), ShardSegment(2, 2, 5, 5), ShardSegment(2, 3, 5, 6, 0, 3)], 3, 6, None)


@pytest.mark.parametrize("window", [None, 33, 150])
@pytest.mark.parametrize(("share_prompts", "part"), [(True, None), (False, None), (True, 0), (True, 1)])
def test_the_map_of_blocks_is_the_one_that_torch_finds_by_asking_for_every_pair(share_prompts, part, window):
    segments, num_queries, num_keys = stream(LONG, share_prompts, part)
    ours = block_mask_of(segments, window, num_keys, CPU)
    theirs = flex.create_block_mask(ours.mask_mod, None, None, num_queries, num_keys, device="cpu")
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    if window is None and share_prompts and part is None:
        assert int(ours.full_kv_num_blocks.sum()) > 0


@pytest.mark.slow
def test_streams_of_other_lengths_are_not_compiled_again_and_each_scale_is_a_constant():
    graphs = []

    def kept(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    attend = _function(True, kept)
    for number, scale in ((3, 0.5), (4, 0.5), (5, 0.5), (6, 0.5), (6, 0.25)):
        segments, num_queries, num_keys = stream([(100, 30, 40)] * number)
        operands_ = [x.detach().transpose(0, 1)[None] for x in operands(num_queries, num_keys, (4, 2), torch.float32)[:3]]
        attend(*operands_, block_mask_of(segments, None, num_keys, CPU), scale)
    assert len(graphs) == 3  # of one length, of any length, of another scale
    assert all(any(f", {scale}, " in graph.code for graph in graphs) for scale in (0.5, 0.25))
