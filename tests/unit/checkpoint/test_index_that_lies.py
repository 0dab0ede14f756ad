"""Sharded safetensors whose index and files disagree (shared/cases/23): refused by name, or read as transformers does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.hf import directory_warning, read_hf_config
from megadpo.checkpoint.sharded import open_weights
from megadpo.errors import UserError
from megadpo.model.families import check_tensors, shape_of
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model

INDEX = "model.safetensors.index.json"
NORM, UP = "model.norm.weight", "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` in one file, `good` the same in several, `other` with other weights."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "whole", tokenizer=False)
    save_model(root / "other", tokenizer=False, seed=8)
    AutoModelForCausalLM.from_pretrained(root / "whole").save_pretrained(root / "good", max_shard_size="100KB")
    return root


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "good", tmp_path / "model"))


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("model-*.safetensors"))


def change_map(model: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def opened(model: Path) -> dict[str, torch.Tensor]:
    check_tensors(shape_of(read_hf_config(model)), open_weights(model))
    return tensors_of(model)


def add_to_a_file(model: Path) -> None:
    tensors = load_file(shards(model)[0])
    save_file(tensors | {"model.layers.4.input_layernorm.weight": torch.ones(64)}, shards(model)[0])


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard_missing": (lambda m: shards(m)[1].unlink(), r"model-00002-of-.* is missing"),
    "ghost_entry": (
        lambda m: change_map(m, lambda names: names.update({UP.format(4): shards(m)[0].name})),
        r"model-00001-of-.*no tensor model\.layers\.4\.mlp\.up_proj\.weight",
    ),
    "entry_missing": (lambda m: change_map(m, lambda names: names.pop(NORM)), r"no tensor model\.norm\.weight"),
    "wrong_file": (
        lambda m: change_map(m, lambda names: names.update({NORM: shards(m)[0].name})),
        r"model-00001-of-.* has no tensor model\.norm\.weight",
    ),
    "path_escape": (
        lambda m: change_map(m, lambda names: names.update({NORM: "../whole/model.safetensors"})),
        "only .safetensors files beside it are read",
    ),
    "truncated": (lambda m: shards(m)[0].write_bytes(shards(m)[0].read_bytes()[:-7]), "model-00001-of-.* is truncated"),
    "lfs_pointer": (
        lambda m: shards(m)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model-00001-of-.* is a pointer of Git LFS",
    ),
    "boundary_shard_dropped": (
        lambda m: change_map(m, lambda names: [names.pop(UP.format(layer)) for layer in (1, 2)]),
        r"no tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_it_is_refused_with_file_and_tensor(name: str, model: Path) -> None:
    change, sentence = LIES[name]
    change(model)
    with pytest.raises(UserError, match=sentence):
        opened(model)


def test_shards_hold_what_the_whole_holds_and_what_no_index_names_is_not_read(root: Path, model: Path) -> None:
    assert_same(opened(model), tensors_of(root / "whole"))
    add_to_a_file(model)
    assert_same(opened(model), tensors_of(root / "whole"))


def test_of_a_file_and_shards_the_file_is_read_as_by_transformers_and_it_is_said(root: Path, model: Path) -> None:
    assert directory_warning(model) is None
    shutil.copy(root / "other" / "model.safetensors", model)
    assert "weights twice" in str(directory_warning(model))
    found = opened(model)
    assert_same(found, tensors_of(root / "other"))
    assert_same(found, dict(AutoModelForCausalLM.from_pretrained(model).named_parameters()))
    change_map(model, lambda names: names.update(dict.fromkeys(names, "model.safetensors")))
    assert directory_warning(model) is None
