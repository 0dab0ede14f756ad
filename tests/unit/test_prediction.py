"""`benchmarks predict`: what one H100 measured is what is predicted for it, sizes are the package's, messages cost time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.predict import MODELS, best_step, one_card, workload_of
from megadpo.commands.plan_layouts import most_parameters
from megadpo.config.schema import AdapterConfig
from megadpo.data.store import GroupStore
from megadpo.model.adapters.spec import resolve
from megadpo.model.families import shape_of
from megadpo.model.flop import AdapterWork, Work
from megadpo.model.shape import head_work
from megadpo.parallel.layout import Layout
from megadpo.planning.hardware import Rates
from megadpo.planning.plan import Plan, parameters
from megadpo.planning.step_time import PRODUCTS, layer_seconds, predict
from megadpo.planning.workload import Workload, assumed_groups
from tools.prediction_table import PART, render

SHAPES = {name: shape_of(config) for name, config in MODELS.items()}


def test_one_card_is_predicted_within_a_tenth_of_what_was_measured() -> None:
    cards = one_card(Rates())
    assert [(card[0].plan.recompute, card[1:]) for card in cards[:2]] == [("none", (1.237, 67.0)), ("small", (1.252, 51.6))]
    for step, seconds, gib in cards:
        assert step.seconds == pytest.approx(seconds, rel=0.1)
        assert step.gib == pytest.approx(gib, rel=0.1)
    assert cards[0][0].mfu == pytest.approx(0.48, abs=0.02)


def test_its_parts_are_those_of_the_profile() -> None:
    """Milliseconds of a step's kernels (benchmarks/results.md): norms, SwiGLU, rope 125, adds 28, copies and the other
    elementwise ones 48, gathered keys 21, head 16, optimizer 26."""
    step, _, _ = one_card(Rates())[0]
    measured = {"matrix products": 0.769, "attention": 0.122, "memory-bound kernels": 0.264, "launches and the rest": 0.082}
    assert step.seconds_by.keys() == measured.keys(), "one card has no messages, bubbles or imbalance"
    for name, seconds in measured.items():
        assert step.seconds_by[name] == pytest.approx(seconds, rel=0.15), name


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=4, sequence=True, pipeline=4), Layout(pipeline=2, virtual=2)])
@pytest.mark.parametrize("name", ["1.7B", "8B", "70B"])
def test_a_rank_s_parameters_are_those_of_megadpo_plan(name: str, layout: Layout) -> None:
    shape = SHAPES[name]
    plan = Plan(shape, layout, 64)
    counted = max(sum(parameters(plan, stage)) for stage in range(layout.pipeline))
    assert counted == pytest.approx(most_parameters(layout, shape), rel=1e-12)


def test_experts_are_cut_over_their_ranks() -> None:
    dense, experts = parameters(Plan(SHAPES["235B-A22B"], Layout(), 64), 0)
    assert dense + experts == pytest.approx(235.1e9, rel=1e-3)
    cut = Layout(tensor=2, sequence=True, data=8, expert=16)
    assert parameters(Plan(SHAPES["235B-A22B"], cut, 64), 0)[1] == experts / 16


@pytest.mark.parametrize("name", ["8B", "235B-A22B"])
def test_adapters_take_a_layer_the_products_that_a_token_has_with_them(name: str) -> None:
    shape, tokens = SHAPES[name], 4096.0
    mix, rates = workload_of(shape).mix, Rates()

    def products(options: AdapterConfig | None) -> float:
        adapter = None if options is None else resolve(options, shape)
        forward, _ = layer_seconds(Plan(shape, Layout(), 64, adapter=adapter), mix, rates, tokens)
        return forward[PRODUCTS]

    low_rank = AdapterConfig(kind="lora", rank=16)
    numbers = AdapterWork.of(shape, resolve(low_rank, shape)).body
    expected = 2 * numbers / shape.num_layers * tokens / rates.product_rate(tokens)
    assert products(low_rank) - products(None) == pytest.approx(expected, rel=1e-6)
    saved = dataclasses.replace(low_rank, modules_to_save=["embed_tokens", "lm_head"])
    assert products(saved) == products(low_rank), "these are no part of a layer"


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_step_s_useful_work_is_counted_as_in_a_run(has_adapter: bool) -> None:
    shape, rates, store = SHAPES["1.7B"], Rates(), GroupStore.of(assumed_groups(110, 230, None))
    adapter = resolve(AdapterConfig(kind="lora"), shape) if has_adapter else None
    workload = Workload.of(store, shape.hidden_size, head_work(shape), "assumed")
    step = predict(Plan(shape, Layout(), len(store), adapter=adapter), workload, rates)
    of_run = Work.of(store, shape).step(shape, shape, np.arange(len(store)), adapter and AdapterWork.of(shape, adapter))
    assert step.mfu * step.seconds * rates.peak == pytest.approx(of_run)


PLANS = {
    "tensor, pipeline, data over nodes": Plan(SHAPES["70B"], Layout(tensor=4, sequence=True, pipeline=4, data=8), 512),
    "chunks of stages, recomputed": Plan(SHAPES["70B"], Layout(pipeline=4, virtual=5, data=4), 512, "full"),
    "ulysses": Plan(SHAPES["8B"], Layout(context=4, data=8), 512, "small"),
    "keys to all": Plan(SHAPES["8B"], Layout(context=4, context_method="allgather", data=8), 512, "small"),
    "experts": Plan(SHAPES["235B-A22B"], Layout(tensor=2, sequence=True, pipeline=8, data=16, expert=32), 1024),
}


@pytest.mark.parametrize("name", PLANS)
def test_more_communication_never_makes_a_step_faster(name: str) -> None:
    plan, rates = PLANS[name], Rates()
    mix = workload_of(plan.shape)
    usual = predict(plan, mix, rates).seconds
    slower = [
        predict(plan, mix, dataclasses.replace(rates, **change)).seconds
        for change in ({"nvlink": 33e9}, {"network": 4e9}, {"latency": 2e-3}, {"hidden": 0.0}, {"hidden": 0.4})
    ]
    assert all(seconds >= usual for seconds in slower) and max(slower) > usual
    none = predict(plan, mix, dataclasses.replace(rates, nvlink=1e18, network=1e18, latency=0.0))
    assert none.seconds < usual
    # What is left of messages: nothing.
    assert sum(seconds for part, seconds in none.seconds_by.items() if "messages" in part) < 1e-6 * none.seconds


def test_the_best_layout_of_a_slower_network_is_no_faster_and_all_fits() -> None:
    best = [best_step(SHAPES["8B"], 16, 256, Rates(network=network)) for network in (40e9, 10e9, 1e9)]
    seconds = [step.seconds for step in best if step is not None]
    assert len(seconds) == 3 and seconds == sorted(seconds)
    assert all(step is not None and step.gib <= Rates().gib for step in best)


def test_what_does_not_fit_is_not_planned() -> None:
    assert best_step(SHAPES["70B"], 8, 256, Rates()) is None


@pytest.mark.slow
def test_the_page_has_the_lines_that_the_command_prints_for_some_of_its_models_and_sizes() -> None:
    printed = set(render("--models", "8B", "70B", "--gpus", "8", "128").splitlines())
    assert printed - {""} <= set(PART.written().splitlines()), "run: python -m tools.prediction_table --write"
    assert len([line for line in printed if line.startswith(("| 8B |", "| 70B |"))]) >= 6


@pytest.mark.exhaustive
def test_the_page_has_what_the_command_prints() -> None:
    assert PART.written() == render(), "run: python -m tools.prediction_table --write"
