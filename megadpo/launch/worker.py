"""A worker's side of several processes that behave as one: of those that fail, exactly one says why.

Every worker's main goes through `run_as_one`, whoever started it. The first worker of a node to fail claims the right
to speak by creating a file that must not exist yet; the others stay silent. A worker that only notices that its peers
are gone (connection closed, timed out) first waits a moment: the one that knows the real reason speaks before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from megadpo.errors import UserError
from megadpo.launch.signals import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, WORDS, Stopped, leaving_at_once
from megadpo.secrets.redact import redact

FAILURE_FILE = "MEGADPO_FAILURE_FILE"
"""The variable by which our launcher names the file that the first worker to fail makes."""
SECONDS_BEFORE_BLAMING_PEERS = 5.0
SECONDS_TO_SPEAK = 5.0
"""How long a worker that has claimed the right to speak is waited for."""
PEER_IS_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|reset by peer|broken pipe|socket closed|timed out"
    r"|failed to recv|recvValue|remote process|heartbeat|NCCL (error|communicator)",
    re.IGNORECASE,
)

_is_command = False
_has_hung_threads = False


def run_as_one(main: Callable[[], int]) -> int:
    """Runs this process's main; returns its exit status. Of several workers that fail, only one prints.

    Returns:
        main's status; 2 after a UserError (the sentence on stderr), 1 after any other exception (with its traceback),
        130 after Ctrl-C, 75 after SIGTERM or SIGUSR1. With WORLD_SIZE > 1 a failure ends the process at once, without
        waiting for hung peers.
    """
    global _is_command
    _is_command = True
    try:
        with leaving_at_once():
            return main()
    except KeyboardInterrupt as interrupt:
        status = EXIT_INTERRUPTED
        if _world_size() == 1:
            print(redact(" ".join(["megadpo: interrupted", *map(str, interrupt.args)])), file=sys.stderr)
    except Stopped as stopped:
        status = stopped.status
        if not stopped.is_told:
            _print_once(status, f"megadpo: {WORDS[status]} before there was anything to save")
    except UserError as error:
        status = EXIT_USER_ERROR
        prefix = f"[rank {_rank()}] " if _world_size() > 1 else ""
        _print_once(status, f"{prefix}megadpo: error: {error}")
    except Exception as error:
        status = EXIT_FAILED
        who = f"rank {_rank()} failed" if _world_size() > 1 else "failed"
        wanting = out_of_memory(error)
        trace = "" if wanting else traceback.format_exc()
        message = f"{trace}megadpo: {who}: {wanting or f'{type(error).__name__}: {error}'}"
        if _world_size() > 1 and blames_peer(error):
            time.sleep(SECONDS_BEFORE_BLAMING_PEERS)
            message += f"\nmegadpo: rank {_rank()} lost another rank of the run; what that one's machine printed says why"
        _print_once(status, message)
    if _world_size() > 1:
        leave_now(status)
    return status


def out_of_memory(error: BaseException) -> str | None:
    """What to do where torch, on a GPU or a CPU, or Python had no memory left; None: something else went wrong."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"
    if not is_gpu and not isinstance(error, MemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
        return None
    asked = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]?i?B))", str(error))
    wanted = f" ({asked[1]} more were asked for)" if asked else ""
    return (
        f"out of memory{wanted}: lower train.tokens_per_micro_batch, set train.recompute=full or "
        "reference.mode=precomputed, or use more processes; megadpo plan RUN.yaml --devices N says what fits"
    )


def blames_peer(error: BaseException) -> bool:
    """True where an exception says that another process is gone, which is a consequence and not the reason."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError) or type(seen).__name__ in ("DistBackendError", "DistNetworkError"):
            return True
        if isinstance(seen, RuntimeError) and PEER_IS_GONE.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def end_for_good(message: str, others: Sequence[int] = ()) -> None:
    """Ends this process as failed from any thread, whatever the main one is doing; says `message` if nobody has spoken yet.

    Before that it kills the processes `others`, which cannot end themselves.

    A process that only calls megadpo as a library, alone, is told and left to its user.
    """
    _print_once(EXIT_FAILED, message)
    for process in others:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    if _is_command or _world_size() > 1:
        leave_now(EXIT_FAILED)


def leave_threads_behind() -> None:
    """A thread hangs in somebody's library: where this process is a command, its end does not wait for that."""
    global _has_hung_threads
    _has_hung_threads = True


def has_hung_threads() -> bool:
    """Whether the process must end by `leave_now`."""
    return _has_hung_threads


def leave_now(status: int) -> None:
    """Ends the process without the clean-up of process groups, which may wait for peers that never answer."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rank() -> int:
    return _count("RANK", 0)


def _world_size() -> int:
    return _count("WORLD_SIZE", 1)


def _count(name: str, default: int) -> int:
    """A variable of the environment; the default, too, where it is no number, which is refused elsewhere."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _print_once(status: int, message: str) -> None:
    """Prints `message` if no other worker has failed before. The file is created before printing and filled after it.
    Secrets in it are hidden, those of tracebacks too."""
    message = redact(message)
    if _world_size() == 1:
        print(message, file=sys.stderr, flush=True)
        return
    path = _failure_file()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        # Whoever ends first gets the others stopped, so let the one that speaks finish its sentence.
        first_failure(path)
        return
    except OSError:
        print(message, file=sys.stderr, flush=True)
        return
    with os.fdopen(descriptor, "w") as file:
        print(message, file=sys.stderr, flush=True)
        json.dump({"rank": _rank(), "status": status}, file)


def claim_failure(path: Path, rank: int, status: int) -> dict[str, int] | None:
    """Have all workers be silent, for a rank that could not speak itself; who has spoken already, or None."""
    try:
        with path.open("x") as file:
            json.dump({"rank": rank, "status": status}, file)
    except FileExistsError:
        return first_failure(path)
    except OSError:
        pass
    return None


def first_failure(path: Path) -> dict[str, int] | None:
    """Rank and status of the worker that failed first; None where none has claimed that. Waits while it speaks."""
    deadline = time.monotonic() + SECONDS_TO_SPEAK
    while path.exists():
        if text := path.read_text():
            return {str(key): int(value) for key, value in json.loads(text).items()}
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return None


def _failure_file() -> Path:
    """The launcher's file, or one that only the workers of the same parent (torchrun, srun) share."""
    if FAILURE_FILE in os.environ:
        return Path(os.environ[FAILURE_FILE])
    parent = os.getppid()
    try:
        # Field 22 is the parent's start time, which tells a process id that is used again from the one before.
        parent_start = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[-1].split()[19]
    except (OSError, IndexError):
        parent_start = "0"
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    identity = [str(os.getuid()), str(parent), parent_start, *(os.environ.get(name, "") for name in names)]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    return Path(tempfile.gettempdir()) / f"megadpo-failure-{digest}.json"
