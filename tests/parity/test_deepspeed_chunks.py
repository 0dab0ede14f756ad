"""DeepSpeed with several chunks of the model on a pipeline stage: the numbers of one process under Megatron's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.marks import skip_without
from tests.helpers.models import random_groups, save_model
from tests.helpers.runs import assert_same_weights, resumed_and_whole, run_settings, save_files
from tests.helpers.worlds import run_world
from tests.parity.zero_worker import Case, outcomes

skip_without("deepspeed")
pytestmark = pytest.mark.slow

TWO, FOUR = Layout(pipeline=2, virtual=2), Layout(pipeline=2, virtual=2, data=2)
EXPERTS = Layout(pipeline=2, virtual=2, data=2, expert=2)
FEW = [Case(TWO, 0), Case(TWO, 2, offload="cpu"), Case(TWO, 3, recompute="full")]
ALL = [*(Case(FOUR, stage) for stage in range(4)), *(Case(FOUR, stage, offload="cpu") for stage in (1, 2, 3))]
MIXTURES = [Case(EXPERTS, stage) for stage in range(4)]
NUM_STEPS = 3
"""Sums of the step before must be gone."""


def _assert_each_equals_one_process(directory: Path, num_processes: int, cases: list[Case], family: str = "llama") -> None:
    policy = save_model(directory / "policy", family, tokenizer=False, num_hidden_layers=4)
    reference = save_model(directory / "reference", family, seed=1, tokenizer=False, num_hidden_layers=4)
    groups = random_groups(14, seed=3)
    (base,) = run_world(1, outcomes, policy, reference, groups, [Case(Layout())], NUM_STEPS)[0]
    found = run_world(num_processes, outcomes, policy, reference, groups, cases, NUM_STEPS)[0]
    for case, outcome in zip(cases, found, strict=True):
        oracle.assert_same_step(case, outcome, base)
        for name, weights in base.weights.items():
            assert (outcome.weights[name] - weights).norm() <= 1e-4 * weights.norm(), f"{case}: {name}"


def test_every_zero_stage_gives_the_numbers_of_one_process(tmp_path):
    _assert_each_equals_one_process(tmp_path, 2, FEW)


@pytest.mark.exhaustive
def test_so_does_each_over_two_replicas_and_with_each_offload(tmp_path):
    _assert_each_equals_one_process(tmp_path, 4, ALL)


@pytest.mark.exhaustive
def test_so_do_mixtures(tmp_path):
    _assert_each_equals_one_process(tmp_path, 4, MIXTURES, "mixtral")


@pytest.mark.exhaustive
def test_so_does_offload_to_files(tmp_path):
    from megadpo.engine.deepspeed.offload import can_swap_to_nvme, require_async_io

    if not can_swap_to_nvme():
        pytest.skip("libaio is missing")
    require_async_io()
    _assert_each_equals_one_process(tmp_path, 4, [Case(FOUR, 3, offload="nvme", offload_dir=str(tmp_path / "nvme"))])


@pytest.mark.exhaustive
@pytest.mark.parametrize("changes", [{}, {"adapter": {"kind": "lora"}}, {"schedule": {"name": "1f1b"}}], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, changes):
    files = save_files(tmp_path, "llama", 40, num_hidden_layers=4)

    def settings(name: str) -> dict[str, Any]:
        parallel = {"engine": "deepspeed", "zero_stage": 3, "pipeline": 2, "virtual_pipeline": 2}
        train = {"steps": 4, "tokens_per_micro_batch": 256}
        return run_settings(files, tmp_path / name, parallel=parallel, train=train, checkpoint={"every": 2}) | changes

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert resumed == whole
    if not changes.get("adapter"):
        assert_same_weights(tmp_path / "broken", tmp_path / "whole")
