"""Weights in FP8 with a scale for each block: read as transformers and the formula have them, exported as plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.errors import UserError
from megadpo.model.families import check_tensors, shape_of
from tests.helpers.checkpoints import tensors_of
from tests.helpers.models import save_model

BLOCK = (32, 16)
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block divided by its largest number / 448, and that factor of each."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scales[i, j] = weight[block].abs().max() / 448
            out[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return out, scales


def by_the_formula(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if f"{name}_scale_inv" not in tensors:
        return tensors[name]
    weight, scales = tensors[name].float(), tensors[f"{name}_scale_inv"]
    return torch.stack(
        [
            torch.stack([weight[i, j] * scales[i // BLOCK[0], j // BLOCK[1]] for j in range(weight.shape[1])])
            for i in range(weight.shape[0])
        ]
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that blocks divide, which transformers needs, but for the vocabulary's, which is not quantised."""
    model = save_model(
        tmp_path_factory.mktemp("models") / "fp8", "qwen3", tokenizer=False, num_hidden_layers=2, dtype=torch.bfloat16
    )
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name].float())
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    ignored = {"modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS | ignored}))
    return model


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


NAME = "model.layers.1.mlp.down_proj.weight"


def test_every_slice_is_the_formula_s(original: Path) -> None:
    source, stored = open_hf(original), load_file(original / "model.safetensors")
    check_tensors(shape_of(read_hf_config(original)), source)
    assert not any("scale" in name for name in source.names())
    for name in (NAME, "model.layers.0.self_attn.k_proj.weight"):
        expected = by_the_formula(stored, name)
        assert source.dtype(name) is torch.bfloat16 and source.read(name, 0, 0, len(expected)).dtype is torch.float32
        for dim in (0, 1):
            for start, length in ((0, expected.shape[dim]), (5, 40), (31, 1), (16, 32), (33, 20)):
                assert torch.equal(source.read(name, dim, start, length), expected.narrow(dim, start, length))


def test_deepseek_v3_is_read_with_what_its_files_have_beside_plain_weights(tmp_path: Path) -> None:
    """Matrices in FP8, routers and their biases not; a layer for multi-token prediction; code of its own."""
    plain = save_model(tmp_path / "model", "deepseek_v3", tokenizer=False, num_hidden_layers=2, dtype=torch.bfloat16)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("proj.weight", "proj_with_mqa.weight"))]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name].float())
    last = {name: tensor.clone() for name, tensor in tensors.items() if ".layers.1." in name}
    prediction = {name.replace(".layers.1.", ".layers.2."): tensor for name, tensor in last.items()}
    prediction["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors | prediction, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "topk_method": "noaux_tc"}
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    source, shape = open_hf(plain), shape_of(read_hf_config(plain))
    check_tensors(shape, source)
    for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        matrix = f"model.layers.1.self_attn.{name}.weight"
        expected = by_the_formula(tensors, matrix)
        assert torch.equal(source.read(matrix, 0, 0, len(expected)), expected)
    assert source.dtype("model.layers.1.mlp.gate.weight") is torch.bfloat16


def test_sizes_that_no_block_divides_have_a_smaller_block_last(model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    stored[NAME], stored[f"{NAME}_scale_inv"] = quantised(torch.randn(50, 41))
    save_file(stored, model / "model.safetensors")
    source, expected = open_hf(model), by_the_formula(stored, NAME)
    assert torch.equal(source.read(NAME, 0, 0, 50), expected)
    assert torch.equal(source.read(NAME, 1, 30, 11), expected[:, 30:])


def test_the_export_is_plain_and_transformers_dequantises_to_the_same_bits(original: Path, tmp_path: Path) -> None:
    import_hf(original, tmp_path / "checkpoint", num_tensor=2, num_pipeline=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    stored = load_file(original / "model.safetensors")
    exported = tensors_of(tmp_path / "hf")
    assert all(torch.equal(exported[name], by_the_formula(stored, name).bfloat16()) for name in exported)
    settings = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True, modules_to_not_convert=["lm_head"])
    theirs = AutoModelForCausalLM.from_pretrained(original, quantization_config=settings, dtype=torch.float32)
    source = open_hf(original)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, source.read(name, 0, 0, len(parameter)).float()), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_scheme": "static"}, "quantization_config.activation_scheme is 'static'"),
        ({"scale_fmt": "ue8m0"}, "quantization_config.scale_fmt is 'ue8m0'"),
        ({"weight_block_size": None}, "quantization_config, which is not supported"),
        ({"quant_method": "mxfp8"}, "quantization_config, which is not supported"),
    ],
)
def test_what_means_other_weights_is_refused_by_its_field(model: Path, change: dict[str, Any], words: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        read_hf_config(model)


def test_scales_that_are_missing_or_of_other_blocks_are_refused(model: Path) -> None:
    stored = load_file(model / "model.safetensors")
    scale = f"{NAME}_scale_inv"
    for wrong, words in (
        ({name: tensor for name, tensor in stored.items() if name != scale}, "its scales .* are missing"),
        (stored | {scale: stored[scale][:1].clone()}, r"has shape \[1, 6\], but blocks of \[32, 16\]"),
        (stored | {scale: stored[scale].half()}, "is torch.float16; scales are read in float32"),
    ):
        save_file(wrong, model / "model.safetensors")
        with pytest.raises(UserError, match=words):
            open_hf(model)


def test_an_adapter_is_merged_into_what_is_read(original: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = save_model(tmp_path / "plain", "qwen3", tokenizer=False, num_hidden_layers=2)
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(plain), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(plain)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=original)
    stored, merged = load_file(original / "model.safetensors"), tensors_of(tmp_path / "merged")
    assert torch.equal(merged[NAME], by_the_formula(stored, NAME).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
