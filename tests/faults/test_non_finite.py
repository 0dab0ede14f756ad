"""Numbers that are not finite: found where they began, learned from never, published never."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.errors import UserError
from tests.helpers.marks import all_but_a_few_exhaustive
from tests.helpers.models import hh_rows, save_model
from tests.helpers.runs import assert_same_weights, read_metrics, run_settings, save_files, train_run
from tests.helpers.worlds import run_world


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 60, num_hidden_layers=2)


FEW_PAIRS = {"pairs_per_step": 2}
"""A step that costs little, where it does not matter what it learns."""


def told(settings: dict[str, Any]) -> str:
    """The sentence that a run ends with."""
    import megadpo

    try:
        megadpo.train(settings)
    except megadpo.UserError as error:
        return str(error)
    return "it ended well"


def poison_each(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {kind: poisoned(settings, 2, kind) for kind, settings in runs.items()}


def poisoned(settings: dict[str, Any], step: int, what: str) -> str:
    """The same, of a run on this rank whose state is spoilt after a step, if this is rank 1 of several or rank 0 of one."""
    import torch.distributed as dist

    import megadpo
    from megadpo.training import trainer

    original = trainer.training_step

    def spoiling(run: Any, number: int) -> Any:
        record = original(run, number)
        if number + 1 == step and dist.get_rank() == dist.get_world_size() - 1:
            for kind, _, _, values in run.engine.own_state():
                if kind == what:
                    values.view(-1)[3] = float("nan")
                    break
        return record

    trainer.training_step = spoiling
    try:
        megadpo.train(settings)
    except megadpo.UserError as error:
        return str(error)
    finally:
        trainer.training_step = original
    return "it ended well"


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (1, {}),
    (2, {"pipeline": 2}),
    (2, {"tensor": 2}),
    (2, {"engine": "deepspeed", "zero_stage": 2}),
    (2, {"engine": "deepspeed", "zero_stage": 3}),
]


@pytest.mark.parametrize("layout", all_but_a_few_exhaustive(LAYOUTS, slow=[5]), ids=str)
def test_a_poisoned_state_is_never_saved_and_the_tensor_and_its_rank_are_named(
    files: Path, tmp_path: Path, layout: tuple[int, dict[str, Any]]
) -> None:
    num_processes, parallel = layout
    changes: dict[str, Any] = {"parallel": parallel, "train": FEW_PAIRS | {"steps": 2}, "checkpoint": {"every": 1}}
    runs = {kind: run_settings(files, tmp_path / kind, **changes) for kind in ("weights", "exp_avg", "exp_avg_sq")}
    for sentences in run_world(num_processes, poison_each, runs):
        for kind, sentence in sentences.items():
            kept = tmp_path / kind / "checkpoints" / "step_00000001"
            assert sentence.startswith(f"step 2: the {kind} of model."), sentence
            assert f" are not finite on rank {num_processes - 1}, so nothing was written; {kept} is the last" in sentence
            assert [path.name for path in kept.parent.iterdir()] == [kept.name]
            assert not (tmp_path / kind / "hf").exists()


@pytest.mark.slow
def test_a_poisoned_model_is_never_exported(files: Path, tmp_path: Path) -> None:
    settings = run_settings(files, tmp_path / "run", train={"steps": 1, "learning_rate": 3e38, "warmup_steps": 0})
    settings["checkpoint"] = {"at_end": False}  # which would find it first
    (sentence,) = run_world(1, told, settings)
    assert sentence.startswith("the trained model: the weights of model.") and "rank 0, so nothing was written" in sentence
    assert not list((tmp_path / "run").glob("hf*"))


@pytest.mark.slow
def test_a_model_that_is_not_finite_is_named_by_tensor_and_rank(files: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "broken", "llama", num_hidden_layers=2)
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    settings = run_settings(files, tmp_path / "run", model={"path": str(tmp_path / "broken")}, parallel={"pipeline": 2})
    for sentence in run_world(2, told, settings):
        assert "step 1: the gradient norm is nan and the loss is nan; the weights of model.layers.1.mlp." in sentence
        assert "on rank 1, so nothing was updated; lower train.learning_rate, or look for broken weights" in sentence


def rows_with(files: Path, directory: Path, word: str) -> Path:
    """The training rows; row 2 and row 5 are the only ones with a token of their own."""
    # Short ones, of which nothing is cut off.
    rows = sorted(hh_rows(100), key=lambda row: max(map(len, row.values())))[:16]
    for number in (2, 5):
        rows[number] = {key: text + f" {word}" for key, text in rows[number].items()}
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_a_broken_token(directory: Path, word: str) -> Path:
    """A model in which one token, the last one of `word`, has an embedding that is not finite."""
    from transformers import AutoTokenizer

    model = save_model(directory / "broken", "llama", num_hidden_layers=2)
    token = AutoTokenizer.from_pretrained(model)(word, add_special_tokens=False)["input_ids"][0]
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "precomputed", "cached"])
def test_the_rows_are_named_whose_reference_is_not_finite(files: Path, tmp_path: Path, mode: str) -> None:
    data = {"train": str(rows_with(files, tmp_path, "\x07")), "cache_dir": str(tmp_path / "cache")}
    reference = {"mode": mode, "path": str(with_a_broken_token(tmp_path, "\x07"))}
    train = {"steps": 1, "pairs_per_step": 16, "warmup_steps": 0}
    settings = run_settings(files, tmp_path / "run", data=data, reference=reference, train=train)
    (sentence,) = run_world(1, told, settings)
    assert "log-probs of rows 2, 5 (counted from 0 over all files of the data) are not finite" in sentence
    assert not list(tmp_path.rglob("cache/reference/**/*.safetensors"))


SKIPPING: list[tuple[int, str, dict[str, Any]]] = [
    (1, "fp32", {}),
    (2, "bf16", {"overlap": True}),
    (2, "fp32", {"tensor": 2}),
    (2, "fp32", {"pipeline": 2}),
    *((2, "fp32", {"engine": "deepspeed", "zero_stage": stage}) for stage in (0, 1, 2, 3)),
    *((2, "bf16", {"engine": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)),
    (2, "fp32", {"engine": "deepspeed", "zero_stage": 2, "offload": "cpu"}),
    (2, "bf16", {"engine": "deepspeed", "zero_stage": 3, "offload": "cpu"}),
]


def with_spikes(settings: dict[str, Any], at: tuple[int, ...], spoils: bool, stop_after: int | None = None) -> Any:
    """Train; at the steps `at` the gradients of this rank become nan (or huge) before the update."""
    from megadpo.training import step as step_module
    from megadpo.training import trainer

    original, original_step, current = step_module.optimizer_step, trainer.training_step, [0]

    def stepping(run: Any, number: int) -> Any:
        current[0] = number + 1
        return original_step(run, number)

    def spiking(engine: Any, *arguments: Any, **named: Any) -> Any:
        def spoil() -> None:
            if current[0] in at:
                for _, _, _, values in engine.own_gradients():
                    values.mul_(float("nan") if spoils else 1e4)

        return original(engine, *arguments, on_gradients=spoil, **named)

    step_module.optimizer_step, trainer.training_step = spiking, stepping
    try:
        # DeepSpeed's own Adam for CPUs would be compiled first, for minutes.
        with without_cpu_adam(settings):
            return train_run(settings, stop_after)
    finally:
        step_module.optimizer_step, trainer.training_step = original, original_step


def with_spikes_each(runs: list[tuple[Any, ...]]) -> list[Any]:
    """Several runs in the same processes, each by the arguments of `with_spikes`."""
    return [with_spikes(*run) for run in runs]


def without_cpu_adam(settings: dict[str, Any]) -> Any:
    parallel = settings.get("parallel", {})
    if parallel.get("offload") != "cpu" or "deepspeed_config" in parallel:
        return contextlib.nullcontext()
    from megadpo.engine.deepspeed import engine

    return mock.patch.object(engine, "cpu_adam", lambda: None)


def saying(runs: list[dict[str, Any]], at: tuple[int, ...] = ()) -> list[tuple[list[dict[str, float]], str]]:
    """Of each run its metrics, and what it says on stderr, the sentence that it ends with included."""
    found = []
    for settings in runs:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            ended = ""
            try:
                with_spikes(settings, at, False)
            except UserError as error:
                ended = str(error)
        found.append((read_metrics(Path(settings["output_dir"])), said.getvalue() + ended))
    return found


@pytest.mark.parametrize("layout", all_but_a_few_exhaustive(SKIPPING, slow=[1, 7]), ids=str)
def test_a_step_left_out_changes_nothing_and_is_resumed_over(
    files: Path, tmp_path: Path, layout: tuple[int, str, dict[str, Any]]
) -> None:
    """The run that breaks off after the spike and goes on is the uninterrupted one, bit for bit; what the spike was is
    gone; the step after it is not the one of a run that learned nothing else."""

    num_processes, dtype, parallel = layout

    def settings(name: str) -> dict[str, Any]:
        return run_settings(
            files,
            tmp_path / name,
            model={"dtype": dtype},
            parallel=parallel,
            train={"on_spike": "skip", "warmup_steps": 0, "pairs_per_step": 4},
            checkpoint={"every": 1, "keep": 9},
        )

    run_world(num_processes, with_spikes, settings("broken"), (3,), True, 4)
    going_on = [(settings("broken"), (), True), (settings("whole"), (3,), True)]
    resumed, whole = run_world(num_processes, with_spikes_each, going_on)[0]
    assert resumed == whole
    assert [record["num_left_out"] for record in whole] == [0, 0, 1, 1, 1]
    assert whole[2]["grad_norm"] is None and whole[3]["grad_norm"] is not None
    second, third = (load_whole(tmp_path / "whole" / "checkpoints" / f"step_{number:08d}") for number in (2, 3))
    assert second.keys() == third.keys() and all(torch.equal(second[name], third[name]) for name in second)
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step_00000005" / "checkpoint.json").read_text())["state"]
    assert state["spikes"]["num_left_out"] == 1
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_step_left_out_with_offload_to_files_is_the_one_in_memory(files: Path, tmp_path: Path) -> None:
    from megadpo.engine.deepspeed.offload import can_swap_to_nvme, cpu_adam, require_async_io

    if not can_swap_to_nvme():
        pytest.skip("DeepSpeed's async_io does not build here: install libaio-dev and a C++ compiler")
    require_async_io()
    cpu_adam()  # before any rank's time-out runs
    large = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    model, json_file = save_model(tmp_path / "model", **large), tmp_path / "deepspeed.json"
    zero = {"stage3_param_persistence_threshold": 0, "sub_group_size": 600_000, "stage3_max_reuse_distance": 0}
    json_file.write_text(json.dumps({"zero_optimization": zero}))
    found = []
    for name, offload in (("cpu", {}), ("nvme", {"offload_dir": str(tmp_path / "files")})):
        options = {"engine": "deepspeed", "zero_stage": 3, "deepspeed_config": str(json_file), "offload": name, **offload}
        train = {"steps": 3, "warmup_steps": 0, "pairs_per_step": 2, "on_spike": "skip"}
        settings = run_settings(
            files, tmp_path / name, model={"path": str(model)}, parallel=options, train=train, checkpoint={"every": 2}
        )
        found.append(run_world(1, with_spikes, settings, (2,), True)[0])
    assert found[0] == found[1] and [record["num_left_out"] for record in found[1]] == [0, 1, 1]
    assert_same_weights(tmp_path / "cpu", tmp_path / "nvme")


def load_whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a checkpoint's files have."""
    return {key: tensor for file in sorted(checkpoint.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_run_that_can_only_leave_steps_out_ends(files: Path, tmp_path: Path) -> None:
    train = FEW_PAIRS | {"steps": 30, "on_spike": "skip"}
    with pytest.raises(AssertionError, match=r"step 12: .* the last of 10 steps in a row that train.on_spike left out"):
        run_world(1, with_spikes, run_settings(files, tmp_path / "run", train=train), tuple(range(3, 31)), True)
    assert len(read_metrics(tmp_path / "run")) == 11


@pytest.mark.slow
def test_a_norm_far_above_the_last_ones_is_a_spike(files: Path, tmp_path: Path) -> None:
    train = FEW_PAIRS | {"steps": 24, "learning_rate": 1e-5}
    policies = ("warn", "skip", "stop")
    runs = [run_settings(files, tmp_path / policy, train=train | {"on_spike": policy}) for policy in policies]
    for policy, (records, text) in zip(policies, run_world(1, saying, runs, (22,))[0], strict=True):
        said = [line for line in text.splitlines() if "above the mean" in line]
        assert len(said) == 1 and "step 22: the gradient norm" in said[0], text
        if policy == "stop":
            assert "so nothing was updated" in said[0] and len(records) == 21
        else:
            assert f"since train.on_spike is {policy}" in said[0] and len(records) == 24
            assert records[-1].get("num_left_out") == {"warn": None, "skip": 1}[policy]


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so_once(files: Path, tmp_path: Path) -> None:
    still = run_settings(files, tmp_path / "still", train=FEW_PAIRS | {"steps": 12, "learning_rate": 1e-30})
    rows = [{"prompt": "a b", "chosen": " c d", "rejected": " e f", "weight": 0}] * 8
    (tmp_path / "nothing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moving = run_settings(files, tmp_path / "moving", train=FEW_PAIRS | {"steps": 12})
    flat = run_settings(files, tmp_path / "flat", objective={"row_weights": True}, train={"steps": 2})
    flat["data"] |= {"train": str(tmp_path / "nothing.jsonl")}
    said = [text for _, text in run_world(1, saying, [still, moving, flat])[0]]
    assert [text.count("none has changed from step 0 to step 12") for text in said] == [1, 0, 0]
    assert [text.count(" is 0: this step taught the model nothing") for text in said] == [0, 0, 1]


def test_what_is_not_finite_is_neither_imported_nor_exported(tmp_path: Path) -> None:
    from megadpo.checkpoint.convert import export_checkpoint
    from megadpo.checkpoint.importing import import_hf

    model = save_model(tmp_path / "model", "llama", num_hidden_layers=2, tokenizer=False)
    import_hf(model, tmp_path / "good")
    for file in (model / "model.safetensors", next((tmp_path / "good").glob("*.safetensors"))):
        tensors = load_file(file)
        name = next(name for name in tensors if "layers.1.mlp.down_proj" in name)
        tensors[name][1, 2] = float("inf")
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj.weight is not finite, so nothing was written"):
        import_hf(model, tmp_path / "bad")
    with pytest.raises(UserError, match=r"good: model.layers.1.mlp.down_proj.weight is not finite"):
        export_checkpoint(tmp_path / "good", tmp_path / "hf", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "model"]


def test_large_numbers_whose_sum_overflows_are_finite() -> None:
    from megadpo.checkpoint.finite import FiniteWatch, finite_only, is_finite

    large, watch = torch.full((10,), 3e38), FiniteWatch()
    assert is_finite(large) and list(finite_only([("x", large)], "it"))
    watch.see("x", large)
    assert watch.suspect() == "x", "looked at again by is_finite"
    for value in (np.inf, -np.inf, np.nan):
        assert not is_finite(torch.tensor([0.0, value])) and not is_finite(torch.tensor([0.0, value], dtype=torch.bfloat16))
