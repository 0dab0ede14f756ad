"""Runs whose adapters stand on another base than the files': one in 4 bits, and one that an adapter was taken out of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.errors import UserError
from megadpo.training.resume import settle_checkpoint
from megadpo.training.setup import prepare
from megadpo.validation.load import load_config
from tests.helpers.runs import assert_same_weights, run_settings, save_files, train_each
from tests.helpers.worlds import run_world

LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}
SHORT = {"steps": 3, "pairs_per_step": 4, "warmup_steps": 1, "learning_rate": 1e-3}
TOKENS = torch.arange(5, 40)[None]
NF4 = {"model": {"quantization": "nf4"}}


def of_run(files: Path, output_dir: Path, resume: str = "auto", **changes: Any) -> dict[str, Any]:
    adapter, model = LORA | changes.pop("adapter", {}), {"path": str(files / "model")} | changes.pop("model", {})
    checkpoint = {"every": 1, "resume": resume}
    return run_settings(files, output_dir, adapter=adapter, model=model, checkpoint=checkpoint, train=SHORT, **changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "qwen2", 60, num_hidden_layers=2)


@pytest.fixture(scope="module")
def runs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, step_2 = tmp_path_factory.mktemp("runs"), "checkpoints/step_00000002"
    pissa: dict[str, Any] = {"adapter": {"init": "pissa"}}
    merged: dict[str, Any] = {"adapter": {"init": "pissa", "merge": True}}
    every = [
        of_run(files, root / "nf4", **NF4),
        of_run(files, root / "nf4-resumed", str(root / "nf4" / step_2), **NF4),
        of_run(files, root / "pissa", **pissa),
        of_run(files, root / "pissa-merged", **merged),
        of_run(files, root / "pissa-resumed", str(root / "pissa" / step_2), **pissa),
    ]
    run_world(1, train_each, every)
    return root


@pytest.mark.parametrize("kind", ["nf4", "pissa"])
@pytest.mark.slow
def test_the_first_margins_are_zero_and_a_resumed_run_ends_with_the_same_bits(kind: str, runs: Path) -> None:
    first = json.loads((runs / kind / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0 and first["rewards/chosen"] == 0.0
    assert_same_weights(runs / f"{kind}-resumed", runs / kind)


def test_an_adapter_trained_in_4_bits_is_of_the_model_as_it_was(files: Path, runs: Path, tmp_path: Path) -> None:
    settings = json.loads((runs / "nf4" / "hf" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(files / "model") and settings["r"] == 4
    merge_adapter(runs / "nf4" / "hf", tmp_path / "merged")
    merged, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", files / "model"))
    assert 1e-4 < (logits_of(merged) - logits_of(base)).abs().max() < 1


def test_a_run_does_not_go_on_with_weights_in_other_bits(files: Path, runs: Path, tmp_path: Path) -> None:
    step_2 = str(runs / "nf4" / "checkpoints" / "step_00000002")
    for number, model in enumerate(({}, {"quantization": "nf4", "double_quantization": False})):
        with pytest.raises(UserError, match=r"changed since .* was made: model\.quantization; put back what was there"):
            setup = prepare(load_config(of_run(files, tmp_path / str(number), step_2, model=model)))
            settle_checkpoint(setup.search, setup.origin)


def test_an_adapter_that_was_a_part_of_the_model_is_exported_for_the_whole_one(files: Path, runs: Path) -> None:
    import peft

    settings = json.loads((runs / "pissa" / "hf" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 16, True)
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    before = logits_of(base)
    found = logits_of(peft.PeftModel.from_pretrained(base, runs / "pissa" / "hf"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(runs / "pissa-merged" / "hf"))
    assert torch.allclose(found, merged, atol=1e-4) and (found - before).abs().max() > 1e-2


def test_its_checkpoint_is_no_adapter_of_the_model(files: Path, runs: Path, tmp_path: Path) -> None:
    step_2 = runs / "pissa" / "checkpoints" / "step_00000002"
    with pytest.raises(UserError, match=r"began as a part of its base \(adapter\.init pissa\).*; take hf/ of its run"):
        export_checkpoint(step_2, tmp_path / "hf")
    with pytest.raises(UserError, match=r"its adapters have init_lora_weights 'pissa', and this run's True"):
        setup = prepare(load_config(of_run(files, tmp_path / "run", str(step_2))))
        settle_checkpoint(setup.search, setup.origin)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits
