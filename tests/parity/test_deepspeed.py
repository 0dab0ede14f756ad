"""The DeepSpeed engine: every ZeRO stage in every layout gives what one process under Megatron's engine gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zero_memory import formula
from megadpo.errors import UserError
from megadpo.parallel.layout import Layout
from megadpo.validation.deepspeed import OURS, OURS_IN_ZERO, check_deepspeed_machine, engine_config
from megadpo.validation.load import load_config
from tests.helpers import oracle
from tests.helpers.marks import skip_without
from tests.helpers.models import random_groups, save_model, write_hh
from tests.helpers.runs import assert_same_weights, resumed_and_whole, run_settings, train_run
from tests.helpers.worlds import run_world
from tests.parity.zero_worker import Case, Outcome, outcomes

skip_without("deepspeed")

DATA, TENSOR, SEQUENCE, PIPELINE = Layout(data=2), Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)
CONTEXT = Layout(context=2, context_method="allgather")
FOUR = Layout(tensor=2, pipeline=2, sequence=True), Layout(pipeline=2, data=2), Layout(tensor=2, data=2, sequence=True)
UNTIED = {
    1: [(Layout(), stage) for stage in (0, 3)],
    2: [
        *((DATA, stage) for stage in range(4)),
        *((TENSOR, stage) for stage in (1, 3)),
        *((SEQUENCE, stage) for stage in range(4)),
        *((PIPELINE, stage) for stage in range(4)),
        *((CONTEXT, stage) for stage in (1, 2, 3)),
        (Layout(context=2, context_method="ulysses"), 0),
    ],
    4: [
        *((layout, 3) for layout in FOUR),
        (Layout(context=2, context_method="ulysses", tensor=2, sequence=True), 3),
        (Layout(context=2, context_method="allgather", pipeline=2), 1),
        (Layout(context=2, context_method="allgather", data=2), 2),
    ],
}
TIED = {
    1: [(Layout(), 3)],
    2: [*((PIPELINE, stage) for stage in range(4)), (DATA, 3), (SEQUENCE, 2)],
    4: [(layout, stage) for layout in FOUR[:2] for stage in (1, 2, 3)],
}
UNEVEN = {1: [], 4: [(Layout(pipeline=2, data=2, chunk_layers=(2, 1)), stage) for stage in (1, 3)]}
EXPERTS = {
    1: [],
    2: [
        *((Layout(data=2, expert=2), stage) for stage in range(4)),
        *((DATA, stage) for stage in (1, 3)),
        *((Layout(tensor=2, sequence=True, expert=2), stage) for stage in (1, 3)),
    ],
    4: [
        *((Layout(context=2, context_method="allgather", data=2, expert=2), stage) for stage in (0, 2, 3)),
        (Layout(pipeline=2, data=2, expert=2), 2),
    ],
}
SHARED = {
    1: [],
    2: [
        *((Layout(data=2, expert=2), stage) for stage in range(4)),
        (Layout(tensor=2, sequence=True, expert=2), 3),
        (PIPELINE, 1),
    ],
}
SCALED = {1: [], 2: [(Layout(data=2, expert=2), 1), (Layout(data=2, expert=2), 3), (PIPELINE, 3)]}
LINEAR = {1: [], 2: [(DATA, 2), (Layout(tensor=2, sequence=True, expert=2), 3), (PIPELINE, 1)]}
CELLS = {
    "untied": (2, UNTIED),
    "tied": (2, TIED),
    "uneven": (3, UNEVEN),
    "experts": (2, EXPERTS),
    "shared experts": (2, SHARED),
    "scaled inputs": (2, SCALED),
    "linear attention": (2, LINEAR),
}
"""The model's layers, and by number of processes what is tried on it."""
OFTEN = {
    "untied": {
        1: [(Layout(), 3)],
        2: [(DATA, 0), (DATA, 2), (SEQUENCE, 3), (PIPELINE, 1), (CONTEXT, 3)],
        4: [(FOUR[0], 3)],
    },
    "tied": {1: [], 2: [(PIPELINE, stage) for stage in (0, 1, 2)], 4: [(FOUR[1], 3)]},
    "uneven": {1: [], 4: UNEVEN[4][1:]},
    "experts": {
        1: [],
        2: [(Layout(data=2, expert=2), 0), (Layout(data=2, expert=2), 3), (Layout(tensor=2, sequence=True, expert=2), 1)],
        4: [(Layout(pipeline=2, data=2, expert=2), 2)],
    },
}
"""Of these, what is tried each time: every stage, and every kind of layout, of each model."""
RECOMPUTED = [(DATA, 1, "full"), (DATA, 2, "full"), (DATA, 3, "full"), (PIPELINE, 3, "selective")]
NVME = {
    2: [(DATA, "full"), (PIPELINE, "none"), (SEQUENCE, "none"), (DATA, "none")],
    4: [(Layout(pipeline=2, data=2), "none")],
}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "tokenizer": False}
OFFLOADED = [(DATA, 1), (DATA, 2), (DATA, 3), (SEQUENCE, 3), (PIPELINE, 3)]
OFFLOADED_OFTEN = {"AdamW": [(DATA, 1), (PIPELINE, 3)], "DeepSpeedCPUAdam": [(DATA, 2), (SEQUENCE, 3)]}


