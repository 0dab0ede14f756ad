"""Several processes that behave as one: start them, and when one fails, stop all and say why exactly once.

    megadpo train run.yaml --nproc 4        # start_workers: 4 local processes, no torchrun needed
    megadpo train run.yaml --nproc 4 --nnodes 2 --node-rank 0 --master HOST    # … and as many on each other machine
    torchrun --nproc-per-node 4 -m megadpo train run.yaml
    srun -n 4 megadpo train run.yaml        # adopt_slurm_environment: SLURM's variables become RANK, WORLD_SIZE, …
    deepspeed --module megadpo train run.yaml    # adopt_deepspeed_arguments; mpirun: launch/mpi.py

Every worker's main goes through `run_as_one`, whoever started it. The first worker of a node to fail claims the right
to speak by creating a file that must not exist yet; the others stay silent. A worker that only notices that its peers
are gone (connection closed, timed out) first waits a moment: the one that knows the real reason speaks before it.

A signal that asks for an end (`signals.py`) is handed on to every worker; they finish their step together, save and leave,
each with the status that says why, which is this process's then.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megadpo.errors import UserError
from megadpo.launch.signals import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    STATUS_OF_SIGNAL,
    WORDS,
    Stopped,
    leaving_at_once,
)

FAILURE_FILE = "MEGADPO_FAILURE_FILE"
SECONDS_BEFORE_BLAMING_PEERS = 5.0
SECONDS_TO_STOP = 5.0
SECONDS_TO_FOLLOW = 30.0
"""How long the other workers may take to leave once one has left because it was asked to, its state saved."""
DEFAULT_PORT = "29500"
PARENT = os.getppid()
"""Who started this process, asked as early as can be."""
DEEPSPEED = {"LOCAL_SIZE", "CROSS_SIZE"}
FOREIGN_LAUNCHERS = (
    {"TORCHELASTIC_RUN_ID"},
    DEEPSPEED,
    {"OMPI_COMM_WORLD_RANK"},
    {"MV2_COMM_WORLD_RANK"},
    {"MPI_LOCALRANKID"},
)
"""Variables that torchrun, deepspeed and three kinds of mpirun set."""
KILLED_HINT = (
    "; usually the machine ran out of memory: lower train.tokens_per_micro_batch or pairs per process, "
    "or use fewer processes"
)
PEER_IS_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|reset by peer|broken pipe|socket closed|timed out"
    r"|failed to recv|recvValue|remote process|heartbeat|NCCL (error|communicator)",
    re.IGNORECASE,
)


_is_command = False


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
            print(" ".join(["megadpo: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
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
        message = f"{traceback.format_exc()}megadpo: {who}: {type(error).__name__}: {error}"
        if _world_size() > 1 and blames_peer(error):
            time.sleep(SECONDS_BEFORE_BLAMING_PEERS)
            message += f"\nmegadpo: rank {_rank()} lost another rank of the run; what that one's machine printed says why"
        _print_once(status, message)
    if _world_size() > 1:
        leave_now(status)
    return status


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
    """Prints `message` if no other worker has failed before. The file is created before printing and filled after it."""
    if _world_size() == 1:
        print(message, file=sys.stderr, flush=True)
        return
    path = _failure_file()
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        # Whoever ends first gets the others stopped, so let the one that speaks finish its sentence.
        _first_failure(path)
        return
    except OSError:
        print(message, file=sys.stderr, flush=True)
        return
    with os.fdopen(descriptor, "w") as file:
        print(message, file=sys.stderr, flush=True)
        json.dump({"rank": _rank(), "status": status}, file)


def _first_failure(path: Path) -> dict[str, int] | None:
    """Rank and status of the worker that failed first; None where none has claimed that. Waits while it speaks."""
    deadline = time.monotonic() + SECONDS_TO_STOP
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


def _dying_with_this_process() -> Callable[[], None]:
    """What a worker calls before it becomes its command: on Linux the kernel ends it when this process is gone, however
    that went, and if it went in the meantime, the worker never begins."""
    launcher = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        pr_set_pdeathsig = 1
        if libc is not None:
            libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(EXIT_FAILED)

    return prepare


def foreign_launcher(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The processes of torchrun, deepspeed or mpirun above this one, a rank of theirs; None where there is none of those.

    They do not see to it that their processes end with them: who trains has to look whether these are still its
    `ancestors`. Of deepspeed they are two, of which the upper one is what a user sees and ends.

    Raises:
        UserError: it is gone already.
    """
    if "RANK" not in environ or not any(variables <= environ.keys() for variables in FOREIGN_LAUNCHERS):
        return None
    if PARENT == 1 and sys.platform == "linux":
        first = Path("/proc/1/cmdline").read_bytes().decode(errors="replace")
        if not re.search(r"torch|python|deepspeed|mpi|orted|prte|hydra", first):
            raise UserError("the launcher that started this process is gone; start the run again")
    return (PARENT, *ancestors(2)[1:]) if environ.keys() >= DEEPSPEED else (PARENT,)


