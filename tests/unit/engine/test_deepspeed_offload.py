"""What offload cannot do without is asked for in one sentence: compiled parts, a directory, locked memory."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import torch

from megadpo.errors import UserError
from megadpo.validation.deepspeed import check_deepspeed_machine
from megadpo.validation.load import load_config
from tests.helpers.worlds import run_world

pytest.importorskip("deepspeed")


def test_a_lock_that_a_killed_compilation_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megadpo.engine.deepspeed.offload import cpu_adam

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path}/cpu_adam/lock is there: .* was killed, .* remove that file"):
        cpu_adam()


def test_without_libaio_or_a_compiler_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from megadpo.engine.deepspeed.offload import require_async_io

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(UserError, match=r"libaio or a C\+\+ compiler is missing here; install them .*libaio-dev g\+\+"):
        require_async_io()


def test_more_locked_memory_than_there_is_is_refused() -> None:
    from megadpo.engine.deepspeed.offload import require_lockable

    require_lockable(1 << 16)
    with pytest.raises(UserError, match=r"locks up to 1,073,741,824 MiB of memory, but .* raise it \(ulimit -l unlimited"):
        require_lockable(1 << 50)


def _own_directory(offload_dir: str) -> str:
    import torch.distributed as dist

    from megadpo.engine.deepspeed.offload import own_directory

    dist.init_process_group("gloo")
    try:
        return str(own_directory(offload_dir))
    except UserError as error:
        return str(error)


def test_a_directory_that_another_run_uses_is_refused(tmp_path: Path) -> None:
    assert run_world(1, _own_directory, str(tmp_path)) == [str(tmp_path / "rank0")]
    (tmp_path / "rank0").mkdir(exist_ok=True)
    with open(tmp_path / "rank0" / "in-use", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        (told,) = run_world(1, _own_directory, str(tmp_path))
    assert told == f"parallel.offload_dir: {tmp_path} is in use by another run; give each its own"


def test_a_directory_in_which_no_file_can_be_made_is_refused() -> None:
    options = {"engine": "deepspeed", "zero_stage": 3, "offload": "nvme", "offload_dir": "/proc"}
    with pytest.raises(
        UserError, match=r"^parallel.offload_dir: /proc cannot be written: .*; choose a directory on a local"
    ):
        check_deepspeed_machine(load_config({"parallel": options}).parallel, torch.float32)


def test_a_moving_reference_is_refused_with_files() -> None:
    options = {"engine": "deepspeed", "zero_stage": 3, "offload": "nvme", "offload_dir": "/x"}
    with pytest.raises(
        UserError, match=r"parallel.offload nvme keeps it in files; use parallel.offload cpu or remove sync_every"
    ):
        load_config({"parallel": options, "reference": {"sync_every": 2}})
