"""Layouts: what fits, and one clear sentence for what does not."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from megadpo.config import ParallelConfig
from megadpo.errors import UserError
from megadpo.parallel.layout import Layout, check_layout, choose_layout

CONFIG = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=6, intermediate_size=96)


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
        (Layout(pipeline=4), r"does not divide the model's 6 layers; use one of \[1, 2, 3, 6\]"),
        (Layout(data=9), "train.pairs_per_step 8 is less than the 9 data-parallel replicas"),
    ],
)
def test_a_layout_the_model_or_the_batch_cannot_be_spread_over_is_refused(layout, message):
    with pytest.raises(UserError, match=message):
        check_layout(layout, CONFIG, pairs_per_step=8)


def test_a_layout_that_fits_is_let_through():
    check_layout(Layout(tensor=2, pipeline=3, data=8), CONFIG, pairs_per_step=8)


def test_stages_hold_consecutive_layers():
    assert [list(Layout(pipeline=3).layers_of_stage(6, stage)) for stage in range(3)] == [[0, 1], [2, 3], [4, 5]]
