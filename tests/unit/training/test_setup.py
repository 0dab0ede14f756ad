"""What can be put right is said before minutes of tokenising: held-out rows, templates, tokenizers and training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from megadpo.training import setup
from megadpo.training.setup import prepare
from megadpo.validation.load import load_config
from tests.helpers.models import save_model
from tests.helpers.runs import run_settings, save_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 20)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"eval": "missing.jsonl"}, "data: missing.jsonl does not exist"),
        ({"eval": "bad.jsonl"}, "bad.jsonl:1: the row lacks `rejected`"),
        ({"eval": ["eval.jsonl", "bad.jsonl"]}, "bad.jsonl:1: the row lacks `rejected`"),
        ({"eval": "train-only"}, "has no held-out split to evaluate on; it has train"),
        (
            {"chat_template": "missing.jinja"},
            "data.chat_template: .*missing.jinja is neither a readable file",
        ),
        ({"train": "*.csv"}, r"data: no file fits .*\*.csv"),
    ],
)
def test_sources_and_templates_are_looked_at_before_anything_is_tokenised(
    data: dict[str, Any], sentence: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    (files / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    (files / "train-only").mkdir(exist_ok=True)
    (files / "train-only" / "train.jsonl").write_bytes((files / "eval.jsonl").read_bytes())
    monkeypatch.setattr(setup, "prepare_groups", lambda *_: pytest.fail("rows were tokenised first"))
    with pytest.raises(UserError, match=sentence):
        prepare(load_config(run_settings(files, tmp_path / "run", data=data)))
    assert not (tmp_path / "run").exists()


def test_a_directory_is_trained_and_evaluated_on_by_its_splits(files: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = (files / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows[:12]))
    (tmp_path / "data" / "test.jsonl").write_text("".join(rows[12:20]))
    both = {"train": str(tmp_path / "data"), "eval": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    made = prepare(load_config(run_settings(files, tmp_path / "run", data=both)))
    assert (made.reports["train"].num_rows, made.reports["eval"].num_rows) == (12, 8)
    assert made.reports["train"].remarks()[0].endswith("the train split: train.jsonl, 1 other file left out")
    assert made.reports["eval"].remarks()[0].endswith("the test split: test.jsonl, 1 other file left out")


def test_a_reference_with_another_tokenizer_is_refused_before_anything_is_tokenised(files: Path, tmp_path: Path) -> None:
    reference = save_model(tmp_path / "reference")
    tokenizer = json.loads((reference / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (reference / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"reference.path: the tokenizer of .*reference reads token id \d+ as '[ab]'"):
        prepare(load_config(run_settings(files, tmp_path / "run", reference={"path": str(reference)})))
