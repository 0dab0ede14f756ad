"""Recomputing activations and moving them away changes memory and time, not one gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity import zero_worker
from tests.parity.worker import Case, outcomes

NUM_LAYERS = 8
SMALL = 90
"""Tokens of a micro-batch, so that several, of different lengths and orders of segments, are under way at once."""
CHEAP, SELECTIVE, FULL = Activations("small"), Activations("selective"), Activations("full")
PAIRS, BLOCK = Activations("full", recompute_num_layers=2), Activations("full", "block", 1)


def away(directory: Path, recompute: str = "none") -> Activations:
    return Activations(recompute, offload="disk", offload_dir=directory, offload_window_mib=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    changes = {"num_hidden_layers": NUM_LAYERS, "tie_word_embeddings": True}
    policy = save_model(directory / "policy", "qwen3", **changes)
    return policy, save_model(directory / "reference", "qwen3", seed=1, **changes), random_groups(5, seed=3)


MEGATRONS, OURS = PipelineScheduleConfig(), PipelineScheduleConfig("1f1b")
CASES = {
    1: [(Layout(), MEGATRONS, [CHEAP, SELECTIVE, FULL, PAIRS, BLOCK, "none", "small", "full"])],
    2: [
        (Layout(tensor=2, sequence=True), MEGATRONS, [CHEAP, BLOCK, "small", "selective"]),
        (Layout(pipeline=2, virtual=2), MEGATRONS, [CHEAP, SELECTIVE, PAIRS, "full"]),
        (Layout(pipeline=2, virtual=2), OURS, [CHEAP, FULL, "none"]),
    ],
}
"""A text: offloaded, with that recomputation."""
OFTEN = {
    1: CASES[1],
    2: [
        (Layout(tensor=2, sequence=True), MEGATRONS, [CHEAP, "selective"]),
        (Layout(pipeline=2, virtual=2), MEGATRONS, [PAIRS, "full"]),
        (Layout(pipeline=2, virtual=2), OURS, [CHEAP]),
    ],
}
"""Of these, what is tried each time: every way, and each layout and schedule with two or three."""


@pytest.mark.parametrize(
    ("num_processes", "chosen"),
    [
        *((size, "often") for size in OFTEN),
        *(pytest.param(size, "all", marks=pytest.mark.exhaustive) for size in CASES if CASES[size] != OFTEN[size]),
    ],
)
@pytest.mark.slow
def test_gradients_are_those_of_kept_activations_to_the_bit(files, num_processes, chosen, tmp_path):
    def case(layout: Layout, schedule: PipelineScheduleConfig, way: Activations | str) -> Case:
        memory = away(tmp_path, way) if isinstance(way, str) else way
        return Case(layout, tokens_per_micro_batch=SMALL, memory=memory, schedule=schedule)

    tried = (OFTEN if chosen == "often" else CASES)[num_processes]
    cases = [case(*where, way) for *where, ways in tried for way in (Activations(), *ways)]
    found = run_world(num_processes, outcomes, *files, cases, 1)[0]
    kept = found[0]
    for case, outcome in zip(cases, found, strict=True):
        if case.memory == Activations():
            kept = outcome
        worst, name = oracle.worst_relative_error(outcome.gradients, kept.gradients)
        assert worst == 0, f"{case}: {name} {worst}"
        assert (outcome.loss, outcome.grad_norm) == (kept.loss, kept.grad_norm), str(case)
        assert all((outcome.weights[name] == kept.weights[name]).all() for name in kept.weights), str(case)
        assert (outcome.num_bytes_moved > 0) == (case.memory.offload != "none"), str(case)
        assert (outcome.num_recomputed > 0) == (case.memory.recompute == "small"), str(case)


EXPERTS = {1: Layout(), 2: Layout(tensor=2, sequence=True, expert=2)}


@pytest.mark.parametrize("num_processes", EXPERTS)
@pytest.mark.slow
def test_nor_do_those_of_experts_change_where_cheap_results_are_made_again(tmp_path, num_processes):
    changes = {"mlp_only_layers": [0], "norm_topk_prob": True, "num_hidden_layers": 3}
    policy = save_model(tmp_path / "policy", "qwen3_moe", tokenizer=False, **changes)
    layout = EXPERTS[num_processes]
    ways = (Activations(), CHEAP, away(tmp_path, "small"))
    cases = [Case(layout, tokens_per_micro_batch=SMALL, router_aux_coef=0.01, memory=way) for way in ways]
    kept, *found = run_world(num_processes, outcomes, policy, policy, random_groups(5, seed=3), cases, 1)[0]
    for case, outcome in zip(cases[1:], found, strict=True):
        assert oracle.worst_relative_error(outcome.gradients, kept.gradients)[0] == 0, str(case)
        assert (outcome.loss, outcome.grad_norm) == (kept.loss, kept.grad_norm) and outcome.num_recomputed > 0, str(case)


@pytest.mark.parametrize("zero_stage", [2, 3, pytest.param(0, marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_nor_do_those_of_deepspeed_s_engine_change(files, tmp_path, zero_stage):
    pytest.importorskip("deepspeed")
    ways = [None, CHEAP, BLOCK, *([] if zero_stage == 3 else [away(tmp_path), away(tmp_path, "small")])]
    cases = [zero_worker.Case(Layout(), zero_stage, tokens_per_micro_batch=SMALL, memory=way) for way in ways]
    kept, *found = run_world(1, zero_worker.outcomes, *files, cases, 1)[0]
    for case, outcome in zip(cases[1:], found, strict=True):
        assert oracle.worst_relative_error(outcome.gradients, kept.gradients)[0] == 0, str(case)
        assert outcome.loss == kept.loss and (outcome.num_bytes_moved > 0) == (case.memory.offload != "none"), str(case)
        assert (outcome.num_recomputed > 0) == (case.memory.recompute == "small"), str(case)
