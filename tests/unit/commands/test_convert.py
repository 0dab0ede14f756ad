"""`megadpo convert verify | inspect | doctor`: what they say, and their exit status."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.checkpoint.convert import export_megatron
from megadpo.checkpoint.importing import import_hf
from megadpo.cli import main
from megadpo.errors import UserError
from megadpo.evaluation.verify import verify, worst_difference
from tests.helpers.models import save_model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convert")
    save_model(root / "model")
    (root / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    import_hf(root / "model", root / "checkpoint", num_tensor=2)
    return root


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "model", tmp_path / "model"))


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """The exit status, and the JSON object."""
    capsys.readouterr()
    status = main(["convert", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.slow
def test_verify_compares_tensors_and_log_probs_of_transformers_with_ours(
    root: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdict = said(["verify", str(root / "model"), str(root / "checkpoint")], capsys)
    assert status == 0 and verdict["same"] and verdict["num_equal"] == verdict["num_tensors"] == 39
    assert len(verdict["logps"]) == 8 and all(a < 0 and a == pytest.approx(b, abs=1e-2) for a, b in verdict["logps"])
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model.parent / "text").write_text("The harbour is quiet at dawn and the ferry leaves at six.\n")
    status, verdict = said(["verify", str(model), str(root / "checkpoint"), "--text", str(model.parent / "text")], capsys)
    assert status == 1 and not verdict["same"] and verdict["num_equal"] == 38 and len(verdict["logps"]) == 2
    assert verdict["largest"] == [pytest.approx(0.5), "model.layers.2.mlp.up_proj.weight"]


def test_a_log_prob_that_is_no_number_is_a_difference() -> None:
    assert worst_difference([-1.0, -2.0], [-1.0, -2.0], [5, 5], 1e-4) == 0
    assert worst_difference([-1.0, math.nan], [-1.0, math.nan], [5, 5], 1e-4) == math.inf
    assert worst_difference([math.nan, -2.0], [-1.0, -2.0], [5, 5], 1e-4) == math.inf


def test_reward_models_have_no_log_probs_to_verify(model: Path) -> None:
    change_config(model, architectures=["LlamaForSequenceClassification"], num_labels=1)
    with pytest.raises(UserError, match=r"is a reward model .* it gives no log-probs"):
        verify(str(model), str(model))


def test_inspect_says_what_a_directory_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, facts = said(["inspect", str(root / "model"), "--tensors"], capsys)
    assert status == 0 and facts["is"] == "Hugging Face model" and facts["family"] == "llama" and facts["layers"] == 4
    tensors = load_file(root / "model" / "model.safetensors")
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bytes"] == {"float32": 4 * facts["parameters"]} and facts["each"].keys() == tensors.keys()
    status, facts = said(["inspect", str(root / "checkpoint")], capsys)
    assert facts["is"] == "checkpoint of megadpo" and facts["kinds"] == ["weights"] and facts["tensors"] == 39
    assert main(["convert", "inspect", str(root / "model"), "--tensors"]) == 0
    assert "model.norm.weight  [64]  float32" in capsys.readouterr().out.splitlines()


def failures(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    status, found = said(["doctor", str(directory)], capsys)
    assert found["ok"] is (status == 0)
    return status, {check["name"]: check["found"] for check in found["checks"] if check["status"] != "ok"}


def test_doctor_finds_nothing_wrong_with_what_would_be_trained(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (root / "model", root / "checkpoint"):
        status, found = failures(directory, capsys)
        assert status == 0 and not found.keys() - {"tokenizer class"}, found


def test_doctor_names_all_that_is_missing_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors |= {"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2), "extra": torch.ones(2)}
    save_file(tensors, model / "model.safetensors")
    (model / "tokenizer.json").unlink()
    status, found = failures(model, capsys)
    assert status == 1 and found.keys() == {"weights", "tokenizer"}
    for words in ("no tensor model.norm.weight", "up_proj.weight has shape [2, 2]", "the first is extra"):
        assert words in found["weights"]
    change_config(model, hidden_act="relu")
    status, found = failures(model, capsys)
    assert status == 1 and "hidden_act is 'relu'" in found["config"]
    (model / "model.safetensors").unlink()
    change_config(model, architectures=["NewForCausalLM"], model_type="new")
    status, found = failures(model, capsys)
    assert "NewForCausalLM" in found["config"] and "has no weights" in found["weights"]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_doctor_reports_of_a_config_that_is_no_json(model: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text(content)
    status, report = said(["doctor", str(model)], capsys)
    failed = [check for check in report["checks"] if check["status"] == "failed"]
    assert status == 1 and failed[0]["name"] == "config" and "config.json" in failed[0]["found"]
    assert failed[0]["fix"].startswith("Fetch config.json anew")


OTHERS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "empty": ((), "is empty", "Fetch the model into it"),
    "peft": (("adapter_config.json",), "is an adapter of PEFT", "megadpo convert merge {}"),
    "torch_dist": ((".metadata", "__0_0.distcp"), "checkpoint of Megatron-core", "megadpo convert import {} OUT --config"),
    "gguf": (("model.gguf",), "it has a GGUF file", "Give what the sentence says"),
    "no config": (("README.md",), "config.json is missing", "Put the model's config.json"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_doctor_says_what_to_do_with_other_directories(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, found, fix = OTHERS[name]
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    status, report = said(["doctor", str(tmp_path)], capsys)
    first = report["checks"][0]
    assert status == 1 and found in first["found"] and fix.format(tmp_path) in first["fix"], first


def test_verify_says_what_to_run_first_with_other_directories(root: Path, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    export_megatron(root / "model", tmp_path / "megatron")
    for path, words in ((tmp_path / "peft", "convert merge"), (tmp_path / "megatron", "convert import")):
        for pair in ((path, root / "model"), (root / "model", path)):
            with pytest.raises(UserError, match=f"verify compares Hugging Face directories .* `megadpo {words} {path} OUT"):
                verify(*map(str, pair))


def test_doctor_tells_of_a_tokenizer_that_servers_do_not_load(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for name, is_told in (("TokenizersBackend", True), ("PreTrainedTokenizerFast", False)):
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": name}))
        status, found = failures(model, capsys)
        assert status == 0 and ("tokenizer class" in found) is is_told
