"""What a run says at its end: how long it took, how it went, what it has written, and how that is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megadpo.checkpoint.sharded import step_directories
from megadpo.data.rows.report import counted
from megadpo.metrics.progress import clock_time, describe
from megadpo.parallel.world import rank
from megadpo.training.console import log
from megadpo.training.setup import RunSetup

Record = Mapping[str, float]


def tell_end(setup: RunSetup, first_step: int, seconds: float, metrics: Record) -> None:
    """Three lines and one to be copied, on rank 0.

    Args:
        first_step: steps that were done before this process began.
        seconds: since it did.
        metrics: the last ones of every name.
    """
    if rank() != 0:
        return
    steps = counted(setup.num_steps, "step")
    if first_step:
        steps += f" ({setup.num_steps - first_step} of them now)"
    where = "device" if torch.cuda.is_available() else "host"
    peak = metrics.get("peak_memory_gib")
    memory = f", peak memory {peak:.1f} GiB ({where}, rank 0)" if peak is not None and setup.num_steps > first_step else ""
    log(f"finished: {steps} in {clock_time(seconds)}{memory}")
    for line in results(metrics, evaluations(setup.output_dir / "metrics.jsonl")):
        log(line)
    log(f"written to {setup.output_dir}: {', '.join(written(setup.output_dir))}")
    log(f"to load it: {how_to_load(setup, str(setup.output_dir / 'hf'))}")


def results(metrics: Record, held_out: list[Record]) -> Iterator[str]:
    """The last step's figures, the last evaluation's, and the best one's where that is another."""
    if "loss" in metrics:
        names = ("loss", "rewards/margins", "rewards/accuracies")
        yield f"last step: {describe({name: metrics[name] for name in names if name in metrics})}"
    if held_out:
        yield f"last evaluation (step {held_out[-1]['step']:.0f}): {describe(held_out[-1], 'eval_')}"
        finite = [record for record in held_out if math.isfinite(record["eval_loss"])]
        best = min(finite, key=lambda record: record["eval_loss"], default=held_out[-1])
        if best is not held_out[-1]:
            yield f"lowest held-out loss (step {best['step']:.0f}): {describe(best, 'eval_')}"


def evaluations(path: Path) -> list[Record]:
    """The records of a metrics.jsonl that are of evaluations; of a file that cannot be read, none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[Record] = []
    for line in lines:
        if '"eval_loss"' in line:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            loss = record.get("eval_loss")
            found.append({**record, "eval_loss": math.nan if loss is None else loss})
    return found


def written(directory: Path) -> list[str]:
    """What of a run is in its directory, in words."""
    found = []
    if (hf := directory / "hf").is_dir():
        kind = "an adapter" if (hf / "adapter_config.json").is_file() else "the model"
        found.append(f"hf/ ({kind}, {_size(hf)})")
    if newest := step_directories(directory / "checkpoints"):
        last = max(newest, key=lambda path: int(path.name[5:]))
        found.append(f"checkpoints/ (the newest {last.name}, {_size(last)})")
    names = ("metrics.jsonl", "report.html", "tensorboard", "config.yaml", "run.json")
    return found + [f"{name}/" if (directory / name).is_dir() else name for name in names if (directory / name).exists()]


def how_to_load(setup: RunSetup, path: str) -> str:
    """A line of Python for what was exported."""
    auto = "AutoModelForSequenceClassification" if setup.objective.has_reward_head else "AutoModelForCausalLM"
    if setup.adapter is None or setup.config.adapter.merge:
        return f'transformers.{auto}.from_pretrained("{path}")'
    return f'peft.AutoPeft{auto.removeprefix("Auto")}.from_pretrained("{path}")'


def _size(directory: Path) -> str:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += os.path.getsize(path)
        except OSError:  # it is gone by now
            continue
    return f"{total / 2**30:.2f} GiB" if total >= 2**27 else f"{total / 2**20:.1f} MiB"
