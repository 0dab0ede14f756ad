"""What a run says at its end: how long it took, how it went, what it has written, and how that is loaded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megadpo.checkpoint.sharded import step_directories
from megadpo.config.sources import eval_prefix
from megadpo.data.rows.report import counted
from megadpo.metrics.progress import clock_time, describe
from megadpo.parallel.world import rank
from megadpo.training.console import log
from megadpo.training.run import Result
from megadpo.training.setup import RunSetup

Record = Mapping[str, float]


def tell_end(setup: RunSetup, first_step: int, seconds: float, result: Result) -> None:
    """Three lines and one to be copied, on rank 0.

    Args:
        first_step: steps that were done before this process began.
        seconds: since it did.
        result: what it has given.
    """
    if rank() != 0:
        return
    steps, metrics = counted(result.steps, "step"), result.metrics
    if result.ended is not None:
        steps += f" of {setup.num_steps}"
    if first_step:
        steps += f" ({result.steps - first_step} of them now)"
    where = "device" if torch.cuda.is_available() else "host"
    peak = metrics.get("peak_memory_gib")
    memory = f", peak memory {peak:.1f} GiB ({where}, rank 0)" if peak is not None and result.steps > first_step else ""
    log(f"finished: {steps} in {clock_time(seconds)}{memory}")
    for line in results(metrics):
        log(line)
    for name in setup.eval:
        for line in results_of_set(name, evaluations(setup.output_dir / "metrics.jsonl", name)):
            log(line)
    log(f"written to {setup.output_dir}: {', '.join(written(setup.output_dir))}")
    log(f"to load it: {how_to_load(setup, str(setup.output_dir / 'hf'))}")


def results(metrics: Record) -> Iterator[str]:
    """The last step's figures."""
    if "loss" in metrics:
        names = ("loss", "rewards/margins", "rewards/accuracies")
        yield f"last step: {describe({name: metrics[name] for name in names if name in metrics})}"


def results_of_set(name: str, held_out: list[Record]) -> Iterator[str]:
    """The last evaluation's figures of a held-out set, and the best one's where that is another."""
    if not held_out:
        return
    prefix, of = eval_prefix(name), f" of {name}" if name else ""
    yield f"last evaluation{of} (step {held_out[-1]['step']:.0f}): {describe(held_out[-1], prefix)}"
    loss = f"{prefix}loss"
    finite = [record for record in held_out if math.isfinite(record[loss])]
    best = min(finite, key=lambda record: record[loss], default=held_out[-1])
    if best is not held_out[-1]:
        yield f"lowest held-out loss{of} (step {best['step']:.0f}): {describe(best, prefix)}"


def evaluations(path: Path, name: str = "") -> list[Record]:
    """The records of a metrics.jsonl that are of evaluations of a held-out set; of a file that cannot be read, none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[Record] = []
    loss = f"{eval_prefix(name)}loss"
    for line in lines:
        if f'"{loss}"' in line:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found.append({**record, loss: math.nan if record.get(loss) is None else record[loss]})
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
