"""Checkpoints of Megatron-core: what it writes is read here, what is written here it reads, bit for bit in every layout."""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import MetadataIndex
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.convert import export_checkpoint, export_megatron
from megadpo.checkpoint.hf import read_hf_config
from megadpo.checkpoint.importing import ImportOptions, _open_import, import_model
from megadpo.checkpoint.megatron import MegatronSource
from megadpo.checkpoint.torch_dist import TorchDistFiles, torch_dist_directory
from megadpo.checkpoint.torch_dist_writer import TorchDistWriter
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model
from tests.helpers.worlds import run_world
from tests.unit.checkpoint.megatron_worker import Case, load_each, save_each

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"dtype": torch.bfloat16}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("mixtral", {}),
    "shared experts": ("glm4_moe", {"first_k_dense_replace": 0, "num_experts_per_tok": 4}),
}
LAYOUTS = ((2, 1), (1, 2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and in `ours/` what is written of them here, in the layers' usual form."""
    root = tmp_path_factory.mktemp("megatron")
    for name, (family, changes) in MODELS.items():
        save_model(root / name, family, tokenizer=name == "qwen3", **changes)
        export_megatron(root / name, root / "ours" / name)
    return root


def check_saved(root: Path, cases: list[Case], tmp_path: Path) -> None:
    """What Megatron-core has saved becomes the Hugging Face model that it was filled from."""
    for number, case in enumerate(cases):
        checkpoint, out = tmp_path / f"checkpoint-{number}", tmp_path / f"hf-{number}"
        import_model(case.directory, checkpoint, ImportOptions(2, 2, config=str(case.model)))
        export_checkpoint(checkpoint, out)
        assert_same(tensors_of(out), tensors_of(case.model))
        assert (out / "config.json").read_text() == (case.model / "config.json").read_text()


@pytest.mark.slow
def test_in_one_process_both_ways_for_layers_that_are_stacked_and_by_number(root: Path, tmp_path: Path) -> None:
    saved = [Case(root / name, tmp_path / name) for name in MODELS]
    saved.append(Case(root / "qwen3", tmp_path / "by-number", is_stacked=False))
    run_world(1, save_each, saved)
    check_saved(root, saved, tmp_path)
    loaded = [Case(root / name, root / "ours" / name / "release") for name in MODELS]
    assert run_world(1, load_each, loaded) == [[[]] * len(MODELS)]


@pytest.mark.slow
def test_two_processes_that_part_tensors_or_layers(root: Path, tmp_path: Path) -> None:
    saved = [Case(root / name, tmp_path / f"{name}-{a}{b}", a, b) for name in MODELS for a, b in LAYOUTS]
    run_world(2, save_each, saved)
    check_saved(root, saved, tmp_path)
    loaded = [Case(root / name, root / "ours" / name / "release", a, b) for name in MODELS for a, b in LAYOUTS]
    assert run_world(2, load_each, loaded) == [[[]] * len(loaded)] * 2


@pytest.mark.exhaustive
def test_four_processes_that_part_both(root: Path, tmp_path: Path) -> None:
    saved = [Case(root / name, tmp_path / name, 2, 2) for name in MODELS]
    run_world(4, save_each, saved)
    check_saved(root, saved, tmp_path)
    loaded = [Case(root / name, root / "ours" / name / "release", 2, 2) for name in MODELS]
    assert run_world(4, load_each, loaded) == [[[]] * len(loaded)] * 4


def test_what_is_written_comes_back_with_its_tokenizer_and_any_slice_is_the_tensor_s(root: Path, tmp_path: Path) -> None:
    ours = root / "ours" / "qwen3"
    assert torch_dist_directory(ours) == ours / "release"
    import_model(ours, tmp_path / "checkpoint", ImportOptions())
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (root / "qwen3").iterdir() if path.suffix != ".safetensors"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir() if path.suffix != ".safetensors"} == before
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name in ("qwen3", "experts"):
        source = MegatronSource(root / "ours" / name / "release", shape_of(read_hf_config(root / name)))
        for tensor, whole in load_file(root / name / "model.safetensors").items():
            assert source.shape(tensor) == tuple(whole.shape) and source.dtype(tensor) is whole.dtype
            for dim in range(whole.ndim):
                start, length = whole.shape[dim] // 3, whole.shape[dim] // 2
                assert torch.equal(source.read(tensor, dim, start, length), whole.narrow(dim, start, length)), tensor


def test_it_is_written_in_another_type_and_from_a_checkpoint(root: Path, tmp_path: Path) -> None:
    import_model(root / "qwen3", tmp_path / "checkpoint", ImportOptions(2))
    export_megatron(tmp_path / "checkpoint", tmp_path / "out", torch.float32)
    files = TorchDistFiles(tmp_path / "out" / "release")
    assert {tensor.dtype for tensor in files.tensors.values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "huggingface" / "config.json").read_text())["dtype"] == "float32"
    import_model(tmp_path / "out", tmp_path / "again", ImportOptions(dtype=torch.bfloat16))
    assert_same(tensors_of(tmp_path / "again"), tensors_of(root / "qwen3"))


