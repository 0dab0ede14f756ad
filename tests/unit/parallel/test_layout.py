"""Layouts: what fits, and one clear sentence for what does not."""

from __future__ import annotations

import pytest
from transformers import DeepseekV3Config, LlamaConfig

from megadpo.config.schema import ParallelConfig
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.parallel.layout import Layout, choose_layout, even_chunks
from megadpo.validation.layout import check_layout

SHAPE = shape_of(LlamaConfig(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=6, intermediate_size=96))


def test_data_parallel_is_what_the_processes_leave_over():
    assert choose_layout(ParallelConfig(tensor=2, pipeline=2), 8) == Layout(tensor=2, pipeline=2, data=2, sequence=True)
    assert choose_layout(ParallelConfig(), 3) == Layout(data=3)


def test_sequence_parallel_follows_tensor_unless_it_is_set():
    assert not choose_layout(ParallelConfig(tensor=2, sequence=False), 2).sequence
    with pytest.raises(UserError, match="sequence parallelism needs tensor > 1"):
        choose_layout(ParallelConfig(sequence=True), 2)


@pytest.mark.parametrize("num_processes", [1, 2, 6])
def test_a_number_of_processes_that_the_sizes_do_not_divide_is_refused(num_processes):
    with pytest.raises(UserError, match=rf"multiple of 4 processes but there are {num_processes}"):
        choose_layout(ParallelConfig(tensor=2, pipeline=2), num_processes)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), "does not divide the model's 8 attention heads"),
        (Layout(tensor=4), r"does not divide the model's 2 key-value heads; use one of \[1, 2\]"),
        (Layout(pipeline=7), "parallel.pipeline 7 is more than the model's 6 layers; lower it to 6 or less"),
        (Layout(pipeline=4, virtual=2), "pipeline 4 x parallel.virtual_pipeline 2 is more than the model's 6 layers"),
        (Layout(pipeline=2, chunk_layers=(3, 4)), "pipeline_layout 3,4 adds up to 7 layers but the model has 6"),
        (Layout(data=9), "train.pairs_per_step 8 is less than the 9 data-parallel replicas"),
    ],
)
def test_a_layout_the_model_or_the_batch_cannot_be_spread_over_is_refused(layout, message):
    with pytest.raises(UserError, match=message):
        check_layout(layout, SHAPE, pairs_per_step=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kv_lora_rank": 33},
            r"2 does not divide the model's 97 columns of keys' and values' latent \(kv_lora_rank \+ qk_rope",
        ),
        ({"q_lora_rank": 31}, r"2 does not divide the model's 31 columns of queries' latent \(q_lora_rank\)"),
    ],
)
def test_latents_that_tensor_ranks_do_not_divide_are_refused(changes, message):
    shape = shape_of(DeepseekV3Config(num_attention_heads=8, num_key_value_heads=8, **changes))
    with pytest.raises(UserError, match=message):
        check_layout(Layout(tensor=2, sequence=True), shape)


def test_a_layout_that_fits_is_let_through():
    check_layout(Layout(tensor=2, pipeline=3, data=8), SHAPE, pairs_per_step=8)


def test_stages_hold_consecutive_layers():
    assert [list(Layout(pipeline=3).layers_of_stage(6, stage)) for stage in range(3)] == [[0, 1], [2, 3], [4, 5]]
    uneven = Layout(pipeline=3, chunk_layers=(1, 3, 2))
    assert [list(uneven.layers_of_stage(6, stage)) for stage in range(3)] == [[0], [1, 2, 3], [4, 5]]


def test_chunks_of_virtual_stages_go_around_the_stages():
    layout = Layout(pipeline=2, virtual=2, chunk_layers=(1, 2, 2, 1))
    held = [[list(layout.layers_of_stage(6, stage, chunk)) for chunk in range(2)] for stage in range(2)]
    assert held == [[[0], [3, 4]], [[1, 2], [5]]]


@pytest.mark.parametrize(
    ("num_layers", "num_chunks", "sizes"),
    [(6, 3, (2, 2, 2)), (7, 3, (2, 3, 2)), (14, 4, (3, 4, 4, 3)), (5, 2, (3, 2)), (15, 4, (4, 4, 4, 3)), (3, 3, (1, 1, 1))],
)
def test_layers_that_do_not_divide_leave_first_and_last_the_lightest(num_layers, num_chunks, sizes):
    assert even_chunks(num_layers, num_chunks) == sizes


@pytest.mark.parametrize("value", ["2,4", [2, 4], " 2, 4 "])
def test_the_layers_of_each_stage_are_given_as_text_or_as_a_list(value):
    assert choose_layout(ParallelConfig(pipeline=2, pipeline_layout=value), 2).chunk_layers == (2, 4)


@pytest.mark.parametrize(
    ("value", "virtual", "message"),
    [
        ("2,0", 1, "pipeline_layout is '2,0'; give the number of layers of each stage, all above 0"),
        ("Ett|ttL", 1, "give the number of layers of each stage"),
        ([2, 2, 2], 1, "has 3 numbers of layers but parallel.pipeline 2 needs 2"),
        ([3, 3], 2, r"has 2 numbers of layers but parallel.pipeline 2 x parallel.virtual_pipeline 2 needs 4"),
    ],
)
def test_layers_of_stages_that_are_no_numbers_or_not_one_for_each_are_refused(value, virtual, message):
    with pytest.raises(UserError, match=message):
        choose_layout(ParallelConfig(pipeline=2, virtual_pipeline=virtual, pipeline_layout=value), 2)
