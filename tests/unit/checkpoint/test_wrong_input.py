"""Damaged, incomplete and foreign model directories are refused in one clear sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.checkpoint.companions import companions_of
from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.digest import tensor_files
from megadpo.checkpoint.hf import directory_warning, open_hf, read_hf_config
from megadpo.checkpoint.importing import import_hf
from megadpo.checkpoint.sharded import open_checkpoint, open_weights
from megadpo.errors import UserError
from megadpo.files import ALGORITHM, sealed
from megadpo.model.families import check_tensors, shape_of, tying_settings
from tests.helpers.models import save_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    save_model(root / "model", tokenizer=False, num_hidden_layers=2)
    import_hf(root / "model", root / "checkpoint", num_tensor=2)
    return root


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


@pytest.fixture
def checkpoint(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "checkpoint", tmp_path / "checkpoint"))


def open_model(path: Path) -> None:
    check_tensors(shape_of(read_hf_config(path)), open_weights(path))


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file's JSON; one that names its own hash names the new one then, so that only what it says is wrong."""
    content = json.loads(path.read_text())
    is_sealed = content.pop(ALGORITHM, None) is not None
    change(content)
    path.write_bytes(sealed(content) if is_sealed else json.dumps(content).encode())


def split_with_index(model: Path, names: Callable[[str], str]) -> None:
    """Replace the one weights file by an index; `names` gives what it says for each tensor."""
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, str(model / "a.safetensors"))
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: names(name) for name in tensors}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_the_originals_open(model: Path, checkpoint: Path) -> None:
    open_model(model)
    open_model(checkpoint)
    split_with_index(model, lambda name: "a.safetensors")
    open_model(model)


@pytest.mark.parametrize("size", [0, 5, 100, 20_000])
def test_a_truncated_weights_file_is_named(model: Path, size: int) -> None:
    truncate(model / "model.safetensors", size)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        open_model(model)


def test_a_weights_file_with_more_bytes_than_its_header_says_is_named(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or no safetensors file"):
        open_model(model)


def test_an_index_whose_total_size_is_not_its_files_is_warned_of(model: Path) -> None:
    size = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    split_with_index(model, lambda name: "a.safetensors")
    for said, expected in ((size, None), ("unknown", None), (size + 4, rf"{size + 4:,} bytes, but they have {size:,}")):
        change_json(
            model / "model.safetensors.index.json", lambda index, said=said: index["metadata"].update(total_size=said)
        )
        warning = directory_warning(model)
        assert warning is None if expected is None else expected in str(warning)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a.bin", "..\\a.safetensors", ""]
)
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(model: Path, name: str) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "outside.safetensors")
    split_with_index(model, lambda tensor: name if "norm" in tensor else "a.safetensors")
    with pytest.raises(UserError, match=re.escape(repr(name))):
        open_model(model)


