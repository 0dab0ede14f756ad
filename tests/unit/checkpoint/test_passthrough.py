"""Layers for multi-token prediction go through imports, runs and exports bit for bit, and are neither trained nor missed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.passthrough import passthrough_of, write_passthrough
from megadpo.errors import UserError
from megadpo.model.families import check_tensors, mtp_names, shape_of
from tests.helpers.models import save_model
from tests.helpers.runs import run_settings, save_files, train_run, weights_in
from tests.helpers.worlds import run_world

LAYER = "model.layers.4."


def mtp_tensors() -> dict[str, torch.Tensor]:
    """As DeepSeek-V3 and Qwen3-Next name them, in types of their own."""
    torch.manual_seed(3)
    return {
        f"{LAYER}eh_proj.weight": torch.randn(64, 128).bfloat16(),
        f"{LAYER}enorm.weight": torch.randn(64),
        f"{LAYER}self_attn.q_proj.weight": torch.randn(64, 64).bfloat16(),
        "mtp.fc.weight": torch.randn(64, 128),
    }


def add_mtp(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | mtp_tensors(), model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(save_model(tmp_path_factory.mktemp("models") / "model", "glm4_moe", tokenizer=False))


def assert_has_mtp(directory: Path) -> None:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    stored = {path.name: set(load_file(path)) for path in directory.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, names in stored.items() for name in names}
    found = weights_in(directory)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, tensor in mtp_tensors().items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_they_go_through_a_checkpoint_of_another_layout(model: Path, tmp_path: Path) -> None:
    import_hf(model, tmp_path / "checkpoint", num_tensor=2, num_pipeline=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_has_mtp(tmp_path / "hf")
    assert weights_in(tmp_path / "hf").keys() == weights_in(model).keys()
    tokens = torch.arange(7)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "hf"))
    assert torch.equal(before(tokens).logits, after(tokens).logits)


def test_a_vocabulary_is_resized_where_they_have_none_of_their_own(model: Path, tmp_path: Path) -> None:
    import_hf(model, tmp_path / "checkpoint", num_rows=512)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_has_mtp(tmp_path / "hf")
    assert len(weights_in(tmp_path / "hf")["model.embed_tokens.weight"]) == 512
    other = Path(shutil.copytree(model, tmp_path / "model"))
    name = f"{LAYER}shared_head.head.weight"
    save_file(load_file(other / "model.safetensors") | {name: torch.ones(499, 64)}, other / "model.safetensors")
    with pytest.raises(UserError, match=rf"--resize-vocabulary is .* and {name} has 499 rows, which would stay"):
        import_hf(other, tmp_path / "out", num_rows=512)
    assert not (tmp_path / "out").exists()


def test_they_are_written_in_files_of_bounded_size_whose_directory_may_have_gone(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    passthrough = passthrough_of(open_hf(copy, keep_mapped=True), 4)
    assert passthrough is not None
    shutil.rmtree(copy)
    files = write_passthrough(passthrough, tmp_path, max_file_bytes=17_000)
    assert len(set(files.values())) == 3
    found = weights_in(tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in mtp_tensors().items())


def test_layers_that_are_none_of_multi_token_prediction_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tokenizer=False)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {f"{LAYER}input_layernorm.weight": torch.ones(64)}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"does not know, the first is model\.layers\.4\.input_layernorm\.weight"):
        check_tensors(shape_of(read_hf_config(model)), open_hf(model))
    assert mtp_names(5, [f"{LAYER}eh_proj.weight"]) == [], "a layer of the model itself is none"


@pytest.mark.slow
def test_a_run_exports_them_and_its_checkpoints_have_them(tmp_path: Path) -> None:
    add_mtp(save_files(tmp_path, "llama", 20) / "model")
    settings = run_settings(tmp_path, tmp_path / "run", train={"steps": 1, "warmup_steps": 0}, checkpoint={"every": 1})
    run_world(2, train_run, settings | {"parallel": {"pipeline": 2}})
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000001", tmp_path / "again")
    for directory in (tmp_path / "run" / "hf", tmp_path / "again"):
        assert_has_mtp(directory)
    assert not torch.equal(
        weights_in(tmp_path / "again")["model.norm.weight"], weights_in(tmp_path / "model")["model.norm.weight"]
    )