def ancestors(count: int) -> tuple[int, ...]:
    """This process's parent, its parent, …: as many as the system tells."""
    found = [os.getppid()]
    with contextlib.suppress(OSError, IndexError, ValueError):
        while len(found) < count:
            found.append(int(Path(f"/proc/{found[-1]}/stat").read_text().rsplit(")", 1)[-1].split()[1]))
    return tuple(found)


@dataclass(frozen=True)
class Node:
    """This machine among those of a run, each with as many processes.

    Attributes:
        number: from 0.
        master: HOST or HOST:PORT of machine 0, as the others reach it; None: this machine is alone.
    """

    number: int = 0
    count: int = 1
    master: str | None = None

    def address(self) -> tuple[str, str]:
        """Host and port where the processes meet."""
        if self.master is None:
            return "127.0.0.1", str(free_port())
        host, _, port = self.master.partition(":")
        return host, port or DEFAULT_PORT

    def require_free_port(self) -> None:
        """Raises UserError on machine 0 where another program listens on the port that the processes would meet at."""
        if self.number or self.master is None:
            return
        host, port = self.address()
        with socket.socket() as probe:
            # As the store does it: a port whose last connection has just been closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
                probe.listen(1)
            except OSError as error:
                raise UserError(
                    f"port {port} on this machine ({host}), where the processes were to meet, cannot be used "
                    f"({error.strerror}); choose another with --port, the same on every machine"
                ) from error


def start_workers(nproc: int, command: Sequence[str], node: Node | None = None) -> int:
    """Runs `command` as this machine's `nproc` ranks and waits; returns 0, or the status of the first to fail or to stop.

    The workers' output goes straight to this process's stdout and stderr. When one fails, the others are stopped within
    10 seconds. Only what no worker can print itself is printed here: that one was killed by a signal, or left silently.
    SIGTERM, SIGUSR1 and SIGINT are handed on, and the workers end by themselves; the second SIGINT kills them.
    """
    node = node or Node()
    node.require_free_port()
    # Only its name: a worker that fails makes it, so that nothing stays where this process is killed.
    failure_file = Path(tempfile.gettempdir()) / f"megadpo-{os.getpid()}-{uuid.uuid4().hex}.json"
    workers: list[subprocess.Popen[bytes]] = []
    signals: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        # Raised here, an exception could leave Popen.poll with its lock held, on which Popen.wait would wait for ever.
        signals.append(signal.Signals(number))

    ignored = [number for number in STATUS_OF_SIGNAL if signal.getsignal(number) is signal.SIG_IGN]
    old_handlers = {number: signal.signal(number, note) for number in STATUS_OF_SIGNAL if number not in ignored}
    try:
        environment = _shared_environment(nproc, failure_file, node)
        prepare = _dying_with_this_process()
        first_rank = node.number * nproc
        for local in range(nproc):
            own = {**environment, "RANK": str(first_rank + local), "LOCAL_RANK": str(local)}
            # A session each: whatever a worker has started itself is stopped together with it.
            workers.append(
                subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare)
            )
        ended = _wait(workers, signals)
        if ended is None:
            return 0
        code = workers[ended].returncode
        status = _status_asked_for(code, signals)
        if status is None:
            return _report(first_rank + ended, code, failure_file)
        _let_follow(workers, signals)
        return status
    except KeyboardInterrupt:
        print("megadpo: interrupted for the second time: ended at once, without saving", file=sys.stderr)
        _signal_all(workers, signal.SIGKILL)
        return EXIT_INTERRUPTED
    finally:
        _stop(workers)
        failure_file.unlink(missing_ok=True)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def _shared_environment(nproc: int, failure_file: Path, node: Node) -> dict[str, str]:
    environment = {**os.environ, FAILURE_FILE: str(failure_file)}
    host, port = node.address()
    environment.update(WORLD_SIZE=str(nproc * node.count), LOCAL_WORLD_SIZE=str(nproc), MASTER_ADDR=host, MASTER_PORT=port)
    environment.setdefault("OMP_NUM_THREADS", threads_per_process(nproc))
    return environment


def threads_per_process(nproc: int) -> str:
    """OMP_NUM_THREADS that shares this machine's cores out among `nproc` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, cores // nproc))


def free_port() -> int:
    """A free port below the range that the system gives to outgoing connections, so still free in a moment."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError("no free TCP port between 20000 and 32000 on this machine; use torchrun with --master-port")


