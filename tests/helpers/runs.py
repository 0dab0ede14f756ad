"""Whole training runs for tests: their files, their configuration, and what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megadpo.checkpoint.sharded import step_checkpoints
from tests.helpers.models import save_model, write_hh
from tests.helpers.worlds import run_world, this_process_is_not_used_again

CLOCK = {"step_seconds", "tokens_per_second", "pairs_per_second", "peak_memory_gib", "data_wait_seconds"}
CLOCK |= {"time", "mfu", "slowest_rank", "slowest_rank_ratio"}
CLOCK |= {f"seconds/{part}" for part in ("data", "reference", "forward", "backward", "communication", "optimizer")}
"""Metrics that no two runs share."""


def save_files(directory: Path, family: str, num_rows: int, **model: Any) -> Path:
    """A model with a tokenizer, training pairs and, of these, the last 12 as held-out pairs: what `run_settings` names."""
    save_model(directory / "model", family, **model)
    rows = write_hh(directory / "train.jsonl", num_rows).read_text().splitlines(keepends=True)
    (directory / "eval.jsonl").write_text("".join(rows[-12:]))
    return directory


def run_settings(files: Path, output_dir: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration of 5 steps in fp32 on the files of `save_files`; `changes` are added to its sections."""
    made: dict[str, Any] = {
        "model": {"path": str(files / "model"), "dtype": "fp32"},
        "data": {"train": str(files / "train.jsonl"), "max_length": 128, "cache_dir": str(files / "cache")},
        "train": {"steps": 5, "pairs_per_step": 8, "tokens_per_micro_batch": 512, "learning_rate": 1e-3, "warmup_steps": 2},
        "logging": {"tensorboard": False},
        "output_dir": str(output_dir),
    }
    for section, values in changes.items():
        made[section] = made.get(section, {}) | values
    return made


class _Interrupted(Exception):
    pass


def train_run(settings: dict[str, Any], stop_after: int | None = None) -> list[dict[str, float]]:
    """Train as a user does; every metrics line but the clock's. The run breaks off after step `stop_after`, as if killed."""
    import megadpo
    from megadpo.training.run import Callbacks

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == stop_after:
            raise _Interrupted

    try:
        megadpo.train(settings, Callbacks(on_step_end=stop))
    except Exception as error:
        # The other ranks notice only that rank 0 has gone.
        if stop_after is None or not (isinstance(error, _Interrupted) or "onnect" in str(error)):
            raise
        this_process_is_not_used_again()
    return read_metrics(Path(settings["output_dir"]))


def train_each(runs: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Several runs, one after the other in the same processes."""
    return [train_run(one) for one in runs]


def resumed_and_whole(
    num_processes: int, settings: Callable[[str], dict[str, Any]], stop_after: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The metrics of the run ``settings("broken")``, which breaks off after a step and goes on in other processes, and of
    ``settings("whole")``, which those processes train afterwards from the beginning."""
    assert len(run_world(num_processes, train_run, settings("broken"), stop_after)[0]) == stop_after
    assert step_checkpoints(Path(settings("broken")["output_dir"]) / "checkpoints"), "there is something to go on from"
    resumed, whole = run_world(num_processes, train_each, [settings("broken"), settings("whole")])[0]
    return resumed, whole


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Every metrics line of a run but the clock's."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not _is_of_the_clock(name)} for line in lines]


def _is_of_the_clock(name: str) -> bool:
    return name in CLOCK or (name.startswith("eval_") and name.endswith("_seconds"))


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a directory."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def exported_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """The model that a run exported."""
    return weights_in(output_dir / "hf")


def assert_same_weights(output_dir: Path, other: Path) -> None:
    """Two runs exported the same tensors, bit for bit."""
    ours, theirs = exported_weights(output_dir), exported_weights(other)
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def log_probs(model: Path, data: Path, out: Path, parallel: dict[str, int], share_prompts: bool, cache: Path) -> None:
    """The command `logprobs` in fp32."""
    from megadpo.training.logprobs import run_logprobs
    from megadpo.validation.load import load_config

    data_options = {"max_length": 128, "share_prompts": share_prompts, "cache_dir": str(cache)}
    options = {
        "parallel": parallel,
        "data": data_options,
        "model": {"dtype": "fp32"},
        "train": {"tokens_per_micro_batch": 600},
    }
    run_logprobs(str(model), str(data), str(out), load_config(options))