def _small_pieces(directory: Path) -> str:
    """A user's JSON under which these models are in many sub-groups and buckets, and no parameter stays whole."""
    path = directory / "deepspeed.json"
    zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20000, "reduce_bucket_size": 30000}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def _difference_of_updates(a: Outcome, b: Outcome, before: dict[str, torch.Tensor]) -> float:
    apart = torch.stack([(a.weights[name].double() - b.weights[name].double()).norm() for name in before]).norm()
    moved = torch.stack([(b.weights[name].double() - before[name].double()).norm() for name in before]).norm()
    return float((apart / moved).detach())


OF_MIXTURES = {
    "experts": "qwen3_moe",
    "shared experts": "glm4_moe",
    "scaled inputs": "llama4_text",
    "linear attention": "qwen3_next",
}


@pytest.fixture(
    scope="module",
    params=[
        *((name, True) for name in OFTEN),
        *(pytest.param((name, False), marks=pytest.mark.exhaustive) for name in CELLS),
    ],
    ids=lambda param: f"{param[0]}, often" if param[1] else param[0],
)
def trained(request, tmp_path_factory):
    """One process under Megatron's engine, and every cell: three steps, clipped, on the same global batch."""
    directory = tmp_path_factory.mktemp("zero")
    name, is_often = request.param
    num_layers, chosen = CELLS[name][0], OFTEN[name] if is_often else CELLS[name][1]
    changes = {"tie_word_embeddings": name == "tied", "num_key_value_heads": 4, "num_hidden_layers": num_layers}
    family = OF_MIXTURES.get(name, "qwen3")
    policy = save_model(directory / "policy", family, tokenizer=False, **changes)
    reference = save_model(directory / "reference", family, seed=1, tokenizer=False, **changes)
    groups, json_file = random_groups(9, seed=3), _small_pieces(directory)
    loaded = oracle.load(policy)
    before = {name: x.clone() for name, x in oracle.in_files(dict(loaded.named_parameters()), loaded.config).items()}
    cells = {
        size: [Case(layout, stage, deepspeed_config=json_file) for layout, stage in some] for size, some in chosen.items()
    }
    if request.param == ("untied", False):
        cells[2] += [Case(layout, stage, recompute=how) for layout, stage, how in RECOMPUTED]
    cells[1].insert(0, Case(Layout()))
    found = [
        pair
        for size, cases in cells.items()
        for pair in zip(cases, run_world(size, outcomes, policy, reference, groups, cases)[0], strict=True)
    ]
    return before, found[0][1], found[1:]


@pytest.mark.slow
def test_loss_gradients_and_norm_are_those_of_megatrons_engine(trained):
    _, base, found = trained
    assert base.grad_norm > 1, "nothing would be clipped"
    for case, outcome in found:
        oracle.assert_same_step(case, outcome, base)


@pytest.mark.slow
def test_weights_after_three_clipped_steps_are_too(trained):
    before, base, found = trained
    for case, outcome in found:
        assert _difference_of_updates(outcome, base, before) <= 1e-4, str(case)


