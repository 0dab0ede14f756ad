"""Twenty steps of training equal twenty steps of TRL's DPOTrainer: same rows, order, model and optimizer settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import hh_rows, save_model
from tests.worlds import run_world

NUM_STEPS, PAIRS_PER_STEP, BETA, LEARNING_RATE = 20, 8, 0.1, 1e-3
COMPARED = {
    # name: absolute floor under the relative tolerance, for quantities that pass through zero
    "loss": 0.0,
    "grad_norm": 0.0,
    "rewards/chosen": 1e-4,
    "rewards/rejected": 1e-4,
    "rewards/margins": 1e-4,
    "logps/chosen": 0.0,
    "logps/rejected": 0.0,
    "entropy": 0.0,
    "learning_rate": 1e-12,
}


def _pairs() -> list[dict[str, str]]:
    """Explicit prompts, so that both sides read the same three texts."""
    pairs = []
    for row in hh_rows(300):
        prompts = [row[key][: row[key].rindex("\n\nAssistant:") + len("\n\nAssistant:")] for key in ("chosen", "rejected")]
        completions = [row[key][len(prompt) :] for key, prompt in zip(("chosen", "rejected"), prompts, strict=True)]
        if (
            prompts[0] == prompts[1]
            and all(text.strip() for text in completions)
            and len(prompts[0]) < 400
            and completions[0] != completions[1]
        ):
            pairs.append({"prompt": prompts[0], "chosen": completions[0], "rejected": completions[1]})
    return pairs[: NUM_STEPS * PAIRS_PER_STEP]


def _trl_history(model: Path, pairs: list[dict[str, str]], directory: Path) -> list[dict[str, float]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(2)
    arguments = DPOConfig(
        output_dir=str(directory),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=PAIRS_PER_STEP,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        max_grad_norm=1.0,
        beta=BETA,
        max_length=256,
        truncation_mode="keep_start",
        weight_decay=0.01,
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    models = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = DPOTrainer(
        models[0], models[1], args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def _our_history(settings: dict[str, Any]) -> list[dict[str, float]]:
    import megadpo

    result = megadpo.train(settings)
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trl")
    model = save_model(directory / "model", "llama", tie_word_embeddings=True)
    pairs = _pairs()
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return directory, _trl_history(model, pairs, directory / "out")


@pytest.mark.parametrize(
    ("num_processes", "parallel", "share_prompts"),
    [(1, {}, True), (2, {"tensor": 2}, False), (4, {"tensor": 2, "pipeline": 2}, True)],
    ids=["one process", "tensor 2, unshared prompts", "tensor 2 x pipeline 2"],
)
def test_twenty_steps_equal_trl(theirs, tmp_path, num_processes, parallel, share_prompts):
    directory, history = theirs
    settings = {
        "model": {"path": str(directory / "model"), "dtype": "fp32"},
        "data": {
            "train": str(directory / "pairs.jsonl"),
            "shuffle": False,
            "max_length": 256,
            "truncation": "keep_start",
            "share_prompts": share_prompts,
            "cache_dir": str(directory / "cache"),
        },
        "objective": {"beta": BETA},
        "parallel": parallel,
        "train": {
            "steps": NUM_STEPS,
            "pairs_per_step": PAIRS_PER_STEP,
            "tokens_per_micro_batch": 1024,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 5,
            "weight_decay": 0.01,
        },
        "output_dir": str(tmp_path / "run"),
    }
    ours = run_world(num_processes, _our_history, settings)[0]
    assert len(ours) == len(history) == NUM_STEPS
    for name, floor in COMPARED.items():
        a, b = (np.array([record[name] for record in records]) for records in (ours, history))
        worst = np.max(np.abs(a - b) - 1e-4 * np.abs(b))
        assert worst <= floor, f"{name}: off by {np.max(np.abs(a - b))} at step {np.argmax(np.abs(a - b)) + 1}"
    # A drift would show as a mean error of one sign, rounding does not.
    residual = np.array([x["loss"] - y["loss"] for x, y in zip(ours, history, strict=True)])
    assert abs(residual.mean()) <= 1e-5
    moved = max(abs(record["rewards/margins"]) for record in ours)
    assert moved > 0.1, "training must move the margins for this comparison to mean anything"
