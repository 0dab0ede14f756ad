"""Run directories made up for reports: the files that a run leaves, with healthy curves or with a fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megadpo.config.schema import Config
from megadpo.metrics.sinks import to_line

PAIRS = 16
"""Of a step."""
BETA = 0.1

Record = dict[str, float]
Change = Callable[[Record, float], None]
"""Changes a record; given, too, how far the run is, in (0, 1]."""


def healthy_records(num_steps: int, seed: int = 0, every: int = 1) -> list[Record]:
    """Records of training, as noisy as those of 16 pairs a step are: the margin rises to 1 and the accuracy to 0.75."""
    random = np.random.default_rng(seed)
    records = []
    for step in range(1, num_steps + 1):
        share = step / num_steps
        margin = share + random.normal(0, 0.25) if step > 1 else 0.0
        chosen = -0.2 * share + random.normal(0, 0.15) if step > 1 else 0.0
        lengths = np.exp(random.normal(4, 0.6, 2 * PAIRS))
        logps = -1.4 * lengths.reshape(2, PAIRS).mean(axis=1)
        accuracy = 0.0 if step == 1 else random.binomial(PAIRS, 0.5 + 0.25 * share) / PAIRS
        by_length = {"rewards/margins_chosen_longer": 0.1, "rewards/margins_chosen_shorter": -0.1}
        records.append(
            {
                "step": step,
                "loss": math.log(2) - 0.2 * share + random.normal(0, 0.05),
                "rewards/chosen": chosen,
                "rewards/rejected": chosen - margin,
                "rewards/margins": margin,
                "rewards/accuracies": accuracy,
                **{name: margin + shift + random.normal(0, 0.3) for name, shift in by_length.items()},
                "logps/chosen": logps[0] + chosen / BETA,
                "logps/rejected": logps[1] + (chosen - margin) / BETA,
                "lengths/chosen": float(lengths[:PAIRS].mean()),
                "lengths/rejected": float(lengths[PAIRS:].mean()),
                "entropy": 1.8 - 0.1 * share + random.normal(0, 0.1),
                "grad_norm": float(np.exp(random.normal(2, 0.3))),
                "learning_rate": 5e-7 * (1 + math.cos(math.pi * (step - 1) / num_steps)),
                "epoch": share,
                "num_tokens": 1000.0 * step,
                "step_seconds": 1.0 + abs(random.normal(0, 0.1)),
                "tokens_per_second": 1000.0 + random.normal(0, 50),
                "data_wait_seconds": abs(random.normal(0, 0.01)),
                "peak_memory_gib": 3.0,
            }
        )
    return [record for record in records if record["step"] % every == 0 or record["step"] == num_steps]


def held_out_records(num_steps: int, seed: int = 0, times: int = 8) -> list[Record]:
    """Records of evaluations of a healthy run: the loss falls, the accuracy follows that of training."""
    random = np.random.default_rng(seed + 1)
    records = []
    for number in range(1, times + 1):
        share = number / times
        records.append(
            {
                "step": round(num_steps * share),
                "eval_loss": math.log(2) - 0.15 * share + random.normal(0, 0.004),
                "eval_rewards/accuracies": 0.5 + 0.2 * share + random.normal(0, 0.01),
                "eval_rewards/margins": 0.8 * share,
                "eval_logps/chosen": -80.0 - 2 * share,
                "eval_seconds": 4.0,
            }
        )
    return records


def make_run(
    directory: Path,
    num_steps: int = 200,
    seed: int = 0,
    change: Change | None = None,
    change_held_out: Change | None = None,
    every: int = 1,
    options: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    spikes: list[dict[str, Any]] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """A run directory: a healthy one, but for what `change` makes of its records and what else is given.

    Args:
        options: of the configuration, as `section.name`.
        facts: put over those of run.json, the outermost names.
    """
    directory.mkdir(parents=True)
    config = Config()
    config.model.path, config.data.train, config.data.eval = "models/small", "pairs.jsonl", "held-out.jsonl"
    config.train.pairs_per_step, config.train.steps, config.output_dir = PAIRS, num_steps, str(directory)
    for key, value in (options or {}).items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    records, held_out = healthy_records(num_steps, seed, every), held_out_records(num_steps, seed)
    for some, changing in ((records, change), (held_out, change_held_out)):
        for record in some if changing is not None else ():
            changing(record, record["step"] / num_steps)
    (directory / "metrics.jsonl").write_text("".join(map(to_line, [*records, *held_out])), encoding="utf-8")
    ended = {"began": 1.7e9, "ended": 1.7e9 + 3600, "status": "finished", "first_step": 0, "last_step": num_steps}
    made = {
        "format": 1,
        "num_steps": num_steps,
        "data": {"train": {"num_used": PAIRS * num_steps}, "eval": {"num_used": 500}},
        "sessions": [ended],
        **(facts or {}),
    }
    (directory / "run.json").write_text(json.dumps(made), encoding="utf-8")
    (directory / "spikes.jsonl").write_text("".join(json.dumps(spike) + "\n" for spike in spikes or []), encoding="utf-8")
    if evaluation is not None:
        (directory / "eval").mkdir()
        (directory / "eval" / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return directory