ZERO = {2: (DATA, SEQUENCE, PIPELINE), 4: FOUR[:2]}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_sharded_reference_equal_to_the_policy_gives_margins_of_exactly_zero(tmp_path, size):
    policy, groups, json_file = save_model(tmp_path / "policy", **SMALL), random_groups(8), _small_pieces(tmp_path)
    dtypes = torch.float32, torch.bfloat16
    cases = [Case(layout, 3, deepspeed_config=json_file, dtype=dtype) for layout in ZERO[size] for dtype in dtypes]
    for case, outcome in zip(cases, run_world(size, outcomes, policy, policy, groups, cases, 1)[0], strict=True):
        assert len(outcome.margins) >= 8 and not outcome.margins.any(), str(case)


@pytest.mark.slow
def test_the_scalar_head_counts_once_wherever_it_is(tmp_path):
    policy, groups = save_model(tmp_path / "policy", pad_token_id=1, **SMALL), random_groups(8)
    (base,) = run_world(1, outcomes, policy, policy, groups, [Case(Layout(), objective="reward")], 1)[0]
    cases = [Case(layout, stage, objective="reward") for layout in (SEQUENCE, PIPELINE, DATA) for stage in (1, 3)]
    for case, outcome in zip(cases, run_world(2, outcomes, policy, policy, groups, cases, 1)[0], strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)


@pytest.mark.slow
def test_in_bf16_gradients_are_added_up_in_fp32_and_small_updates_are_kept(tmp_path):
    policy = save_model(tmp_path / "policy", **SMALL)
    reference = save_model(tmp_path / "reference", seed=1, **SMALL)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    cases = [Case(DATA, stage, tokens_per_micro_batch=90, dtype=torch.bfloat16) for stage in (None, 1, 2, 3)]
    base, *rest = run_world(2, outcomes, policy, reference, random_groups(12), cases)[0]
    for case, outcome in zip(cases[1:], rest, strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert _difference_of_updates(outcome, base, before) <= 1e-4, str(case)


@pytest.mark.parametrize("often", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["often", "all"])
@pytest.mark.parametrize("optimizer", OFFLOADED_OFTEN)
@pytest.mark.slow
def test_offload_to_the_cpu_changes_nothing(tmp_path, optimizer, often):
    """DeepSpeedCPUAdam is compiled at its first use, which takes minutes."""
    policy = save_model(tmp_path / "policy", **SMALL)
    reference = save_model(tmp_path / "reference", seed=1, **SMALL)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    cpu_adam, chosen = optimizer == "DeepSpeedCPUAdam", OFFLOADED_OFTEN[optimizer] if often else OFFLOADED
    cases = [Case(layout, stage, offload="cpu", cpu_adam=cpu_adam) for layout, stage in chosen]
    (base,) = run_world(1, outcomes, policy, reference, random_groups(7), [Case(Layout())])[0]
    found = run_world(2, outcomes, policy, reference, random_groups(7), cases)[0]
    for case, outcome in zip(cases, found, strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(base.grad_norm, rel=1e-5), str(case)
        assert _difference_of_updates(outcome, base, before) <= 1e-4, str(case)
        assert ("DeepSpeedCPUAdam" in outcome.optimizer) is cpu_adam, "the choice is told"


@pytest.fixture
def async_io() -> None:
    """Asynchronous operations on files, compiled once; skipped where libaio or a compiler is missing."""
    from megadpo.engine.deepspeed.offload import can_swap_to_nvme, cpu_adam, require_async_io

    if not can_swap_to_nvme():
        pytest.skip("DeepSpeed's async_io does not build here: install libaio-dev and a C++ compiler")
    require_async_io()
    cpu_adam()  # before any rank's time-out runs


LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
"""Models of which some parameters and sub-groups are worth a file (1 MiB), and some stay in memory."""


def _no_parameter_stays_whole(directory: Path) -> str:
    path = directory / "deepspeed.json"
    zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 600_000, "stage3_max_reuse_distance": 0}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("num_processes", "num_cases"),
    [(2, 2), *(pytest.param(size, len(cases), marks=pytest.mark.exhaustive) for size, cases in NVME.items())],
)
def test_offload_to_files_changes_nothing(tmp_path, async_io, num_processes, num_cases):
    policy = save_model(tmp_path / "policy", tokenizer=False, **LARGE)
    reference = save_model(tmp_path / "reference", seed=1, tokenizer=False, **LARGE)
    before = {name: tensor.clone() for name, tensor in oracle.load(policy).named_parameters()}
    (base,) = run_world(1, outcomes, policy, reference, random_groups(7), [Case(Layout())])[0]
    json_file = _no_parameter_stays_whole(tmp_path)
    cases = [
        Case(layout, 3, recompute=how, offload="nvme", offload_dir=str(tmp_path / f"{n}"), deepspeed_config=json_file)
        for n, (layout, how) in enumerate(NVME[num_processes][:num_cases])
    ]
    found = run_world(num_processes, outcomes, policy, reference, random_groups(7), cases)[0]
    for case, outcome in zip(cases, found, strict=True):
        assert min(outcome.num_files.values()) > 1, f"{case}: {outcome.num_files}"
        oracle.assert_same_step(case, outcome, base)
        assert _difference_of_updates(outcome, base, before) <= 1e-4, str(case)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "qwen3", tie_word_embeddings=True, num_hidden_layers=2)
    write_hh(directory / "train.jsonl", 60)
    return directory


