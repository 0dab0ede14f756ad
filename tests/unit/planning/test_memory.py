"""Memory as it is reckoned: hand-computed values, the page's table, and what runs are measured to hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import MODELS
from megadpo.config.schema import AdapterConfig
from megadpo.model.adapters.spec import adapter_shapes, resolve
from megadpo.model.families import shape_of
from megadpo.model.four_bit.weight import FourBit
from megadpo.parallel.layout import Layout
from megadpo.planning.memory import (
    ATTENTION,
    HEAD,
    MLP,
    STREAM,
    TILE,
    WORKING,
    between_steps,
    kept_by_kind,
    layer_works_with,
    rank_memory,
    tile_bytes,
)
from megadpo.planning.plan import Plan, adapter_numbers, parameters
from megadpo.planning.search import plan_of
from megadpo.planning.workload import MicroBatches, Mix
from megadpo.validation.load import load_config
from tests.helpers.marks import all_but_the_first_slow
from tests.unit.planning.measured import CASES, Case, measured, reckoned, save_files
from tools.plan_table import COLUMNS, PART

SMALL = shape_of(
    {
        **MODELS["1.7B"],
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "vocab_size": 10,
        "tie_word_embeddings": False,
    }
)
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8 + 2 * 2
"""Query, key and value, output, gate with up and down, norms of the stream, norms of heads."""
MIX = Mix(pair=100, scored=0.5, attended=30, keys=1.5)
ONE = MicroBatches(1, 1.0, (100,))


def test_a_rank_s_parameters_are_those_of_its_layers_and_ends() -> None:
    assert parameters(Plan(SMALL, Layout(), 1), 0) == (4 * LAYER + 2 * 10 * 8 + 8, 0)
    plan = Plan(SMALL, Layout(tensor=2, pipeline=2, sequence=True), 1)
    cut = (LAYER - 16 - 4) / 2 + 16 + 4
    assert parameters(plan, 0) == (2 * cut + 5 * 8, 0) and parameters(plan, 1) == (2 * cut + 5 * 8 + 8, 0)


def test_an_adapter_s_numbers_are_those_of_its_tensors_and_inputs_or_outputs_are_cut() -> None:
    adapter = resolve(AdapterConfig(kind="lora", rank=3), SMALL)
    whole = sum(size[0] * size[1] for size in adapter_shapes(SMALL, adapter).values())
    assert adapter_numbers(Plan(SMALL, Layout(), 1, adapter=adapter), 0)[0] == pytest.approx(whole)
    cut = adapter_numbers(Plan(SMALL, Layout(tensor=2, sequence=True), 1, adapter=adapter), 0)[0]
    # Of q, k, v, gate and up the input's side is whole, of o and down the output's.
    of_layer = 3 * (3 * 8 + (8 + 4 + 4) / 2 + 2 * 8 + 2 * 12 / 2 + 8 + 8 / 2 + 8 + 12 / 2)
    assert cut == pytest.approx(4 * of_layer)


def test_adapters_of_embedding_and_head_are_of_the_ends_and_their_vocabulary_is_cut() -> None:
    adapter = resolve(AdapterConfig(kind="lora", rank=3, target_modules=["embed_tokens", "lm_head"]), SMALL)
    whole = sum(size[0] * size[1] for size in adapter_shapes(SMALL, adapter).values())
    assert adapter_numbers(Plan(SMALL, Layout(), 1, adapter=adapter), 0) == (whole, 0, 0)
    plan = Plan(SMALL, Layout(tensor=2, pipeline=2, sequence=True), 1, adapter=adapter)
    assert [adapter_numbers(plan, stage)[0] for stage in (0, 1)] == [3 * (10 / 2 + 8)] * 2


P = 4 * LAYER + 168
STATES = [
    # what differs, weights, gradients, optimizer, of N = 2 replicas: bytes over P
    ({}, 2, 4, 12 / 2),
    ({"gradient_bytes": 2, "moment_bytes": 2}, 2, 2, 8 / 2),
    ({"number_bytes": 4}, 4, 4, 8 / 2),
    ({"engine": "deepspeed", "zero_stage": 2}, 2, 0, 12 / 2),
    ({"engine": "deepspeed", "zero_stage": 0, "number_bytes": 4}, 4, 4, 8),
    ({"num_moments": 1.0}, 2, 4, 8 / 2),
    ({"num_moments": 0.0, "engine": "deepspeed", "zero_stage": 1}, 2, 0, 4 / 2),
    ({"trained_share": 0.5}, 2, 2, 6 / 2),
]


@pytest.mark.parametrize(("options", "weights", "gradients", "optimizer"), STATES)
def test_states_of_the_engines(options: dict[str, Any], weights: float, gradients: float, optimizer: float) -> None:
    kinds, host = between_steps(Plan(SMALL, Layout(data=2), 2, **options), 0)
    expected = {"weights": weights, "reference": weights, "gradients": gradients, "optimizer": optimizer}
    assert {kind: size / P for kind, size in kinds.items()} == {kind: each for kind, each in expected.items() if each}
    assert not host


def test_offload_moves_moments_to_the_host_but_for_three_buffers() -> None:
    kinds, host = between_steps(Plan(SMALL, Layout(), 1, offload="cpu"), 0)
    assert host == {"optimizer": 8 * P} and kinds["optimizer"] == 4 * P + 3 * 32 * 2**20
    kinds, host = between_steps(Plan(SMALL, Layout(), 1, engine="deepspeed", zero_stage=3, offload="cpu"), 0)
    assert set(host) == {"optimizer", "weights", "reference"} and not kinds.get("weights")


def test_frozen_weights_have_no_gradients_and_a_precomputed_reference_no_weights() -> None:
    adapter = resolve(AdapterConfig(kind="lora", rank=1), SMALL)
    kinds, _ = between_steps(Plan(SMALL, Layout(), 1, adapter=adapter, reference="adapter"), 0)
    assert kinds["weights"] == 2 * P and kinds["gradients"] == 2 * kinds["adapters"] and "reference" not in kinds
    assert "reference" not in between_steps(Plan(SMALL, Layout(), 1, reference="precomputed"), 0)[0]


def test_frozen_linear_layers_in_four_bits_take_half_a_byte_a_weight_and_their_scales() -> None:
    adapter, four_bit = resolve(AdapterConfig(kind="lora", rank=1), SMALL), FourBit(64, double=False)
    plan = Plan(SMALL, Layout(), 1, adapter=adapter, reference="adapter", four_bit=four_bit)
    linear = 4 * (LAYER - 2 * 8 - 2 * 2)  # all but norms
    kinds, _ = between_steps(plan, 0)
    assert kinds["weights"] == 2 * (P - linear) + linear / 2 + 4 * linear / 64
    passes = layer_works_with(plan, MIX, False, backward=True)
    assert passes[1] == 2 * 8 * 2 * 12, "gate and up, dense for their product"
    assert between_steps(replace(plan, reference="before"), 0)[0]["reference"] == kinds["weights"]


def test_a_cached_reference_takes_a_resident_one_s_memory_and_a_precomputed_one_s_time() -> None:
    cached, resident, precomputed = (Plan(SMALL, Layout(), 1, reference=how) for how in ("cached", "before", "precomputed"))
    assert between_steps(cached, 0) == between_steps(resident, 0) and cached.num_forwards == precomputed.num_forwards == 1
    assert rank_memory(cached, MIX, ONE, 0).reference == rank_memory(resident, MIX, ONE, 0).reference > 0
    assert "reference" not in between_steps(replace(cached, reference="cached_adapter"), 0)[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "before"),
        (["reference.mode=cached"], "cached"),
        (["reference.mode=cached", "adapter.kind=lora"], "cached_adapter"),
        (["reference.mode=cached", "adapter.kind=lora", "reference.path=other"], "cached"),
        (["reference.mode=precomputed"], "precomputed"),
        (["adapter.kind=lora"], "adapter"),
        (["objective.loss_type=simpo"], "none"),
    ],
)
def test_a_configuration_s_reference_is_planned_as_it_is_run(options: list[str], expected: str) -> None:
    config = load_config({"model": {"path": "model"}}, options)
    adapter = None if config.adapter.kind == "none" else resolve(config.adapter, SMALL)
    assert plan_of(config, SMALL, 1, adapter).reference == expected


def test_a_configuration_s_quantisation_is_planned() -> None:
    config = load_config({"model": {"path": "model"}}, ["model.quantization=nf4", "adapter.kind=lora"])
    assert plan_of(config, SMALL, 1, resolve(config.adapter, SMALL)).four_bit == FourBit(64, double=True)


def test_a_layer_keeps_what_the_table_of_parallelism_md_says() -> None:
    h, f, q, k, heads, groups = 8, 12, 8, 4, 4, 2
    floats = 4 * (2 + heads + heads + groups)

    def kept(recompute: str, **options: Any) -> dict[str, float]:
        return dict(kept_by_kind(Plan(SMALL, Layout(), 1, **options), MIX, False, recompute, 10))

    # Keys and values are copied 1.5 times and repeated for q / k heads, in place of k.
    copied = 2 * 1.5 * q
    assert kept("none") == {STREAM: 20 * 4 * h, ATTENTION: 20 * (3 * q + 2 * k + copied) + 10 * floats, MLP: 20 * 3 * f}
    assert kept("small") == {STREAM: 20 * 2 * h, ATTENTION: 20 * (2 * q + 2 * k) + 10 * floats, MLP: 20 * 2 * f}
    assert kept("full") == {STREAM: 20 * h}
    on_cpu = kept("none", on_cpu=True, number_bytes=4)
    assert on_cpu[ATTENTION] == 40 * (4 * q + 3 * k + 4 * 2) + 10 * floats
    assert kept("small", on_cpu=True, number_bytes=4)[ATTENTION] == 40 * (3 * q + 3 * k + 4 * 2) + 10 * floats


def test_tensor_ranks_share_it_and_sequence_parallelism_the_rest() -> None:
    whole = kept_by_kind(Plan(SMALL, Layout(), 1), MIX, False, "none", 10)
    cut = kept_by_kind(Plan(SMALL, Layout(tensor=2, sequence=True), 1), MIX, False, "none", 10)
    assert cut[MLP] == whole[MLP] / 2 and cut[STREAM] == whole[STREAM] / 2
    assert kept_by_kind(Plan(SMALL, Layout(tensor=2), 1), MIX, False, "none", 10)[STREAM] == whole[STREAM]


def test_a_tile_is_all_logits_or_a_forty_eighth_of_a_card() -> None:
    shape = shape_of(MODELS["1.7B"])
    row = 151_936 * 2
    assert tile_bytes(Plan(shape, Layout(), 1), 1000) == 1000 * row
    assert tile_bytes(Plan(shape, Layout(), 1), 10_000) == 80e9 / 48 // row * row
    assert tile_bytes(Plan(shape, Layout(tensor=2), 1), 1000) == 1000 * row / 2


def test_a_stage_keeps_as_many_micro_batches_as_its_schedule_has_under_way() -> None:
    plan, many = Plan(SMALL, Layout(pipeline=2), 8), MicroBatches(4, 1.0, (100, 60, 80, 90))
    first, last = (rank_memory(plan, MIX, many, stage).gradients for stage in (0, 1))
    # The first stage has two under way; the most that two after each other have is 170 tokens.
    assert first[MLP] == pytest.approx(2 * 170 * 2 * 3 * 12) and last[MLP] == pytest.approx(2 * 100 * 2 * 3 * 12)
    assert TILE not in first and (TILE in last or WORKING in last)


def test_the_fullest_moment_counts_once() -> None:
    memory = rank_memory(Plan(SMALL, Layout(), 1), MIX, ONE, 0)
    assert memory.peak == pytest.approx(sum(memory.between.values()) + sum(memory.gradients.values()))
    assert (HEAD in memory.gradients) != (WORKING in memory.gradients)
    full = rank_memory(Plan(SMALL, Layout(), 1, gradient_bytes=2), MIX, MicroBatches(1, 1.0, (1,)), 0)
    assert full.peak == pytest.approx(sum(full.between.values()) + 4 * P), "with few tokens the update's copy is the most"


FEW = (Case(2, {"parallel.pipeline": 2}), Case(2, {"parallel.context": 2}))
"""What is measured in every run of the tests."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("models"))


def check(cases: tuple[Case, ...], files: Path) -> None:
    for case, held in zip(cases, measured(cases, files), strict=True):
        memories = reckoned(case, files)
        peak = max(memory.peak for memory in memories)
        assert peak == pytest.approx(max(one.peak for one in held), rel=0.1), str(case)


@pytest.mark.parametrize("cases", all_but_the_first_slow([FEW, CASES[:3]]), ids=["few", "more"])
def test_the_fullest_rank_holds_what_was_reckoned_within_a_tenth(cases: tuple[Case, ...], files: Path) -> None:
    check(cases, files)


@pytest.mark.exhaustive
def test_and_so_do_those_of_every_case_of_the_table(files: Path) -> None:
    check(CASES, files)


def test_the_page_has_a_line_for_each_case_and_what_is_reckoned_now(files: Path) -> None:
    rows = [row.strip("| ").split(" | ") for row in PART.written().splitlines()[2:]]
    assert len(rows) == len(CASES) >= 12, "run: python -m tools.plan_table --write"
    for case, cells in zip(CASES, rows, strict=True):
        found = dict(zip(COLUMNS, cells, strict=True))
        memory = reckoned(case, files)[int(found["rank"])]
        assert cells[7] == f"{memory.peak / 2**20:.1f}", f"{case}: run: python -m tools.plan_table --write"
        assert abs(float(found["reckoned / measured"]) - 1) <= 0.1, str(case)
