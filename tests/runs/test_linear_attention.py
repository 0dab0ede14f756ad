"""Runs with linear attention: five steps of DPO, resumed, exported for transformers; with adapters, exported for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import assert_same_weights, exported_weights, resumed_and_whole, run_settings, train_each, weights_in
from tests.helpers.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
MTP = {"mtp.fc.weight": torch.arange(6.0).reshape(2, 3).bfloat16()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer for multi-token prediction, and training pairs."""
    directory = tmp_path_factory.mktemp("files")
    model = save_model(directory / "model", "qwen3_next", num_hidden_layers=2, mlp_only_layers=[1])
    save_file(load_file(model / "model.safetensors") | MTP, model / "model.safetensors", {"format": "pt"})
    write_hh(directory / "train.jsonl", 24)
    return directory


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one_and_transformers_loads_its_export(
    files: Path, tmp_path: Path
) -> None:
    def settings(name: str) -> dict[str, Any]:
        return run_settings(files, tmp_path / name, parallel={"tensor": 2, "expert": 2}, checkpoint={"every": 2})

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert resumed == whole and len(whole) == 5
    assert whole[0]["loss"] == pytest.approx(0.6931472, abs=1e-5) and whole[-1]["loss"] < whole[0]["loss"]
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")
    before, after = weights_in(files / "model"), exported_weights(tmp_path / "whole")
    assert before.keys() == after.keys() and torch.equal(after["mtp.fc.weight"], MTP["mtp.fc.weight"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"model.layers.0.linear_attn.{name}" for name in ("A_log", "dt_bias", "conv1d.weight", "norm.weight")} <= moved
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_adapters_of_its_projections_load_in_peft_and_merged_give_the_same(files: Path, tmp_path: Path) -> None:
    import peft

    targets = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "o_proj"]
    adapter = {"kind": "lora", "rank": 4, "target_modules": targets}
    runs = [
        run_settings(files, tmp_path / name, adapter=adapter | extra, parallel={"tensor": 2})
        for name, extra in (("adapter", {}), ("merged", {"merge": True}))
    ]
    lines, again = run_world(2, train_each, runs)[0]
    assert lines == again and lines[-1]["loss"] < lines[0]["loss"]
    said = json.loads((tmp_path / "adapter" / "hf" / "adapter_config.json").read_text())
    assert set(said["target_modules"]) == set(targets)
    tokens = torch.arange(2, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    plain = base(tokens).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter" / "hf").eval()(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "hf")(tokens).logits
    assert torch.allclose(theirs, merged, atol=1e-5) and not torch.allclose(plain, merged, atol=1e-3)