def test_a_missing_shard_of_an_index_is_named(model: Path) -> None:
    split_with_index(model, lambda tensor: "b.safetensors" if "norm" in tensor else "a.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        open_model(model)


def test_an_index_that_promises_a_tensor_its_file_lacks_is_refused(model: Path) -> None:
    split_with_index(model, lambda tensor: "a.safetensors")
    change_json(model / "model.safetensors.index.json", lambda index: index["weight_map"].update(extra="a.safetensors"))
    with pytest.raises(UserError, match="no tensor extra"):
        open_model(model)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\ufeff{", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(model: Path, content: str) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        open_hf(model)


def test_a_missing_tensor_and_a_wrong_shape_are_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(missing, str(model / "model.safetensors"))
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(model)
    save_file(tensors | {"model.norm.weight": torch.ones(32)}, str(model / "model.safetensors"))
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \[32\].*\[64\]"):
        open_model(model)


def test_pickled_weights_under_another_name_are_refused_with_what_to_do(model: Path) -> None:
    (model / "model.safetensors").rename(model / "consolidated.00.pth")
    with pytest.raises(UserError, match="save_pretrained"):
        open_hf(model)


def test_a_directory_without_weights_config_or_existence_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        open_hf(model)
    (model / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_hf_config(model)
    for function in (open_hf, read_hf_config):
        with pytest.raises(UserError, match="is not a directory"):
            function(model / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": "many"}, "transformers refuses it"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}}, "'proportional'"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_with_its_path(model: Path, change: dict[str, Any], words: str) -> None:
    change_json(model / "config.json", lambda config: config.update(change))
    with pytest.raises(UserError, match=rf"config\.json.*{words}"):
        read_hf_config(model)


def test_code_that_a_config_names_is_never_run_which_is_told_and_not_exported(model: Path) -> None:
    """As Phi-3's does on the Hub: transformers has the model itself."""
    (model / "evil.py").write_text(f"open({str(model / 'was-run')!r}, 'w')")
    change_json(model / "config.json", lambda config: config.update(auto_map={"AutoConfig": "evil.Config"}))
    config = read_hf_config(model)
    assert type(config).__module__.startswith("transformers.") and "auto_map" not in config.to_dict()
    assert "names code of the model's own (auto_map), which is never run" in (directory_warning(model) or "")
    assert "auto_map" not in companions_of(model).settings
    assert not (model / "was-run").exists()


@pytest.mark.parametrize(("name", "counts"), [("model.safetensors", False), ("consolidated.safetensors", True)])
def test_pickled_weights_count_for_the_digest_where_they_are_what_is_read(tmp_path: Path, name: str, counts: bool) -> None:
    (tmp_path / name).touch()
    (tmp_path / "pytorch_model.bin").touch()
    assert (tmp_path / "pytorch_model.bin" in tensor_files(tmp_path)) is counts
    assert tmp_path / name in tensor_files(tmp_path)


@pytest.mark.parametrize(
    ("settings", "has_own_head", "expected"),
    [
        ({}, True, {"tie_word_embeddings": False}),  # what a family does by default, as Gemma, is not said
        ({"tie_word_embeddings": True}, True, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": False}, True, {}),
        ({"tie_word_embeddings": True}, False, {}),
    ],
)
def test_a_config_says_that_there_are_two_matrices(settings: Any, has_own_head: bool, expected: Any) -> None:
    assert tying_settings(settings, has_own_head) == expected


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_hf_config(model)


def first_file(checkpoint: Path) -> Path:
    return next(iter(sorted(checkpoint.glob("*.safetensors"))))


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_truncated_file_of_a_checkpoint_is_named(checkpoint: Path, size: int) -> None:
    truncate(first_file(checkpoint), size)
    with pytest.raises(UserError, match=r"pp00-tp00-000\.safetensors is truncated"):
        open_model(checkpoint)


def test_a_missing_file_of_a_checkpoint_is_named(checkpoint: Path) -> None:
    first_file(checkpoint).unlink()
    with pytest.raises(UserError, match=r"pp00-tp00-000\.safetensors is missing"):
        export_checkpoint(checkpoint, checkpoint.parent / "hf")
    assert not (checkpoint.parent / "hf").exists()


GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["pieces"][0].update(file="../x.safetensors"),
        lambda entry: entry["pieces"][0].update(start=1),
        lambda entry: entry["pieces"][0].update(dim=-2),
        lambda entry: entry["pieces"][0].update(length=1e9),
        lambda entry: entry["pieces"][0].update(extra=1),
        lambda entry: entry["pieces"][0].pop("key"),
        lambda entry: entry["pieces"].pop(),
        lambda entry: entry["pieces"].append(entry["pieces"][0]),
        lambda entry: entry.update(pieces=None),
        lambda entry: entry.update(pieces=[3]),
        lambda entry: entry.update(shape=[96]),
        lambda entry: entry.update(shape=[96, "64"]),
        lambda entry: entry.update(shape=[10**15, 64]),
        lambda entry: entry.update(dtype="object"),
        lambda entry: entry.update(dtype="float16"),
        lambda entry: entry.update(dtype=["float32"]),
    ],
)
def test_a_damaged_index_of_a_checkpoint_is_refused(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    change_json(checkpoint / "checkpoint.json", lambda index: change(index["tensors"]["weights"][GATE]))
    with pytest.raises(UserError, match=r"checkpoint\.json"):
        open_model(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 3},
        {"version": 1},
        {"version": True},
        {"version": None},
        {"state": None},
        {"tensors": []},
        {"tensors": {"weights": 3}},
        {"files": None},
        {"files": {"a": 3}},
        {"files": {"../a": {"bytes": 3, ALGORITHM: "0" * 32}}},
        {"files": {"a": {"bytes": -3, ALGORITHM: "0" * 32}}},
        {"files": {"a": {"bytes": 3, ALGORITHM: "0" * 32}}},
    ],
)
def test_a_foreign_index_of_a_checkpoint_is_refused(checkpoint: Path, change: dict[str, Any]) -> None:
    change_json(checkpoint / "checkpoint.json", lambda index: index.update(change))
    with pytest.raises(UserError, match=re.escape(str(checkpoint))):
        open_model(checkpoint)


def flip_the_last_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_changed_bit_in_an_imported_model_is_found_by_all_that_read_it(checkpoint: Path) -> None:
    flip_the_last_bit(first_file(checkpoint))
    for read in (open_weights, lambda path: export_checkpoint(path, checkpoint.parent / "hf")):
        with pytest.raises(UserError, match=r"pp00-tp00-000\.safetensors is damaged"):
            read(checkpoint)
    assert not (checkpoint.parent / "hf").exists()
    open_weights(checkpoint, verify=False)
    export_checkpoint(checkpoint, checkpoint.parent / "hf", verify=False)


def test_processes_that_share_the_hashing_find_every_file_s_damage_between_them(checkpoint: Path) -> None:
    for path in [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "checkpoint.json"]:
        flip_the_last_bit(path)
        found = 0
        for share in range(3):
            try:
                open_checkpoint(checkpoint).check_files(share, 3)
            except UserError as error:
                assert path.name in str(error)
                found += 1
        assert found == 1, path
        flip_the_last_bit(path)
    open_checkpoint(checkpoint).check_files()


def test_what_a_checkpoint_does_not_hold_is_said(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="holds no exp_avg; it has weights"):
        open_checkpoint(checkpoint).source("exp_avg")
    with pytest.raises(UserError, match="is not a checkpoint"):
        open_checkpoint(checkpoint / "huggingface")
    with pytest.raises(UserError, match="is a checkpoint already"):
        import_hf(checkpoint, checkpoint.parent / "again")
