"""A launcher's side of several processes that behave as one: start them, hand signals on, and end all where one fails.

    megadpo train run.yaml --nproc 4        # start_workers: 4 local processes, no torchrun needed
    megadpo train run.yaml --nproc 4 --nnodes 2 --node-rank 0 --master HOST    # … and as many on each other machine
    torchrun --nproc-per-node 4 -m megadpo train run.yaml
    srun -n 4 megadpo train run.yaml        # foreign.py: SLURM's variables become RANK, WORLD_SIZE, …
    deepspeed --module megadpo train run.yaml    # the same; mpirun: mpi.py

What a worker does itself is in worker.py. A signal that asks for an end (signals.py) is handed on to every worker; they
finish their step together, save and leave, each with the status that says why, which is this process's then.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megadpo.console import heartbeat
from megadpo.errors import UserError
from megadpo.launch.signals import EXIT_FAILED, EXIT_INTERRUPTED, STATUS_OF_SIGNAL, WORDS
from megadpo.launch.worker import FAILURE_FILE, claim_failure, first_failure

SECONDS_TO_STOP = 5.0
SECONDS_TO_FOLLOW = 30.0
"""How long the other workers may take to leave once one has left because it was asked to, its state saved."""
DEFAULT_PORT = "29500"
KILLED_HINT = (
    "; usually the machine ran out of memory: lower train.tokens_per_micro_batch or pairs per process, "
    "or use fewer processes"
)


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
    heartbeat.lend()  # to the workers
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
        heartbeat.take_back()
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
    status = EXIT_FAILED if code < 0 else code
    if first := first_failure(failure_file) or claim_failure(failure_file, rank, status):
        return first["status"]
    if code < 0:
        name = signal.Signals(-code).name
        hint = KILLED_HINT if -code == signal.SIGKILL else ""
        print(f"megadpo: rank {rank} was killed by {name}{hint}", file=sys.stderr)
    else:
        print(f"megadpo: rank {rank} left with exit status {code}", file=sys.stderr)
    return status


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