def _settings(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    own = {"train": {"steps": 4, "warmup_steps": 0}, "checkpoint": {"every": 2, "keep": 1}}
    return run_settings(files, output_dir, **own | changes)


@pytest.mark.parametrize(
    ("parallel", "dtype", "moving"),
    [
        ({"zero_stage": 3}, "fp32", True),
        ({"zero_stage": 1, "offload": "cpu"}, "fp32", False),
        pytest.param({"zero_stage": 3, "pipeline": 2}, "bf16", False, marks=pytest.mark.exhaustive),  # below, with files
        pytest.param({"zero_stage": 2}, "bf16", False, marks=pytest.mark.exhaustive),
        pytest.param({"zero_stage": 0, "tensor": 2}, "fp32", False, marks=pytest.mark.exhaustive),
    ],
    ids=[
        "ZeRO-3 with a moving reference",
        "ZeRO-1 with offload",
        "ZeRO-3 x pipeline 2 in bf16",
        "ZeRO-2 in bf16",
        "ZeRO-0 x tensor 2",
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files, tmp_path, parallel, dtype, moving):
    def settings(name: str) -> dict[str, Any]:
        reference = {"sync_every": 1, "mixup_alpha": 0.5} if moving else {}
        parallel_section = {"engine": "deepspeed", **parallel}
        return _settings(files, tmp_path / name, parallel=parallel_section, model={"dtype": dtype}, reference=reference)

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert resumed == whole and [record["step"] for record in resumed] == [1, 2, 3, 4]
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("bf16", {"pipeline": 2}), pytest.param("fp32", {}, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_a_resumed_run_with_offload_to_files_is_bit_for_bit_one_in_memory(files, tmp_path, async_io, dtype, layout):
    model, json_file = save_model(tmp_path / "model", **LARGE), _no_parameter_stays_whole(tmp_path)

    def settings(name: str, **offload: str) -> dict[str, Any]:
        options = {"engine": "deepspeed", "zero_stage": 3, "deepspeed_config": json_file, **layout, **offload}
        # Few pairs: a processor that does not multiply bf16 itself takes minutes for many in models as wide as these.
        own = {"train": {"steps": 2, "warmup_steps": 0, "pairs_per_step": 2}, "checkpoint": {"every": 1, "keep": 1}}
        own["data"] = {"max_length": 32}
        return _settings(files, tmp_path / name, parallel=options, model={"path": str(model), "dtype": dtype}, **own)

    def to_files(name: str) -> dict[str, Any]:
        return settings(name, offload="nvme", offload_dir=str(tmp_path / "nvme"))

    whole = run_world(2, train_run, settings("whole", offload="cpu"))[0]
    run_world(2, train_run, to_files("broken"), 1)
    assert run_world(2, train_run, to_files("broken"))[0] == whole, "the same optimizer, in memory and never broken off"
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_with_a_moving_reference_goes_on_under_the_other_engine(files, tmp_path):
    def settings(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
        moving = {"sync_every": 1, "mixup_alpha": 0.5}
        return _settings(files, tmp_path / name, parallel=parallel, reference=moving)

    zero = {"engine": "deepspeed", "zero_stage": 3}
    whole = run_world(1, train_run, settings("whole", {}))[0]
    for name, first, second in (("from", zero, {"pipeline": 2}), ("to", {"tensor": 2}, zero | {"pipeline": 2})):
        run_world(2, train_run, settings(name, first), 3)
        moved = run_world(2, train_run, settings(name, second))[0]
        for a, b in zip(moved, whole, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("key", [*OURS, *(f"zero_optimization.{key}" for key in OURS_IN_ZERO)])
def test_a_json_file_that_sets_what_an_option_of_ours_sets_is_refused_by_name(tmp_path, key):
    section, _, inner = key.partition(".")
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({section: {inner: 1}} if inner else {key: 1}))
    with pytest.raises(UserError, match=rf"deepspeed.json sets {key}, but .*; remove it from the file"):
        load_config({"parallel": {"engine": "deepspeed", "deepspeed_config": str(path)}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"zero_optimization": true}', "zero_optimization must be an object"),
        ('{"zero_optimization": {"reduce_scatter": false}}', "only True is exact"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_json_file_that_makes_no_sense_is_refused(tmp_path, text, sentence):
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_config({"parallel": {"engine": "deepspeed", "deepspeed_config": str(path)}})


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        ({"zero_stage": 3}, "set parallel.engine to deepspeed"),
        ({"offload": "nvme"}, "set parallel.engine to deepspeed"),
        ({"engine": "deepspeed", "zero_stage": 4}, "must be 0, 1, 2 or 3"),
        ({"engine": "deepspeed", "zero_stage": 0, "offload": "cpu"}, "shards nothing"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload": "nvme", "offload_dir": "/x"}, "needs ZeRO stage 3"),
        ({"engine": "deepspeed", "zero_stage": 3, "offload": "nvme"}, "nvme needs a directory"),
        ({"engine": "deepspeed", "zero_stage": 3, "offload_dir": "/x"}, "nothing else reads one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(parallel, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config({"parallel": parallel})


def test_without_the_package_or_a_directory_to_write_the_machine_is_refused(tmp_path, monkeypatch):
    def parallel(**options: Any) -> Any:
        return load_config({"parallel": {"engine": "deepspeed", **options}}).parallel

    (tmp_path / "file").touch()
    nvme = parallel(zero_stage=3, offload="nvme", offload_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"offload_dir: .* cannot be made: Not a directory"):
        check_deepspeed_machine(nvme, torch.float32)
    with pytest.raises(UserError, match="no fp32 master weights"):
        check_deepspeed_machine(parallel(zero_stage=0), torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package deepspeed is not installed; install it \(pip install deepspeed;"):
        check_deepspeed_machine(parallel(), torch.float32)


def test_a_users_json_is_joined_with_ours(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": True}}))
    options = {"engine": "deepspeed", "zero_stage": 2, "deepspeed_config": str(path)}
    config = engine_config(load_config({"parallel": options}).parallel, torch.bfloat16, 1000, ds_cpu_adam=False)
    assert config["wall_clock_breakdown"] and config["zero_optimization"]["overlap_comm"]
    assert config["zero_optimization"]["stage"] == 2 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["reduce_bucket_size"] == 52, "small for a small model, and even"
    assert config["gradient_accumulation_steps"] == 1 and config["gradient_allreduce_op"] == "sum"


def _bytes_by_stage(model: Path, json_file: str) -> tuple[int, dict[int, int]]:
    import torch.distributed as dist

    from benchmarks.zero_memory import bytes_by_stage

    dist.init_process_group("gloo")
    return bytes_by_stage(model, random_groups(8), json_file)


@pytest.mark.slow
def test_what_a_rank_holds_follows_the_formula(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = save_model(tmp_path / "model", tokenizer=False, **sizes)
    path = tmp_path / "deepspeed.json"
    # Nothing stays gathered because it is small or soon used again.
    keep = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    path.write_text(json.dumps({"zero_optimization": dict.fromkeys(keep, 0)}))
    for num_parameters, found in run_world(4, _bytes_by_stage, model, str(path)):
        for stage, size in found.items():
            assert size == pytest.approx(formula(stage, num_parameters, 4), rel=0.1), (stage, found)
        assert found[3] <= found[0] * 1.1 / 4
