"""Context parallelism as an option: what it is resolved to, and what is refused."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from megadpo.config.schema import ParallelConfig
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout, choose_layout, context_method
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config


def model(num_heads: int = 8, num_key_value_heads: int = 4) -> ModelShape:
    config = LlamaConfig(
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        num_hidden_layers=4,
        intermediate_size=96,
        hidden_size=96,
    )
    return shape_of(config)


def test_context_ranks_are_no_replicas():
    layout = choose_layout(ParallelConfig(tensor=2, context=2, context_method="ulysses"), 8)
    assert (layout.data, layout.context, layout.context_method, layout.world_size) == (2, 2, "ulysses", 8)
    assert str(layout) == "tensor 2 + sequence x context 2 (ulysses) x pipeline 1 x data 2"
    with pytest.raises(UserError, match=r"parallel\.context 3 needs a multiple of 3 processes but there are 4"):
        choose_layout(ParallelConfig(context=3), 4)


def test_streams_are_padded_to_what_context_and_sequence_parallelism_divide():
    assert Layout(context=3).stream_multiple == 3
    assert Layout(tensor=2, sequence=True, context=3).stream_multiple == 6
    assert Layout(tensor=2).stream_multiple == 1


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        (Layout(), None),
        (Layout(context=4), "ulysses"),
        (Layout(context=8), "allgather"),
        (Layout(tensor=2, context=4), "allgather"),
        (Layout(context=3), "allgather"),
        (Layout(context=4, context_method="allgather"), "allgather"),
        (Layout(context=8, context_method="ulysses"), "ulysses"),
    ],
)
def test_auto_is_all_to_all_where_the_key_value_heads_divide_and_all_gather_elsewhere(layout, method):
    check_layout(layout, model())
    assert context_method(layout, model().num_key_value_heads) == method


def test_all_to_all_over_heads_that_cannot_be_spread_is_refused():
    for layout in (Layout(context=3, context_method="ulysses"), Layout(tensor=2, context=8, context_method="ulysses")):
        with pytest.raises(UserError, match=r"ulysses cannot spread .* set context_method to allgather or auto"):
            check_layout(layout, model())
    with pytest.raises(UserError, match="12 attention heads with 6 key-value heads"):
        check_layout(Layout(context=4, context_method="ulysses"), model(12, 6))


def test_ring_attention_is_refused_by_name_and_a_method_without_context_ranks_too():
    with pytest.raises(UserError, match=r"parallel\.context_method: 'ring' is not available"):
        load_config({}, ["parallel.context=2", "parallel.context_method=ring"])
    with pytest.raises(UserError, match=r"ulysses, which has no effect with parallel\.context 1"):
        load_config({}, ["parallel.context_method=ulysses"])
    load_config({}, ["parallel.context=2", "parallel.context_method=allgather"])


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_both_engines_add_gradients_up_over_context_ranks(engine: str) -> None:
    """In numbers: tests/parity/test_context_parallel.py and test_deepspeed.py."""
    config = load_config({}, ["parallel.context=2", f"parallel.engine={engine}"])
    assert (config.parallel.context, config.parallel.engine) == (2, engine)
