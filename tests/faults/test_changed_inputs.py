"""A run that goes on with other files than it began with says so, or is refused; the same command again is safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.errors import UserError
from megadpo.training.setup import prepare
from megadpo.validation.load import load_config
from tests.helpers.models import save_model
from tests.helpers.runs import read_metrics, run_settings, save_files, train_each, train_run
from tests.helpers.worlds import run_world

SHORT = {"steps": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a model, a reference, rows, and a run of two steps with its checkpoint."""
    files = save_files(tmp_path_factory.mktemp("files"), "llama", 30, num_hidden_layers=2)
    save_model(files / "reference", "llama", seed=5, num_hidden_layers=2)
    run_world(1, train_run, settings(files))
    return files


def settings(files: Path, **changes: Any) -> dict[str, Any]:
    changes = {"checkpoint": {"every": 2}, "train": SHORT, "reference": {"path": str(files / "reference")}} | changes
    return run_settings(files, files / "run", **changes)


def one_weight(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})


def config_value(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.01}))


def chat_template(files: Path) -> None:
    (files / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def one_row(files: Path) -> None:
    rows = (files / "train.jsonl").read_text().splitlines(keepends=True)
    (files / "train.jsonl").write_text("".join(rows[:-1]))


CHANGES = {
    "policy weights": (lambda files: one_weight(files / "model"), "the files of model.path"),
    "policy config": (lambda files: config_value(files / "model"), "the files of model.path and the tokenizer"),
    "reference weights": (lambda files: one_weight(files / "reference"), "the files of reference.path"),
    "template of the tokenizer": (chat_template, "the tokenizer"),
    "rows": (one_row, "the training pairs that data.train gives"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named_and_refused_or_accepted(made: Path, tmp_path: Path, change: str) -> None:
    spoil, names = CHANGES[change]
    files = shutil.copytree(made, tmp_path / "files")
    # Paths are part of a run: what has moved as a whole is the same run only where its configuration says so.
    written = files / "run" / "config.yaml"
    written.write_text(written.read_text().replace(str(made), str(files)))
    checkpoint = files / "run" / "checkpoints" / "step_00000002"
    assert prepare(load_config(settings(files))).origin.changed_inputs == ()
    spoil(files)
    with pytest.raises(UserError) as refused:
        prepare(load_config(settings(files)))
    assert str(refused.value).startswith(f"changed since {checkpoint} was made: {names}; put back"), refused.value
    accepted = prepare(load_config(settings(files, checkpoint={"changed_inputs": "accept"})))
    assert " and ".join(accepted.origin.changed_inputs) == names and accepted.resume == checkpoint


def test_another_template_is_another_run(made: Path) -> None:
    other = settings(made)
    other["data"]["chat_template"] = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match=r"holds a different run .data.chat_template"):
        prepare(load_config(other))


def test_of_a_large_file_every_part_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadpo.checkpoint import digest

    monkeypatch.setattr(digest, "WHOLE_BYTES", 1 << 15)
    monkeypatch.setattr(digest, "HEAD_BYTES", 1 << 14)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 1 << 8)
    generator = torch.Generator().manual_seed(0)
    content = bytearray(torch.randint(0, 256, (1 << 18,), dtype=torch.uint8, generator=generator).numpy().tobytes())
    (tmp_path / "file").write_bytes(content)
    found = {digest.file_digest(tmp_path / "file")}
    for start in range(0, len(content), 1 << 13):  # a tensor's worth of changes, anywhere
        changed = content.copy()
        changed[start : start + (1 << 13)] = bytes(1 << 13)
        (tmp_path / "file").write_bytes(changed)
        found.add(digest.file_digest(tmp_path / "file"))
    assert len(found) == 1 + (len(content) >> 13)


def test_inputs_under_other_names_are_accepted_where_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    for name in ("model", "reference"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "train.jsonl", tmp_path / "renamed.jsonl")
    moved = {
        "model": {"path": str(tmp_path / "model")},
        "reference": {"path": str(tmp_path / "reference")},
        "data": {"train": str(tmp_path / "renamed.jsonl")},
    }
    for section, change in moved.items():
        with pytest.raises(UserError, match=rf"holds a different run .{section}\..*set checkpoint.changed_inputs to accept"):
            prepare(load_config(settings(made, **({"reference": {"path": str(made / "reference")}} | {section: change}))))
    accepted = prepare(load_config(settings(made, **moved, checkpoint={"changed_inputs": "accept"})))
    assert accepted.origin.changed_inputs == (), "they are the same in all but name"
    assert accepted.resume == made / "run" / "checkpoints" / "step_00000002"
    with pytest.raises(UserError, match=r"holds a different run .train\.learning_rate.*remove this one$"):
        learning_faster = {"train": SHORT | {"learning_rate": 0.5}, "checkpoint": {"changed_inputs": "accept"}}
        prepare(load_config(settings(made, **learning_faster)))


@pytest.mark.slow
def test_the_same_command_again_never_loses_what_came_of_it(tmp_path: Path) -> None:
    files = save_files(tmp_path, "llama", 60, num_hidden_layers=2)

    def run(name: str, steps: int, resume: str) -> dict[str, Any]:
        checkpoint = {"every": 1, "keep": 2, "resume": resume}
        return run_settings(files, tmp_path / name, train={"steps": 8, "warmup_steps": 0}, checkpoint=checkpoint)

    first = tmp_path / "first"
    whole = run_world(1, train_run, run("first", 8, "auto"))[0]
    shutil.copytree(first, tmp_path / "apart")
    began = tmp_path / "apart" / "checkpoints" / "step_00000007"
    # Begun in another directory from a checkpoint, broken off, and given the same command again.
    again = run("second", 8, str(began))
    run_world(1, train_run, again)
    shutil.rmtree(tmp_path / "apart")  # not needed any more
    records = run_world(1, train_each, [again, again])[0]
    assert records[0] == records[1] == whole[7:]
    assert [path.name for path in sorted((tmp_path / "second" / "checkpoints").iterdir())] == ["step_00000008"]
    # Another beginning: what came of the first one is set aside, even where it is no later, and its metrics too.
    assert run_world(1, train_run, run("second", 8, str(first / "checkpoints" / "step_00000008")))[0] == []
    assert [path.parent.name for path in (tmp_path / "second").rglob("step_00000008")] == ["aside-1"]
    assert len((tmp_path / "second" / "metrics.1.jsonl").read_text().splitlines()) == len(whole[7:])


@pytest.mark.slow
def test_going_back_in_the_same_directory_happens_once(tmp_path: Path) -> None:
    files = save_files(tmp_path, "llama", 60, num_hidden_layers=2)

    def run(resume: str) -> dict[str, Any]:
        checkpoint = {"every": 1, "keep": 2, "resume": resume}
        return run_settings(files, tmp_path / "run", train={"steps": 6, "warmup_steps": 0}, checkpoint=checkpoint)

    checkpoints = tmp_path / "run" / "checkpoints"
    whole = run_world(1, train_run, run("auto"))[0]
    back = run(str(checkpoints / "step_00000005"))
    run_world(1, train_run, back)
    assert sorted(path.name for path in checkpoints.glob("*/step_*")) == ["step_00000006"], "set aside"
    run_world(1, train_run, back)
    assert sorted(path.name for path in checkpoints.glob("aside-*")) == ["aside-1"], "not set aside once more"
    assert read_metrics(tmp_path / "run") == whole
