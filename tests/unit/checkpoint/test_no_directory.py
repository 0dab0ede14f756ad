"""What is given as a model and is none is recognised, and answered in a sentence with what to give."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.errors import UserError
from megadpo.training.models import check_is_directory

FILES = {
    "model-q4.gguf": "it is a GGUF file, weights in the format of llama.cpp, which are not trained; give a Hugging Face",
    "model.safetensors": "it is one file of a model; give a Hugging Face model directory",
    "pytorch_model.bin": "it is a pickle, which could run code and is never read; save the model by",
    "model.pt": "it is a pickle",
    "model.pth": "it is a pickle",
    "model.nemo": "it is an archive of NeMo; export it to Hugging Face",
    "model.yaml": "it is a file; give a Hugging Face model directory",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_said_what_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        check_is_directory(str(tmp_path / name), "model.path")
    assert str(caught.value).startswith(f"model.path: {tmp_path / name} is no directory: {FILES[name]}")
    with pytest.raises(UserError, match="is not a directory; it is "):
        read_hf_config(tmp_path / name)


def test_a_file_of_a_model_or_an_adapter_leads_to_its_directory(tmp_path: Path) -> None:
    for folder, name, config in (
        ("model", "model-00001-of-00002.safetensors", "config.json"),
        ("adapter", "adapter_model.safetensors", "adapter_config.json"),
        ("both", "pytorch_model.bin", "config.json"),
    ):
        (tmp_path / folder).mkdir()
        for file in (name, config, "model.safetensors"):
            (tmp_path / folder / file).write_bytes(b"{}")
        assert str(why_no_model(tmp_path / folder / name)).endswith(f"give the directory that it is in, {tmp_path / folder}")


def made(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"{}")
    return root


DIRECTORIES: dict[tuple[str, ...], str] = {
    ("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"): "it is a checkpoint of Megatron-LM",
    ("mp_rank_00/model_optim_rng.pt",): "it is a checkpoint of Megatron-LM in a format of its own; save it by",
    (
        "__0_0.distcp",
        ".metadata",
    ): "it is a distributed checkpoint of torch or Megatron (torch_dist); `megadpo convert",
    ("iter_0000010/.metadata",): "it is a distributed checkpoint of torch or Megatron (torch_dist); `megadpo convert",
    ("latest", "global_step9/mp_rank_00_model_states.pt"): "it is a checkpoint of DeepSpeed; `python zero_to_fp32.py --safe",
    ("zero_pp_rank_0_mp_rank_00_optim_states.pt",): "it is a checkpoint of DeepSpeed",
    (
        "hf/config.json",
        "checkpoints/step_00000002/checkpoint.json",
    ): "it is the directory of a run; the trained model is",
    ("hf/adapter_config.json",): "it is the directory of a run; the trained model is",
    (
        "step_00000002/checkpoint.json",
        "step_00000010/checkpoint.json",
    ): "it holds checkpoints of a run; give one of them, such as {}/step_00000010",
    (
        "checkpoint-90/config.json",
        "checkpoint-100/config.json",
    ): "it holds checkpoints of transformers' Trainer; give one of them, such as {}/checkpoint-100",
    ("snapshots/abc/config.json", "blobs/x"): "it is a folder of the Hub's cache; give the snapshot in it, {}/snapshots/abc",
    ("consolidated.00.pth", "params.json"): "it has Llama's weights as Meta gives them",
    ("model-q4.gguf",): "it has a GGUF file",
    ("model.safetensors",): "it has weights but no config.json",
}


@pytest.mark.parametrize("files", DIRECTORIES, ids=lambda files: files[0])
def test_a_directory_without_a_config_is_said_what_it_is(files: tuple[str, ...], tmp_path: Path) -> None:
    made(tmp_path, *files)
    with pytest.raises(UserError) as caught:
        read_hf_config(tmp_path)
    start = f"{tmp_path / 'config.json'} is missing; {tmp_path} is not a Hugging Face model directory: "
    assert str(caught.value).startswith(start + DIRECTORIES[files].format(tmp_path)), str(caught.value)


def test_of_nothing_known_nothing_is_said(tmp_path: Path) -> None:
    assert why_no_model(tmp_path) is None and why_no_model(tmp_path / "missing") is None
    with pytest.raises(
        UserError, match=r"there is no directory .*missing; give a local Hugging Face model directory, or an id of the Hub$"
    ):
        check_is_directory(str(tmp_path / "missing"), "model.path")


def test_a_model_directory_with_a_gguf_alone_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no weights: .*; it has a GGUF file"):
        open_hf(made(tmp_path, "config.json", "model-q4.gguf"))
