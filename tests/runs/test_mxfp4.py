"""GPT-OSS with its experts in MXFP4: read as the bf16 model that transformers makes of it, trained, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.importing import import_hf
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import run_settings, train_run
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """The packed model, and the same in bf16 as transformers unpacks it."""
    root = tmp_path_factory.mktemp("gpt-oss")
    plain = save_model(root / "plain", "gpt_oss", num_hidden_layers=2, dtype=torch.bfloat16)
    packed = save_model(root / "model", "gpt_oss", num_hidden_layers=2, dtype=torch.bfloat16)
    torch.manual_seed(3)
    unpacked, others = load_file(plain / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in list(unpacked):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        num_experts, columns, rows = others.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(117, 122, blocks.shape[:3], dtype=torch.uint8)
        unpacked[name] = convert_moe_packed_tensors(blocks, scales)
        others |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(unpacked, plain / "model.safetensors", {"format": "pt"})
    save_file(others, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_it_is_the_unpacked_model_bit_for_bit_and_is_written_as_that(models, tmp_path) -> None:
    packed, plain = models
    assert_same(tensors_of(packed), tensors_of(plain))
    import_hf(packed, tmp_path / "checkpoint", num_tensor=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(plain / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_it_is_trained_and_transformers_loads_the_result(models, tmp_path) -> None:
    packed, plain = models
    write_hh(packed.parent / "train.jsonl", 60)
    settings = run_settings(packed.parent, tmp_path / "run", parallel={"expert": 2}, train={"learning_rate": 1e-4})
    records = run_world(2, train_run, settings)[0]
    assert len(records) == 5 and records[0]["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert records[-1]["rewards/margins"] != 0
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    moved = [n for (n, a), b in zip(after.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)]
    assert {"model.layers.1.self_attn.sinks", "model.layers.0.mlp.experts.gate_up_proj_bias"} <= set(moved)
    # Five steps of Adam move a weight by the learning rate each; what is written is rounded to bf16, 2^-9 of it.
    for (name, a), b in zip(after.named_parameters(), before.parameters(), strict=True):
        allowed = 5 * 1e-4 * 1.5 + b.detach().abs() * 2**-8
        assert bool(((a - b).detach().abs() <= allowed).all()), name
