"""Conversions in parts: each writes files of its own, several at once in processes; one that was killed goes on.

Beside the files of a part stands ``NAME.part`` with their sizes and hashes, and ``parts.json`` says what is being converted:
the same command takes parts that are there as they are, another one begins anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megadpo.checkpoint.integrity import check_bytes, records_in
from megadpo.checkpoint.staging import begin, staging, writing
from megadpo.console.activity import activity
from megadpo.errors import UserError
from megadpo.platform.allocator import give_back_freed_blocks
from megadpo.platform.workers import WorkerDiedError, in_workers

KEY, END = "parts.json", ".part"
Work = Callable[[str], dict[str, Any]]
"""Writes a part's files to the staging directory; a JSON-able manifest whose "files" has the record of each."""


def in_parts(directory: Path, key: dict[str, Any], names: Sequence[str], work: Work, num_processes: int) -> list[Any]:
    """The manifest of every part, in the order of `names`.

    Args:
        directory: the final directory, of which the staging one is made or gone on with.
        key: JSON-able; all that decides what the files hold.
        work: called once for each part that is not there yet; picklable where there are several processes.

    Raises:
        UserError: as `work`, or the disk refuses.
    """
    partial = staging(directory)
    if not _is_same(partial / KEY, key):
        begin(directory)
        with writing(partial / KEY):
            (partial / KEY).write_text(json.dumps(key))
    done = {name: manifest for name in names if (manifest := _manifest(partial, name)) is not None}
    left = [name for name in names if name not in done]
    if num_processes == 1 or len(left) < 2:
        for name in left:
            done[name] = _finished(partial, name, work(name))
    else:
        done |= _in_processes(partial, left, work, num_processes)
    for path in (partial / KEY, *partial.glob(f"*{END}")):
        path.unlink()
    return [done[name] for name in names]


def _in_processes(partial: Path, names: Sequence[str], work: Work, num_processes: int) -> dict[str, Any]:
    import torch

    num_workers, done = min(num_processes, len(names)), {}
    # Threads of torch that find no core wait busily: with twice as many as cores a part takes three times as long.
    num_threads = max(torch.get_num_threads() // num_workers, 1)
    begin = functools.partial(_begin_worker, partial, work, num_threads)
    try:
        with (
            contextlib.closing(in_workers(begin, names, num_workers)) as manifests,
            activity("converting", len(names), "parts") as converting,
        ):
            for name, manifest in zip(names, manifests, strict=True):
                done[name] = manifest
                converting.advance()
    except WorkerDiedError as error:
        raise UserError(
            "a process that converts was killed, as where memory is short; the same command goes on with the parts that "
            f"are not there yet, fewer at once with --processes {max(num_workers - 1, 1)}"
        ) from error
    return done


def _begin_worker(partial: Path, work: Work, num_threads: int) -> Work:
    """What every worker calls with the name of a part."""
    from transformers import AutoConfig, LlamaConfig  # noqa: F401 - with the first model's config comes as much as with torch

    give_back_freed_blocks()
    return functools.partial(_write, partial, work, num_threads)


def _write(partial: Path, work: Work, num_threads: int, name: str) -> Any:
    import torch

    torch.set_num_threads(num_threads)
    return _finished(partial, name, work(name))


def _finished(partial: Path, name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, put where `_manifest` finds it."""
    with writing(partial / f"{name}{END}"):
        (partial / f"{name}.writing").write_text(json.dumps(manifest))
        (partial / f"{name}.writing").rename(partial / f"{name}{END}")
    return manifest


def _manifest(partial: Path, name: str) -> dict[str, Any] | None:
    """That of a part whose files are there with every byte; None: it has to be written."""
    try:
        manifest = json.loads((partial / f"{name}{END}").read_text())
        check_bytes(partial, records_in(manifest["files"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return None
    assert isinstance(manifest, dict)
    return manifest


def _is_same(path: Path, key: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(path.read_text()) == key)
    except (OSError, ValueError):
        return False
