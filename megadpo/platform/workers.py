"""Workers: processes that do the same work on one item after the other, forked from one that has imported what they need.

They cannot be forked from the process that asks for them, whose threads would be missing; and where each begins anew, it
imports for seconds what the others import, too. So one process begins anew and loads what the work needs, and from that the
workers are forked. It watches the process that asked, and ends the workers when that is done with them or dies. There are
only pipes between them: no shared memory is needed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Any], Any]

ITEMS_A_WORKER = 4
"""So many are in memory at most: read, under way or done."""
CAN_FORK = sys.platform == "linux"
"""Libraries of macOS that a process has loaded do not survive a fork: there each worker begins anew."""


class WorkerDiedError(Exception):
    """A worker has ended before its work, as one that the system kills where memory is short."""


class WorkerTraceback(Exception):
    """The text of a traceback in a worker: the cause of the error that is raised here."""


@dataclass(frozen=True)
class _Answer:
    result: Any = None
    error: Exception | None = None
    traceback: str = ""


def in_workers(
    begin: Callable[[], Callable[[Item], Result]], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """The result of every item, in their order; however this generator ends, the workers have ended.

    Ctrl-C does not reach the workers. A script that calls this needs no `if __name__ == "__main__"`.

    Args:
        begin: called once, in the process that the workers are forked from; returns what each of them calls with an item. It
            must pickle, as items and results must; what it returns need not.

    Raises:
        WorkerDiedError: a worker was killed.
        Exception: what `begin` or the work raised, with the other process's traceback as its cause.
    """
    with _started(begin, num_workers) as workers:
        idle: list[Any] = [*workers]
        busy, done = dict[Any, int](), dict[int, _Answer]()
        numbered, num_yielded = iter(enumerate(items)), 0
        coming = next(numbered, None)
        while coming is not None or busy:
            while coming is not None and idle and coming[0] + 1 < num_yielded + ITEMS_A_WORKER * num_workers:
                worker = idle.pop()
                _send(worker, coming[1])
                busy[worker] = coming[0]
                coming = next(numbered, None)
            for ready in wait([*busy]):
                done[busy.pop(ready)] = _received(ready)
                idle.append(ready)
            while (answer := done.pop(num_yielded, None)) is not None:
                if answer.error is not None:
                    raise answer.error from WorkerTraceback(answer.traceback)
                yield answer.result
                num_yielded += 1


def _send(worker: Connection, item: object) -> None:
    try:
        worker.send(item)
    except ConnectionError as error:
        raise WorkerDiedError from error


def _received(worker: Any) -> _Answer:
    try:
        answer = worker.recv()
    except (EOFError, OSError) as error:
        raise WorkerDiedError from error
    assert isinstance(answer, _Answer)
    return answer


@contextlib.contextmanager
def _started(begin: Callable[[], Work], num_workers: int) -> Iterator[list[Connection]]:
    """Pipes to workers, which end with this context."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as processes, contextlib.ExitStack() as ends:
        pipes = [_pipe(ends) for _ in range(num_workers)]
        ours, theirs = [end for end, _ in pipes], [end for _, end in pipes]
        _, lifeline = _pipe(ends)
        for some in [theirs] if CAN_FORK else [[end] for end in theirs]:
            process = context.Process(target=_begin, args=(begin, some, lifeline), daemon=True)
            with _without_main_module(), _deaf_to_interrupts():
                process.start()
                processes.callback(process.join)
                processes.callback(process.terminate)  # one that still imports does not look at its lifeline
        _close(lifeline, *theirs)
        yield ours


def _pipe(ends: contextlib.ExitStack) -> tuple[Connection, Connection]:
    ours, theirs = multiprocessing.Pipe()
    return ends.enter_context(ours), ends.enter_context(theirs)


def _begin(begin: Callable[[], Work], pipes: Sequence[Connection], lifeline: Connection) -> None:
    """What the process does that workers are forked from, until the other end of its lifeline is closed or SIGTERM comes; of
    one worker, its work."""
    try:
        work = begin()
    except Exception as error:
        work = functools.partial(_refuse, error)
    if len(pipes) == 1:
        _serve(work, *pipes)
        return
    gc.freeze()  # what is shared by all stays shared: no collection writes to it
    children: list[int] = []
    signal.signal(signal.SIGTERM, lambda *unused: lifeline.close())  # which is then no longer read
    try:
        for pipe in pipes:
            child = os.fork()
            if child == 0:
                _be_worker(work, pipe, [other for other in pipes if other is not pipe])
            children.append(child)
        _close(*pipes)
        lifeline.recv()
    except (EOFError, OSError):
        pass  # the end; or the system gives no more processes
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)


def _be_worker(work: Work, pipe: Connection, of_others: Sequence[Connection]) -> NoReturn:
    """In a forked process: its work, then its end, without what the process that it was forked from has still to do."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _close(*of_others)
        _serve(work, pipe)
    finally:
        os._exit(0)


def _serve(work: Work, pipe: Connection) -> None:
    while True:
        try:
            try:
                item = pipe.recv()
            except EOFError:
                return
            answer = _Answer(work(item))
        except Exception as error:
            answer = _Answer(error=_picklable(error), traceback=traceback.format_exc())
        pipe.send(answer)


def _refuse(error: Exception, item: object) -> NoReturn:
    raise error


def _picklable(error: Exception) -> Exception:
    """The error, or where the other process cannot make it again, one with its words."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _close(*ends: Connection) -> None:
    for end in ends:
        end.close()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Within, Ctrl-C waits, and processes that are started here never hear of it: the one that started them ends them."""
    resource_tracker.ensure_running()  # Python starts it with the first process, and hears Ctrl-C again after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Keeps a spawned process from importing the caller's script, which may lack an `if __name__ == "__main__"`."""
    main: Mapping[str, Any] = vars(sys.modules["__main__"])
    saved = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    for name in saved:
        setattr(sys.modules["__main__"], name, None)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(sys.modules["__main__"], name, value)
