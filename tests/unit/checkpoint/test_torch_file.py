"""Weights that torch.save has written: read as their safetensors are, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import megadpo
from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.digest import model_files_digest
from megadpo.checkpoint.hf import directory_warning, open_hf
from megadpo.checkpoint.importing import import_hf
from megadpo.errors import UserError
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "whole", tokenizer=False, num_hidden_layers=2)


def pickled(whole: Path, directory: Path, num_files: int = 1) -> Path:
    """The same model as torch.save writes it."""
    directory.mkdir()
    (directory / "config.json").write_bytes((whole / "config.json").read_bytes())
    tensors = load_file(whole / "model.safetensors")
    if num_files == 1:
        torch.save(tensors, directory / BIN)
        return directory
    names = sorted(tensors)
    files = {name: f"pytorch_model-{number % num_files}.bin" for number, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": files}))
    return directory


@pytest.mark.parametrize("num_files", [1, 3])
def test_they_are_the_same_tensors_with_a_warning_and_become_safetensors(
    num_files: int, whole: Path, tmp_path: Path
) -> None:
    model = pickled(whole, tmp_path / "model", num_files)
    assert "restricted unpickler" in str(directory_warning(model))
    assert_same(tensors_of(model), tensors_of(whole))
    before = model_files_digest(model, model)
    import_hf(model, tmp_path / "checkpoint", num_tensor=2)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(whole))
    assert not list(tmp_path.glob("hf/*.bin")) and directory_warning(tmp_path / "hf") is None
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert_same(dict(loaded.named_parameters()), tensors_of(model))
    for file in model.glob("*.bin"):
        torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)
    assert model_files_digest(model, model) != before, "caches and resumed runs see a change"


def test_safetensors_go_first(whole: Path, tmp_path: Path) -> None:
    model = pickled(whole, tmp_path / "model")
    (model / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    (model / BIN).write_bytes(b"not looked at")
    assert_same(tensors_of(model), tensors_of(whole))


def test_a_file_is_mapped_until_it_is_released(whole: Path, tmp_path: Path) -> None:
    source = open_hf(pickled(whole, tmp_path / "model"))
    first = source.read("model.norm.weight", 0, 3, 4).clone()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    source.release()
    assert not maps.exists() or str(tmp_path) not in maps.read_text()
    assert torch.equal(source.read("model.norm.weight", 0, 3, 4), first)


WRONG: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "code": (lambda file, there: torch.save({"a": Runs(there)}, file), "a pickle that holds more than tensors"),
    "a plain pickle": (lambda file, there: file.write_bytes(pickle.dumps(Runs(there))), "truncated, or was written by"),
    "an old file": (
        lambda file, there: torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False),
        "a torch before 1.6",
    ),
    "a truncated file": (lambda file, there: file.write_bytes(file.read_bytes()[:-300]), "truncated"),
    "one tensor": (lambda file, there: torch.save(torch.ones(3), file), "holds a Tensor, not tensors by name"),
    "a trainer's state": (lambda file, there: torch.save({"model": {"a": torch.ones(3)}}, file), "'model' is no plain"),
    "a number": (lambda file, there: torch.save({"a": 3}, file), "'a' is no plain tensor"),
    "a sparse tensor": (lambda file, there: torch.save({"a": torch.eye(3).to_sparse()}, file), "'a' is no plain tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_tensors_is_refused_and_not_run(name: str, whole: Path, tmp_path: Path) -> None:
    change, sentence = WRONG[name]
    model = pickled(whole, tmp_path / "model")
    change(model / BIN, tmp_path / "was-run")
    with pytest.raises(UserError, match=sentence) as caught:
        open_hf(model)
    assert str(model / BIN) in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


def test_an_index_of_pickles_stays_in_its_directory_too(whole: Path, tmp_path: Path) -> None:
    model = pickled(whole, tmp_path / "model", 2)
    index = json.loads((model / INDEX).read_text())
    for file in ("../whole.bin", "/etc/passwd", "model.safetensors"):
        (model / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"model.norm.weight": file}}))
        with pytest.raises(UserError, match=r"only \.bin files beside it are read"):
            open_hf(model)


def test_nothing_else_is_unpickled() -> None:
    package = Path(megadpo.__file__).parent
    texts = {path.name: path.read_text() for path in package.rglob("*.py")}
    assert {name for name, text in texts.items() if "torch.load(" in text} == {"torch_file.py", "torch_dist.py"}
    assert {name for name, text in texts.items() if re.search(r"pickle\.loads?\(|Unpickler\(", text)} == {"torch_dist.py"}