def _wait(workers: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals]) -> int | None:
    """Waits until all have ended well (None) or one has not (its number here; one killed by a signal comes first).

    Each signal that comes meanwhile is handed on to the workers.

    Raises:
        KeyboardInterrupt: SIGINT came for the second time.
    """
    num_sent = 0
    while True:
        _hand_on(workers, signals, num_sent)
        num_sent = len(signals)
        codes = [worker.poll() for worker in workers]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad:
            return min(bad, key=lambda rank: (workers[rank].returncode > 0, rank))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _hand_on(workers: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals], num_sent: int) -> None:
    """Sends the signals after the first `num_sent` to the workers themselves, which end what they have started."""
    for place in range(num_sent, len(signals)):
        if signals[: place + 1].count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if place == 0:
            more = "; once more ends it at once" if signals[0] == signal.SIGINT else ""
            said = f"megadpo: {signals[0].name}: the run ends once its step is done and saved{more}"
            print(said, file=sys.stderr, flush=True)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signals[place])


def _status_asked_for(code: int, signals: Sequence[signal.Signals]) -> int | None:
    """The run's status where a worker left because it was asked to; None where it failed.

    A worker that was not yet able to answer a signal has died of it.
    """
    if code in WORDS:
        return code
    if code < 0 and -code in signals:
        return STATUS_OF_SIGNAL[signal.Signals(-code)]
    return None


def _let_follow(workers: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals]) -> None:
    """Lets the workers end that are about to: one that has saved ignores the SIGTERM, one that has not begun leaves.

    Raises:
        KeyboardInterrupt: SIGINT came for the second time.
    """
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_FOLLOW
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        if signals.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        time.sleep(0.05)


def _report(rank: int, code: int, failure_file: Path) -> int:
    """Prints what no worker has printed itself and returns the run's exit status."""
    if first := _first_failure(failure_file):
        return first["status"]
    if code < 0:
        name = signal.Signals(-code).name
        hint = KILLED_HINT if -code == signal.SIGKILL else ""
        print(f"megadpo: rank {rank} was killed by {name}{hint}", file=sys.stderr)
        return EXIT_FAILED
    print(f"megadpo: rank {rank} left with exit status {code}", file=sys.stderr)
    return code


def _signal_all(workers: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for worker in workers:
        try:
            os.killpg(worker.pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends every worker that still runs and everything that any worker started."""
    if any(worker.poll() is None for worker in workers):
        deadline = time.monotonic() + SECONDS_TO_STOP
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            # Again and again: one that was in its steps has only noted the first, and then lost its peers.
            _signal_all(workers, signal.SIGTERM)
            time.sleep(0.2)
    _signal_all(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


def adopt_slurm_environment(environ: MutableMapping[str, str]) -> None:
    """Inside an srun step of several tasks: sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT from SLURM's.

    Does nothing where RANK is set already (torchrun), outside SLURM, in a batch script or in an interactive shell.
    """
    step = environ.get("SLURM_STEP_ID", "")
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    batch_or_interactive = not step.isdigit() or int(step) >= 0xFFFFFFF0
    if "RANK" in environ or "SLURM_PROCID" not in environ or batch_or_interactive or int(num_tasks) < 2:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes and "MASTER_ADDR" not in environ:
        raise UserError("SLURM gives no SLURM_NODELIST; set MASTER_ADDR to the host of the first task")
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = num_tasks
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ.setdefault("MASTER_ADDR", first_host(nodes or ""))
    # The same on every task, and different for two jobs, or two steps of a job, on the same node.
    environ.setdefault("MASTER_PORT", str(20000 + (int(environ.get("SLURM_JOB_ID", "0")) * 7 + int(step)) % 12000))


def adopt_deepspeed_arguments(argv: Sequence[str], environ: MutableMapping[str, str]) -> list[str]:
    """`argv` without the `--local_rank=N` that the deepspeed launcher puts first; sets LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        UserError: N is no number, or no launcher has given this process a rank.
    """
    if is_distributed(environ) and "LOCAL_SIZE" in environ and "CROSS_SIZE" in environ:
        environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])
    match = re.fullmatch(r"--local[_-]rank=(.*)", argv[0]) if argv else None
    if match is None:
        return list(argv)
    if not match[1].isdecimal():
        raise UserError(f"{argv[0]} is not a number; the deepspeed launcher sets it, so leave it out")
    if not is_distributed(environ):
        raise UserError(f"{argv[0]} is what the deepspeed launcher gives its processes, but RANK is not set; leave it out")
    environ.setdefault("LOCAL_RANK", match[1])
    return list(argv[1:])


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[07-09,12],cpu1`` -> ``gpu07``."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def is_distributed(environ: Mapping[str, str]) -> bool:
    """True inside a worker: whoever started it has given it a rank."""
    return "RANK" in environ and "WORLD_SIZE" in environ
