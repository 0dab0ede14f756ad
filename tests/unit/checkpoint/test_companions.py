"""What goes with the weights into checkpoints and exports: data, of the model directory, with the template trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadpo.checkpoint.companions import companion_files, with_template, with_tokenizer
from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.checkpoint.importing import import_hf
from megadpo.errors import UserError
from tests.helpers.models import save_model, save_tokenizer
from tests.helpers.runs import run_settings, save_files, train_each
from tests.helpers.worlds import run_world

OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
OTHER = "{{ messages | length }}"


def tokenizer_directory(directory: Path) -> Path:
    directory.mkdir()
    save_tokenizer(directory)
    return directory


def test_code_pickles_and_weights_are_no_companions(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path / "model")
    kept = (
        "tokenizer.model",
        "tokenizer.model.v3",
        "vocab.json",
        "LICENSE",
        "LICENSE.md",
        "chat_template.jinja",
        "qwen.tiktoken",
    )
    for name in kept:
        (directory / name).write_text("x")
    for name in ("tokenization_own.py", "tokenizer_own.py", "vocab.py", "tokenizer.pkl", "tokenizer.bin", "tokenizer.so"):
        (directory / name).write_text("x")
    for name in (
        "chat_template.py",
        "LICENSE.py",
        "modeling_own.py",
        "tokenizer.safetensors",
        "additional_chat_templates/a.py",
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("x")
    found = companion_files(directory)
    assert set(found) == {"tokenizer.json", "tokenizer_config.json", *kept}
    assert found["tokenizer_config.json"] == (directory / "tokenizer_config.json").read_bytes()


def test_json_that_names_code_comes_without_it(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path / "model")
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"made_by": "kept"}
    written = settings | {"auto_map": {"AutoTokenizer": ["someone/repository--tokenization.Own", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))
    assert json.loads(companion_files(directory)["tokenizer_config.json"]) == settings


@pytest.mark.parametrize("name", ["tokenizer_extra.json", "LICENSE", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_model_directory_is_refused_and_one_within_it_or_into_the_hub_s_cache_followed(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "blobs" / "0123").write_text("blob")
    for directory, target in ((tmp_path / "plain", "inside"), (cache / "snapshots" / "main", cache / "blobs" / "0123")):
        tokenizer_directory(directory)
        (directory / "inside").write_text("inside")
        link = directory / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(target if isinstance(target, Path) else directory / target)
        assert companion_files(directory)[name] in (b"inside", b"blob")
        link.unlink()
        link.symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match=f"{name} is a link to .*secret, outside of the model directory"):
            companion_files(directory)
        link.unlink()
        link.symlink_to(tmp_path / "missing")
        with pytest.raises(UserError, match="outside of the model directory"):
            companion_files(directory)
    (tmp_path / "linked").symlink_to(tokenizer_directory(tmp_path / "elsewhere"))
    assert "tokenizer.json" in companion_files(tmp_path / "linked")


def test_the_template_stands_wherever_a_loader_looks(tmp_path: Path) -> None:
    directory = tokenizer_directory(tmp_path / "model")
    plain = companion_files(directory)
    assert with_template(plain, None) == plain
    assert with_template(plain, OWN) == plain | {"chat_template.jinja": OWN.encode()}
    settings = json.loads(plain["tokenizer_config.json"])
    old = plain | {"tokenizer_config.json": json.dumps(settings | {"chat_template": OTHER}).encode()}
    changed = with_template(old, OWN)
    assert json.loads(changed["tokenizer_config.json"]) == settings | {"chat_template": OWN}
    named = [{"name": "default", "template": OTHER}, {"name": "tool_use", "template": OTHER}]
    old |= {"tokenizer_config.json": json.dumps(settings | {"chat_template": named}).encode()}
    written = json.loads(with_template(old, OWN)["tokenizer_config.json"])["chat_template"]
    assert written == [{"name": "default", "template": OWN}, named[1]]
    assert json.loads(with_template({"chat_template.json": b'{"chat_template": "a"}'}, OWN)["chat_template.json"]) == {
        "chat_template": OWN
    }


def test_a_trained_adapter_s_tokenizer_takes_the_place_of_the_model_s() -> None:
    own = {"tokenizer_config.json": b"a", "chat_template.jinja": b"a", "LICENSE": b"a", "generation_config.json": b"a"}
    assert with_tokenizer(own, {"LICENSE": b"b", "chat_template.jinja": b"b"}) == own
    trained = {"tokenizer_config.json": b"b", "LICENSE": b"b"}
    kept = {"LICENSE": b"a", "generation_config.json": b"a"}
    assert with_tokenizer(own, trained) == kept | {"tokenizer_config.json": b"b"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shared/cases/22: a model with companions of every kind; `run` trains it and `adapter` an adapter of it, with a
    template of the run's own; `again` is a checkpoint's export, `merged` the adapter with the model."""
    root = tmp_path_factory.mktemp("exported")
    model = save_files(root, "llama", 20, dtype=torch.bfloat16) / "model"
    asked = [{"role": "user", "content": "Name a fruit."}]
    rows = [{"prompt": asked, "chosen": f"Pear {n}.", "rejected": f"Plank {n}."} for n in range(8)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "made_by": "kept"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text(OTHER)
    (model / "preprocessor_config.json").write_text('{"image_size": 224}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    (root / "own.jinja").write_text(OWN)
    changes: dict[str, Any] = {
        "model": {"dtype": "bf16"},
        "data": {"chat_template": str(root / "own.jinja")},
        "checkpoint": {"every": 1},
        "train": {"steps": 1, "warmup_steps": 0},
    }
    lora = {"adapter": {"kind": "lora", "rank": 4}}
    runs = [run_settings(root, root / name, **changes, **more) for name, more in (("run", {}), ("adapter", lora))]
    run_world(1, train_each, runs)
    export_checkpoint(next((root / "run" / "checkpoints").glob("step_*")), root / "again")
    merge_adapter(root / "adapter" / "hf", root / "merged")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("where", ["run/hf", "again", "adapter/hf", "merged"])
def test_an_export_has_the_template_that_was_trained_with_and_all_that_the_model_has(where: str, exported: Path) -> None:
    model, directory = exported / "model", exported / where
    assert AutoTokenizer.from_pretrained(directory).get_chat_template() == OWN
    kept = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"}
    for name in kept | {"additional_chat_templates/tool_use.jinja"}:
        assert (directory / name).read_bytes() == (model / name).read_bytes()
    changed = {"chat_template.jinja", "additional_chat_templates", "README.md"}
    weights = {"adapter_config.json", "adapter_model.safetensors"} if where == "adapter/hf" else {"model.safetensors"}
    config = set() if where == "adapter/hf" else {"config.json"}
    assert {path.name for path in directory.iterdir()} - {"README.md"} == (kept | changed | weights | config) - {"README.md"}
    if config:
        assert json.loads((directory / "config.json").read_text()) == json.loads((model / "config.json").read_text())


@pytest.mark.slow
def test_transformers_and_peft_load_an_export_without_a_warning(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.arange(5, 25)[None]
    loaded = {name: AutoModelForCausalLM.from_pretrained(exported / name) for name in ("run/hf", "again", "merged")}
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(exported / "model"), exported / "adapter" / "hf"
    )
    assert not caplog.records
    assert all(model.dtype is torch.bfloat16 for model in loaded.values())
    with torch.no_grad():
        assert torch.equal(loaded["run/hf"](tokens).logits, loaded["again"](tokens).logits)
        theirs = adapted.float()(tokens).logits
        assert (loaded["merged"].float()(tokens).logits - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_an_import_of_a_directory_with_a_link_out_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="outside of the model directory"):
        import_hf(model, tmp_path / "checkpoint")
