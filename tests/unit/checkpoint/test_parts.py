"""Conversions in parts: one that was killed goes on where it was, several processes give the same bytes as one."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.checkpoint import convert, importing
from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.importing import ImportOptions, import_model
from megadpo.checkpoint.parts import in_parts
from megadpo.checkpoint.staging import staging
from megadpo.errors import UserError
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model

FOUR = ImportOptions(2, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model", tokenizer=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Ctrl-C in the part after so many; the list of those that are begun."""
    begun: list[str] = []
    whole = getattr(module, name)

    def work(*arguments: Any, **named: Any) -> Any:
        if len(begun) == count:
            raise KeyboardInterrupt
        begun.append(arguments[-1])
        return whole(*arguments, **named)

    monkeypatch.setattr(module, name, work)
    return begun


def test_an_import_goes_on_with_the_parts_that_are_not_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(model, tmp_path / "whole", FOUR)
    with monkeypatch.context() as patched:
        killed_after(2, patched, importing, "_import_part")
        with pytest.raises(KeyboardInterrupt):
            import_model(model, tmp_path / "out", FOUR)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.tmp").glob("*.part"))) == 2
    damaged = sorted((tmp_path / "out.tmp").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    with monkeypatch.context() as patched:
        begun = killed_after(9, patched, importing, "_import_part")
        import_model(model, tmp_path / "out", FOUR)
    assert begun == ["pp00-tp00", "pp01-tp00", "pp01-tp01"], "the one that is whole is not written again"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.tmp").exists()


def test_another_model_or_other_options_begin_anew(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_model(tmp_path / "other", tokenizer=False, seed=1)
    for one, options in ((other, FOUR), (model, ImportOptions(2, 2, dtype=torch.bfloat16)), (model, ImportOptions(1, 2))):
        with monkeypatch.context() as patched:
            killed_after(1, patched, importing, "_import_part")
            with pytest.raises(KeyboardInterrupt):
                import_model(model, tmp_path / "out", FOUR)
        with monkeypatch.context() as patched:
            begun = killed_after(9, patched, importing, "_import_part")
            import_model(one, tmp_path / "out", options)
        assert len(begun) == options.num_tensor * options.num_pipeline
        (tmp_path / "out").rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")


def test_an_export_goes_on_with_the_files_that_are_not_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert.plan_export
    monkeypatch.setattr(convert, "plan_export", lambda *given: whole(*given, max_shard_bytes=150_000))
    import_model(model, tmp_path / "checkpoint", FOUR)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    with monkeypatch.context() as patched:
        killed_after(2, patched, convert, "_export_file")
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    with monkeypatch.context() as patched:
        begun = killed_after(99, patched, convert, "_export_file")
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    assert len(begun) == len(list((tmp_path / "whole").glob("*.safetensors"))) - 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_processes_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    import_model(model, tmp_path / "one", FOUR)
    import_model(model, tmp_path / "two", ImportOptions(2, 2, num_processes=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert_same(tensors_of(tmp_path / "two"), tensors_of(model))


def test_a_part_that_fails_ends_all(tmp_path: Path) -> None:
    def work(name: str) -> dict[str, Any]:
        if name == "b":
            raise ValueError(name)
        return {"files": {}}

    with pytest.raises(ValueError, match="b"):
        in_parts(tmp_path / "out", {}, ["a", "b", "c"], work, 1)
    assert json.loads((tmp_path / "out.tmp" / "a.part").read_text()) == {"files": {}}
    assert not (tmp_path / "out.tmp" / "c.part").exists()


def _killed_at_last(directory: Path, name: str) -> dict[str, object]:
    """The part `c` is killed as soon as the others are there."""
    if name == "c":
        while len([*directory.glob("*.part")]) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"files": {}, "threads": torch.get_num_threads(), "megatron": "megatron.core" in sys.modules}


@pytest.fixture(scope="module")
def killed_and_left(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What is said where one of two processes is killed, and the manifests of the parts that were there."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with pytest.raises(UserError) as caught:
        in_parts(out, {}, ["a", "b", "c"], functools.partial(_killed_at_last, staging(out)), 2)
    return str(caught.value), [json.loads((staging(out) / f"{name}.part").read_text()) for name in "ab"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_in_one_sentence(killed_and_left: tuple[str, list[dict[str, Any]]]) -> None:
    assert re.search(r"^a process that converts was killed, .* goes on .* with --processes 1$", killed_and_left[0])


@pytest.mark.slow
def test_workers_share_the_cores_out(killed_and_left: tuple[str, list[dict[str, Any]]]) -> None:
    assert [manifest["threads"] for manifest in killed_and_left[1]] == [max(torch.get_num_threads() // 2, 1)] * 2


@pytest.mark.slow
def test_conversions_do_without_megatron_core_whose_import_takes_longer_than_they_do(
    killed_and_left: tuple[str, list[dict[str, Any]]],
) -> None:
    """Their workers have imported this file, and with it all of `checkpoint.importing` and `checkpoint.convert`."""
    assert [manifest["megatron"] for manifest in killed_and_left[1]] == [False] * 2
