"""Workers: results in order, errors as they are, and nobody left behind, however it ends."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from megadpo.platform import workers
from megadpo.platform.workers import WorkerDiedError, WorkerTraceback, in_workers

ROOT = Path(__file__).parents[3]
VARIABLE = "MEGADPO_TEST_OF_WORKERS"


def looking_around() -> Callable[[int], tuple[Any, ...]]:
    """The work: to say where it is done; the first item takes longest."""
    forked_from = os.getpid()

    def work(item: int) -> tuple[Any, ...]:
        time.sleep(0.3 if item == 0 else 0)
        is_deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return item, os.getpid(), forked_from, os.environ[VARIABLE], is_deaf

    return work


def test_results_come_in_order_from_workers_that_began_once_and_need_no_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError(38, "Function not implemented")  # what Python's semaphores say where /dev/shm is missing

    spec = ModuleSpec("started_with_python_m", None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr("_multiprocessing.SemLock", refuse)
    monkeypatch.setenv(VARIABLE, "as it is now")
    before, num_read, num_ahead = multiprocessing.active_children(), 0, []

    def items() -> Iterator[int]:
        nonlocal num_read
        for item in range(40):
            num_read += 1
            yield item

    seen: list[tuple[Any, ...]] = []
    for result in in_workers(looking_around, items(), 2):
        num_ahead.append(num_read - len(seen))
        seen.append(result)
    assert [item for item, *_ in seen] == list(range(40))
    assert max(num_ahead) <= 4 * 2
    doing, forked_from = {result[1] for result in seen}, {result[2] for result in seen}
    assert len(doing) == 2 and len(forked_from) == 1 and os.getpid() not in doing | forked_from
    assert {result[3:] for result in seen} == {("as it is now", True)}
    assert multiprocessing.active_children() == before and not any(map(is_there, doing | forked_from))
    assert sys.modules["__main__"].__spec__ is spec  # put back after they were started


def test_where_a_fork_is_not_safe_each_worker_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CAN_FORK", False)
    monkeypatch.setenv(VARIABLE, "")
    seen = [*in_workers(looking_around, range(4), 2)]
    assert [item for item, *_ in seen] == [0, 1, 2, 3]
    assert all(doing == began for _, doing, began, *_ in seen) and len({result[1] for result in seen}) == 2


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


class TwoWordsError(Exception):
    """One that cannot be made of its pickle."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def failing(at_once: bool) -> Callable[[str], Any]:
    """Work that fails, or fails to begin."""
    if at_once:
        raise UserError("there is nothing to begin with")
    return fail


def fail(item: str) -> str:
    if item == "a":
        return item
    raise UserError(f"{item} is not a") if item == "b" else TwoWordsError("not", item)


@pytest.mark.parametrize(
    ("at_once", "items", "kind", "words"),
    [
        (False, "ab", UserError, "b is not a"),
        (False, "ac", RuntimeError, "TwoWordsError: not c"),
        (True, "ab", UserError, "there is nothing to begin with"),
    ],
)
def test_an_error_is_raised_in_its_turn_as_it_is(at_once: bool, items: str, kind: type[Exception], words: str) -> None:
    seen = []
    with pytest.raises(kind, match=f"^{words}$") as caught:
        seen += [*in_workers(functools.partial(failing, at_once), items, 2)]
    assert isinstance(caught.value.__cause__, WorkerTraceback) and "Traceback" in str(caught.value.__cause__)


def busy_for_good() -> Callable[[int], tuple[int, int]]:
    """The work: from the third item on it does not end, nor let another thread of its process run, for minutes."""
    forked_from = os.getpid()

    def work(item: int) -> tuple[int, int]:
        return (os.getpid(), forked_from) if item < 2 else sum(map(pow, [3] * 9, [10**8] * 9)) and (0, 0)

    return work


def killed() -> Callable[[int], None]:
    return lambda item: os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(WorkerDiedError):
        next(in_workers(killed, range(4), 2))
    assert multiprocessing.active_children() == before


def test_when_nobody_wants_the_rest_busy_workers_end_at_once() -> None:
    results = in_workers(busy_for_good, range(4), 2)
    processes = {*next(results), *next(results)}
    assert len(processes) == 3 and all(map(is_there, processes))
    results.close()
    assert not any(map(is_there, processes))


SCRIPT = """
import os, signal
from megadpo.platform.workers import in_workers
from tests.unit.platform.test_workers import busy_for_good
results = in_workers(busy_for_good, range(4), 2)
print(next(results)[1] == next(results)[1] != os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_script_without_a_main_guard_end_with_it_and_import_nothing_that_lies_about(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("yaml.py", "pytest.py"):
        (here / name).write_text("open('imported', 'w')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    # What they print to would stay open as long as one of them is there.
    run = subprocess.run(command, cwd=here, env=environment, stdout=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL and run.stdout == "True\n"
    assert sorted(path.name for path in here.iterdir()) == ["pytest.py", "yaml.py"]