@pytest.fixture
def ours(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "ours" / "qwen3", tmp_path / "ours"))


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.path),)


def test_code_in_its_pickles_is_refused_and_not_run(ours: Path, tmp_path: Path) -> None:
    (ours / "release" / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "was-run")))
    with pytest.raises(UserError, match=r"\.metadata is damaged, or names what no such file is made of \(posix\.mkdir\)"):
        import_model(ours, tmp_path / "out", ImportOptions())
    (tmp_path / "bad").mkdir()
    writer = TorchDistWriter(tmp_path / "bad")
    writer.add("a", (3,), (0,), torch.ones(3))
    writer._write(MetadataIndex("a", (0,), 0), Runs(tmp_path / "was-run"))
    writer.finish({"args": Runs(tmp_path / "was-run")})
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged at the tensor a"):
        TorchDistFiles(tmp_path / "bad").read("a", [0], [3])
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "out").exists()


def writes_into(module: str, name: str) -> bytes:
    """A pickle that writes an attribute into what it names."""
    state = b"N}X\x04\x00\x00\x00nameX\x08\x00\x00\x00a.distcps\x86b."  # (None, {"name": "a.distcp"}), BUILD
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + state


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pathlib", "PurePosixPath"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch", "float32"),
    ],
)
def test_a_pickle_that_writes_into_what_it_names_writes_into_nothing_of_ours(ours: Path, module: str, name: str) -> None:
    owner = getattr(importlib.import_module(module), name)
    before = {key: value for key, value in vars(owner).items() if key == "name"} if hasattr(owner, "__dict__") else {}
    (ours / "release" / ".metadata").write_bytes(writes_into(module, name))
    with pytest.raises(UserError, match=r"\.metadata"):
        TorchDistFiles(ours / "release")
    after = {key: value for key, value in vars(owner).items() if key == "name"} if hasattr(owner, "__dict__") else {}
    assert before == after and Path("/x/y").name == "y"


def test_a_model_of_more_layers_than_its_config_says_is_not_cut(root: Path, ours: Path, tmp_path: Path) -> None:
    config = json.loads((ours / "huggingface" / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    for number in (num_layers - 1, num_layers + 1):
        other = config | {"num_hidden_layers": number, "layer_types": ["full_attention"] * number}
        (ours / "huggingface" / "config.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=f"has {num_layers} layers, but its config says {number}; give the config"):
            import_model(ours, tmp_path / "out", ImportOptions())


def test_an_import_goes_on_with_the_same_numbers_only(ours: Path, tmp_path: Path) -> None:
    """The .metadata of two iterations is the same."""
    options = ImportOptions()
    first = _open_import(ours, options).digest
    assert first == _open_import(ours, options).digest
    data = ours / "release" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    second = _open_import(ours, options).digest
    change = json.loads((ours / "huggingface" / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (ours / "huggingface" / "config.json").write_text(json.dumps(change))
    assert len({first, second, _open_import(ours, options).digest}) == 3


def test_damage_and_another_model_are_named(root: Path, ours: Path, tmp_path: Path) -> None:
    data = ours / "release" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"__0_0\.distcp is damaged at the tensor"):
        import_model(ours, tmp_path / "out", ImportOptions())
    data.write_bytes(content)
    llama = save_model(tmp_path / "llama", tokenizer=False, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"release has the tensor decoder\.layers\.self_attention\.linear_qkv\.bias, which"):
        import_model(root / "ours" / "tied", tmp_path / "out", ImportOptions(config=str(llama)))
    export_megatron(llama, tmp_path / "of-llama")
    with pytest.raises(UserError, match=r"no tensor decoder\.layers\.self_attention\.linear_qkv\.bias"):
        import_model(tmp_path / "of-llama", tmp_path / "out", ImportOptions(config=str(root / "tied")))
    with pytest.raises(UserError, match=r"linear_proj\.weight has shape \[64, 64\], but its config asks for \[64, 128\]"):
        import_model(root / "ours" / "tied", tmp_path / "out", ImportOptions(config=str(root / "qwen3")))
    config = json.loads((ours / "huggingface" / "config.json").read_text())
    (ours / "huggingface" / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    with pytest.raises(
        UserError, match=r"word_embeddings\.weight has shape \[499, 64\], but its config asks for \[600, 64\]"
    ):
        import_model(ours, tmp_path / "out", ImportOptions())
    shutil.rmtree(ours / "huggingface")
    with pytest.raises(UserError, match="by --config DIR"):
        import_model(ours, tmp_path / "out", ImportOptions())
    (ours / "release" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(UserError, match="format 'zarr'; only torch_dist is read"):
        import_model(ours, tmp_path / "out", ImportOptions(config=str(root / "qwen3")))
    with pytest.raises(UserError, match="--config is for checkpoints of Megatron-core"):
        import_model(root / "qwen3", tmp_path / "out", ImportOptions(config=str(root / "qwen3")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_its_metadata_names_no_file_elsewhere(ours: Path) -> None:
    path = ours / "release" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../../abc.de"))
    with pytest.raises(UserError, match=r"only \.distcp files beside it are read"):
        TorchDistFiles(ours / "release")
