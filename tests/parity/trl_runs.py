"""Twenty steps of training, once by TRL and once by us: the same rows, order, model and optimizer settings, in fp32."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.helpers.models import hh_rows
from tests.helpers.runs import train_each, train_run
from tests.helpers.worlds import run_world

NUM_STEPS, UNITS_PER_STEP, LEARNING_RATE, WARMUP, WEIGHT_DECAY = 20, 8, 1e-3, 5, 0.01
MAX_LENGTH = 112  # some answers are cut, no prompt fills it
LABELS_MAX_LENGTH = 86
RELATIVE = 1e-4

PAIR_METRICS = {
    # name: absolute floor under the relative tolerance, for quantities that pass through zero
    "loss": 0.0,
    "grad_norm": 0.0,
    "rewards/chosen": 1e-5,
    "rewards/rejected": 1e-5,
    "rewards/margins": 1e-5,
    "rewards/accuracies": 1e-12,
    "learning_rate": 1e-12,
}
LOGPS = {"logps/chosen": 0.0, "logps/rejected": 0.0}
DPO_METRICS = PAIR_METRICS | LOGPS | {"entropy": 0.0}
KTO_METRICS = {name: floor for name, floor in DPO_METRICS.items() if name not in ("rewards/accuracies", "rewards/margins")}
SFT_METRICS = {"loss": 0.0, "grad_norm": 0.0, "entropy": 0.0, "mean_token_accuracy": 1e-12, "learning_rate": 1e-12}
REWARD_METRICS = {name: PAIR_METRICS[name] for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")}
THEIR_NAMES = {"reward": {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}}
"""What a trainer calls a metric of ours, where it is another name."""
TRAINERS = {
    # name: module, trainer, its configuration
    "DPO": ("trl", "DPOTrainer", "DPOConfig"),
    "KTO": ("trl", "KTOTrainer", "KTOConfig"),
    "SFT": ("trl", "SFTTrainer", "SFTConfig"),
    "reward": ("trl", "RewardTrainer", "RewardConfig"),
    "ORPO": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
    "CPO": ("trl.experimental.cpo", "CPOTrainer", "CPOConfig"),
}


@dataclass(frozen=True)
class Run:
    """An objective as both sides call it.

    Attributes:
        trainer: a key of TRAINERS.
        ours: options of `objective`.
        theirs: what is set in the trainer's configuration besides the common settings.
        rows: "pairs", "labels" or "examples": what the trainer reads.
        beta: on both sides.
        max_length: on both sides.
        reference: options of `reference`; TRL gets a reference model where its mode is not "none".
        metrics: what is compared, with each metric's absolute floor.
        moves: the metric that training must have moved, and by how much at least.
        adapter: LoraConfig's options, where adapters are trained: a new one of TRL's, which we go on with.
        weight_decay: on both sides; TRL's decays DoRA's magnitudes, ours no vectors.
    """

    trainer: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    rows: str = "pairs"
    beta: float = 0.1
    max_length: int = MAX_LENGTH
    reference: dict[str, Any] = field(default_factory=lambda: {"mode": "resident"})
    metrics: dict[str, float] = field(default_factory=lambda: DPO_METRICS)
    moves: tuple[str, float] = ("rewards/margins", 0.1)
    adapter: dict[str, Any] | None = None
    weight_decay: float = WEIGHT_DECAY


@functools.cache
def _short_prompts() -> list[dict[str, Any]]:
    """Real pairs with explicit prompts, so that both sides read the same three texts."""
    found = []
    for row in hh_rows(2300):
        prompts = [row[key][: row[key].rindex("\n\nAssistant:") + len("\n\nAssistant:")] for key in ("chosen", "rejected")]
        completions = [row[key][len(prompt) :] for key, prompt in zip(("chosen", "rejected"), prompts, strict=True)]
        if (
            prompts[0] == prompts[1]
            and all(text.strip() for text in completions)
            and len(prompts[0]) < 130
            and completions[0] != completions[1]
        ):
            found.append({"prompt": prompts[0], "chosen": completions[0], "rejected": completions[1]})
    return found


def pairs() -> list[dict[str, Any]]:
    """The first of them."""
    return _short_prompts()[: NUM_STEPS * UNITS_PER_STEP]


def labels() -> list[dict[str, Any]]:
    """One labelled answer of a pair a row, at least two of each label in every step.

    With LABELS_MAX_LENGTH no answer is cut after its own prompt, and some after another one: TRL mismatches answers
    before it cuts them, we after.
    """
    random = np.random.default_rng(2)
    good = np.concatenate(
        [random.permutation([True] * num + [False] * (UNITS_PER_STEP - num)) for num in random.integers(2, 7, NUM_STEPS)]
    )
    short = [
        pair for pair in _short_prompts() if max(len(pair["chosen"]), len(pair["rejected"])) < 180 - len(pair["prompt"])
    ]
    return [
        {"prompt": short[i]["prompt"], "completion": short[i]["chosen" if label else "rejected"], "label": bool(label)}
        for i, label in zip(random.permutation(len(short)), good, strict=False)
    ]


def examples() -> list[dict[str, Any]]:
    """The chosen answer of every pair."""
    return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs()]


ROWS = {"pairs": pairs, "labels": labels, "examples": examples}


def trl_history(run: Run, model: Path, directory: Path) -> list[dict[str, float]]:
    """What TRL logs at each step. An adapter that it trains is in `directory`/adapter as it was before."""
    # accelerate reads packages' metadata at each step, a tenth of all the time that a run takes.
    with mock.patch.object(importlib.metadata, "metadata", functools.cache(importlib.metadata.metadata)):
        return _trl_history(run, model, directory)


def _trl_history(run: Run, model: Path, directory: Path) -> list[dict[str, float]]:
    import peft
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    disable_progress_bars()
    torch.set_num_threads(1)
    module, trainer_name, config_name = TRAINERS[run.trainer]
    library = importlib.import_module(module)
    arguments = getattr(library, config_name)(
        output_dir=str(directory),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=UNITS_PER_STEP,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        max_grad_norm=1.0,
        max_length=run.max_length,
        weight_decay=run.weight_decay,
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        **({} if run.trainer in ("SFT", "reward") else {"beta": run.beta}),
        **({"truncation_mode": "keep_start"} if run.trainer in ("DPO", "SFT") else {}),
        **run.theirs,
    )
    rows = ROWS[run.rows]()
    assert len(rows) == NUM_STEPS * UNITS_PER_STEP
    kind = AutoModelForSequenceClassification if run.trainer == "reward" else AutoModelForCausalLM
    policy, reference = (kind.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    others: dict[str, Any] = {"ref_model": reference} if run.reference["mode"] != "none" else {}
    if run.adapter is not None:
        task = "SEQ_CLS" if run.trainer == "reward" else "CAUSAL_LM"
        others = {"peft_config": peft.LoraConfig(task_type=task, **run.adapter)}
    trainer = getattr(library, trainer_name)(
        policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        **others,
    )
    if run.adapter is not None:
        trainer.model.save_pretrained(directory / "adapter")
    trainer.train()
    names = THEIR_NAMES.get(run.trainer, {})
    records = [record for record in trainer.state.log_history if "loss" in record]
    return [record | {ours: record[theirs] for ours, theirs in names.items()} for record in records]


def our_history(
    run: Run, model: Path, directory: Path, num_processes: int = 1, parallel: dict[str, int] | None = None, **data: Any
) -> list[dict[str, float]]:
    """What we log at each step; an adapter is in `directory`/adapter."""
    return run_world(num_processes, train_run, our_settings(run, model, directory, parallel, **data))[0]


def our_histories(runs: dict[str, Run], model: Path, directory: Path) -> dict[str, list[dict[str, float]]]:
    """The same of several runs, one after the other in one process."""
    settings = [our_settings(run, model, directory / f"run{number}") for number, run in enumerate(runs.values())]
    return dict(zip(runs, run_world(1, train_each, settings)[0], strict=True))


def our_settings(
    run: Run, model: Path, directory: Path, parallel: dict[str, int] | None = None, **data: Any
) -> dict[str, Any]:
    """The configuration of `run`, whose files are in `directory`."""
    directory.mkdir(exist_ok=True)
    rows = directory / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[run.rows]()))
    return {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "train": str(rows),
            "shuffle": False,
            "max_length": run.max_length,
            "truncation": "keep_start",
            "cache_dir": str(directory / "cache"),
            "num_workers": 1,
            **data,
        },
        "objective": {"beta": run.beta, **run.ours},
        "reference": run.reference,
        "adapter": {} if run.adapter is None else {"kind": "lora", "path": str(directory / "adapter")},
        "parallel": parallel or {},
        "train": {
            "steps": NUM_STEPS,
            "pairs_per_step": UNITS_PER_STEP,
            "tokens_per_micro_batch": 1024,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": WARMUP,
            "weight_decay": run.weight_decay,
        },
        "output_dir": str(directory / "run"),
    }


def worst_errors(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], metrics: dict[str, float]
) -> dict[str, float]:
    """By metric, the largest error of any step in units of what is tolerated (above 1: a failure)."""
    worst = {}
    for name, floor in metrics.items():
        a, b = (np.array([record[name] for record in records]) for records in (ours, theirs))
        worst[name] = float(np.max(np.abs(a - b) / (RELATIVE * np.abs(b) + floor)))
    return worst


def assert_same_course(run: Run, ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> None:
    """Every compared metric agrees at every step, the loss has no drift, and training moved."""
    assert len(ours) == len(theirs) == NUM_STEPS
    worst = worst_errors(ours, theirs, run.metrics)
    assert max(worst.values()) <= 1, f"error over tolerance: {worst}"
    # A drift would show as a mean error of one sign, rounding does not.
    residual = np.array([x["loss"] - y["loss"] for x, y in zip(ours, theirs, strict=True)])
    assert abs(residual.mean()) <= 1e-5 * max(1.0, np.abs([y["loss"] for y in theirs]).mean())
    name, amount = run.moves
    values = [record[name] for record in ours]
    assert max(values) - min(values) >= amount, f"{name} must move for this comparison to mean anything: {values}"
