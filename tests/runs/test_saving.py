"""Checkpoints written behind the step loop: the bytes of those written in it, there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megadpo.checkpoint.sharded import open_checkpoint, step_directories
from tests.helpers.marks import all_but_a_few_exhaustive
from tests.helpers.runs import assert_same_weights, run_settings, save_files, train_each, train_run
from tests.helpers.worlds import run_world

ENGINES: dict[str, dict[str, Any]] = {
    "megatron tensor 2": {"tensor": 2},
    "megatron data 2": {},
    "deepspeed ZeRO-0": {"engine": "deepspeed", "zero_stage": 0},
    "deepspeed ZeRO-2": {"engine": "deepspeed", "zero_stage": 2},
    "deepspeed ZeRO-3": {"engine": "deepspeed", "zero_stage": 3},
}
STEPS = [f"step_{step:08d}" for step in range(1, 5)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    return save_files(directory, "qwen3", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)


def settings_of(
    files: Path, output_dir: Path, parallel: dict[str, Any], every: int = 1, **checkpoint: Any
) -> dict[str, Any]:
    return run_settings(
        files,
        output_dir,
        train={"steps": 4, "pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0},
        parallel=parallel,
        checkpoint={"every": every, "keep": 9, **checkpoint},
    )


def hashes_in(checkpoint: Path) -> dict[str, Any]:
    index = json.loads((checkpoint / "checkpoint.json").read_bytes())
    return index["files"] | {"tensors": index["tensors"], "rng": index["state"]["rng"]}


@pytest.mark.slow
@pytest.mark.parametrize("engine", all_but_a_few_exhaustive(ENGINES, slow=[4]))
def test_saves_behind_the_loop_are_those_in_it_to_the_byte(engine, files, tmp_path):
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    runs = [settings_of(files, tmp_path / str(behind), ENGINES[engine], asynchronous=behind) for behind in (True, False)]
    behind, inside = run_world(2, train_each, runs)[0]
    assert behind == inside and len(behind) == 4
    for step in STEPS:
        directories = [tmp_path / str(flag) / "checkpoints" / step for flag in (True, False)]
        assert hashes_in(directories[0]) == hashes_in(directories[1])
        open_checkpoint(directories[0]).check_files()
    assert_same_weights(tmp_path / "True", tmp_path / "False")


def _without_its_model(settings: dict[str, Any], model: str) -> list[str]:
    import threading

    import megadpo
    from megadpo.training.run import Callbacks

    heard: list[str] = []

    def on_step_end(step: int, metrics: dict[str, float]) -> None:
        shutil.rmtree(model, ignore_errors=True)

    def on_save(step: int, directory: Path) -> None:
        heard.append(f"{step} {directory.name}")
        open_checkpoint(directory).check_files()  # it is there, whole, when this is called

    megadpo.train(settings, Callbacks(on_step_end=on_step_end, on_save=on_save))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megadpo")]
    return heard


def test_saves_and_export_need_nothing_of_the_model_s_directory_and_are_told_in_order(files, tmp_path):
    """A save at every step: each waits for the one before, and the end of the run for the last."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = Path(shutil.copytree(files / "model", tmp_path / "model"))
    settings = settings_of(files, tmp_path / "run", {}, asynchronous=True)
    settings["model"]["path"] = str(model)
    heard = run_world(1, _without_its_model, settings, str(model))[0]
    assert heard == [f"{step} {STEPS[step - 1]}" for step in range(1, 5)]
    assert not model.exists()
    for directory in (tmp_path / "run" / "hf", tmp_path / "run" / "checkpoints" / STEPS[-1] / "huggingface"):
        assert len(AutoTokenizer.from_pretrained(directory)) > 100
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")


def _killed_while_writing(settings: dict[str, Any], step: str) -> None:
    """Rank 1 is gone, without a word, when it is to write its files of that step."""
    from megadpo.training import saving

    write = saving.write_shard_file

    def write_or_die(directory: Path, *rest: Any) -> Any:
        if directory.name == step and os.environ["RANK"] == "1":
            os._exit(9)
        return write(directory, *rest)

    saving.write_shard_file = write_or_die
    train_run(settings)


@pytest.mark.slow
@pytest.mark.parametrize("behind", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_rank_that_dies_in_a_save_takes_that_save_along_and_no_other(behind, files, tmp_path):
    def settings(name: str) -> dict[str, Any]:
        return settings_of(files, tmp_path / name, {"tensor": 2}, asynchronous=behind)

    with pytest.raises(AssertionError, match="rank 0 of 2 failed"):
        run_world(2, _killed_while_writing, settings("killed"), STEPS[2])
    left = step_directories(tmp_path / "killed" / "checkpoints")
    assert [path.name for path in left] == STEPS[:2]
    for directory in left:
        open_checkpoint(directory).check_files()
    resumed, whole = run_world(2, train_each, [settings("killed"), settings("whole")])[0]
    assert resumed == whole and len(whole) == 4
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_mixture_of_experts_is_saved_behind_the_loop_by_every_rank_that_holds_experts(tmp_path):
    files = save_files(tmp_path, "mixtral", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    runs = [
        settings_of(files, tmp_path / str(behind), {"expert": 2}, every=2, asynchronous=behind) for behind in (True, False)
    ]
    behind, inside = run_world(2, train_each, runs)[0]
    assert behind == inside
    for step in (STEPS[1], STEPS[3]):
        directories = [tmp_path / str(flag) / "checkpoints" / step for flag in (True, False)]
        assert hashes_in(directories[0]) == hashes_in(directories[1])
        assert len(list(directories[0].glob("pp*.safetensors"))) == 2
