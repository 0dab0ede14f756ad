"""Who hangs: every rank gives signs of life, rank 0 watches them all, and when one is silent or late, the run ends.

Two things are looked at. A rank that is **silent** (it is stopped, its machine or link is gone, its interpreter is stuck)
has not given a sign for `train.hang_timeout` seconds, whatever it was doing. A rank that is **late** has been in one step
for so long beyond the longest step so far; since the others then wait for it, those of them are named that do not wait.
Starting, the first step (which compiles), evaluating, saving, exporting and callbacks may take as long as they take.

The signs go through a store that all ranks reach: rank 0's, or torchrun's. Each rank writes one key and reads rank 0's;
rank 0 reads all. When there is a verdict, each rank writes the stacks of its threads to `output_dir/stacks/`, somebody on
the same machine fetches that of the main thread of a rank that cannot, and all end with status 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megadpo.console.activity import begin as tell
from megadpo.launch.worker import end_for_good
from megadpo.parallel.world import rank, world_size
from megadpo.platform.rendezvous import LOOPBACK, is_alone

MEMORY_FILE = "megadpo-stacks"
UNTIMED = ("starting", "first step", "between steps", "evaluating", "saving", "exporting")
"""What a rank may do for as long as it takes, while others wait for it: between steps are the user's callbacks."""
WAITING = ("/torch/distributed/", "/torch/cuda/", "/megatron/core/", "/megadpo/pipeline/", "/megadpo/engine/", "/deepspeed/")
"""Where in the code the main thread of a rank is that waits for others; `training/step.py` waits for a device."""
MOST_SECONDS_FOR_STACKS = 5.0
SECONDS_TO_TELL = 2.0
"""How long a rank that has found a hang lets the others read of it."""


@dataclass
class Progress:
    """What this rank is doing, told by the training loop.

    Attributes:
        doing: in words; "step 7" or one of `UNTIMED`.
        since: `time.monotonic()`.
        longest_step: seconds.
    """

    doing: str = "starting"
    since: float = field(default_factory=time.monotonic)
    longest_step: float = 0.0

    def begin(self, doing: str) -> None:
        """From now on this rank is `doing` something else."""
        now = time.monotonic()
        if self.doing not in UNTIMED:
            self.longest_step = max(self.longest_step, now - self.since)
        self.doing, self.since = doing, now
        tell(doing)

    def lateness(self) -> float:
        """Seconds beyond the longest step so far."""
        return 0.0 if self.doing in UNTIMED else time.monotonic() - self.since - self.longest_step


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        number: another one each time.
        stacks: the descriptor of the file that the rank's main thread writes its stack to when it is sent SIGUSR2.
        is_waiting: its main thread waits for other ranks.
    """

    number: int
    host: str
    process: int
    stacks: int
    doing: str
    late: float
    is_waiting: bool

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}"


@dataclass(frozen=True)
class Verdict:
    """Which ranks hang, and how that was seen."""

    ranks: list[int]
    signs: list[Sign]
    sentence: str


class Watchdog:
    """The threads of a rank that give its signs and look at those of others.

    Args:
        timeout: `train.hang_timeout`, in seconds.
        output_dir: where the stacks go.
        progress: this rank's.
        end: says a sentence and ends this process, and others.
    """

    def __init__(
        self, timeout: float, output_dir: Path, progress: Progress, end: Callable[[str, Sequence[int]], None] = end_for_good
    ) -> None:
        self._timeout, self._directory, self._progress, self._end = timeout, output_dir / "stacks", progress, end
        self._interval = min(5.0, timeout / 10)
        self._closing = threading.Event()
        self._main = threading.main_thread().ident
        self._file = _memory_file()
        self._store = own_store() if world_size() > 1 else None
        self._watched = list(range(world_size())) if rank() == 0 else [0]
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}
        self._told: Verdict | None = None
        self._threads: list[threading.Thread] = []
        self._awake, self._lock = time.monotonic(), threading.Lock()

    def start(self) -> None:
        """Begin to give signs. Collective, so that every rank has given one when the first is looked at."""
        # Of the thread that hears it alone: those of running threads may be freed while they are written.
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=False)
        self._awake = time.monotonic()
        self._give_sign(0)
        if self._store is not None:
            dist.barrier()
        for target in (self._exchange, self._watch):
            thread = threading.Thread(target=target, name="megadpo-watchdog", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """No signs any more."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._interval + 1)
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._file)

    def _exchange(self) -> None:
        """Gives a sign and takes those of others, time and again. It may wait for a store that does not answer."""
        number = 0
        while not self._closing.wait(self._interval):
            number += 1
            self._allow_for_a_pause()
            try:
                self._give_sign(number)
                self._take_signs()
            except RuntimeError:  # the store has gone with its process, which the main thread notices or is about to, too
                self._closing.set()

    def _allow_for_a_pause(self) -> None:
        """Where this very process was stopped (Ctrl-Z, a scheduler) nobody was silent, and no step was late.

        Whichever thread is the first to run again sees to it, before it says or judges anything.
        """
        with self._lock:
            now, before = time.monotonic(), self._awake
            self._awake = now
            if now - before > 3 * self._interval + 1:
                self._heard = dict.fromkeys(self._heard, now)
                self._progress.since += now - before

    def _give_sign(self, number: int) -> None:
        sign = Sign(
            number,
            socket.gethostname(),
            os.getpid(),
            self._file,
            self._progress.doing,
            self._progress.lateness(),
            self._is_waiting(),
        )
        if self._store is None:
            self._hear(0, sign)
        else:
            self._store.set(_key(rank()), json.dumps(vars(sign)))

    def _take_signs(self) -> None:
        if self._store is None:
            return
        for number, text in zip(self._watched, self._store.multi_get([_key(n) for n in self._watched]), strict=True):
            self._hear(number, Sign(**json.loads(text)))
        if rank() != 0 and self._store.check(["megadpo-hang"]):
            told = json.loads(self._store.get("megadpo-hang"))
            self._told = Verdict(told["ranks"], [Sign(**sign) for sign in told["signs"]], told["sentence"])

    def _hear(self, number: int, sign: Sign) -> None:
        before = self._signs.get(number)
        if before is None or before.number != sign.number:
            self._heard[number] = time.monotonic()
        self._signs[number] = sign

    def _is_waiting(self) -> bool:
        """Whether this rank's main thread seems to wait for others: where it is says so."""
        frame: Any = sys._current_frames().get(self._main or 0)
        name = "" if frame is None else frame.f_code.co_filename.replace(os.sep, "/")
        return any(part in name for part in WAITING) or name.endswith("/megadpo/training/step.py")

    def _watch(self) -> None:
        """Looks whether anyone hangs; only at what is in memory, so that it never waits itself."""
        while not self._closing.wait(self._interval):
            self._allow_for_a_pause()
            verdict = self._told or self._verdict(time.monotonic())
            if verdict is not None:
                self._act(verdict)
                return

    def _verdict(self, now: float) -> Verdict | None:
        silent = [number for number, heard in self._heard.items() if now - heard > self._timeout + self._interval]
        if self._store is not None and rank() in silent:
            return None  # nobody's signs come, its own neither: the store is torchrun's, and that does not answer
        if silent:
            seconds = max(now - self._heard[number] for number in silent)
            return self._of(silent, f"gave no sign of life for {seconds:.0f} s")
        if rank() != 0:
            return None
        late = [number for number, sign in self._signs.items() if sign.late > self._timeout]
        if not late or any(sign.doing in UNTIMED for sign in self._signs.values()):
            return None
        if max(now - heard for heard in self._heard.values()) > 3 * self._interval:
            return None  # where a rank begins to be silent, that is what it is soon
        seconds = max(self._signs[number].late for number in late)
        busy = [number for number, sign in self._signs.items() if not sign.is_waiting]
        what = "did not end its step" if busy else "did not end their step, waiting for each other,"
        return self._of(busy or late, f"{what} for {seconds:.0f} s more than a step took before")

    def _of(self, ranks: list[int], what: str) -> Verdict:
        signs = [self._signs[number] for number in ranks]
        names = ", ".join(f"rank {number} ({sign})" for number, sign in zip(ranks, signs, strict=True))
        return Verdict(ranks, signs, f"{names} {what} (train.hang_timeout {self._timeout:g}), last seen in {signs[0].doing}")

    def _act(self, verdict: Verdict) -> None:
        """Tells the others, writes the stacks, and ends this process and those on this machine that hang."""
        if rank() == 0 and self._store is not None:
            told = {"ranks": verdict.ranks, "signs": [vars(sign) for sign in verdict.signs], "sentence": verdict.sentence}
            with contextlib.suppress(RuntimeError):
                self._store.set("megadpo-hang", json.dumps(told))
        with contextlib.suppress(OSError):
            self._directory.mkdir(exist_ok=True)
            with (self._directory / f"rank_{rank():05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        here = socket.gethostname()
        hung = {n: sign for n, sign in zip(verdict.ranks, verdict.signs, strict=True) if sign.host == here and n != rank()}
        for number, sign in hung.items():
            with contextlib.suppress(OSError):
                (self._directory / f"rank_{number:05d}.txt").write_bytes(stacks_of(sign))
        time.sleep(SECONDS_TO_TELL + 2 * self._interval)
        message = f"megadpo: hang: {verdict.sentence}; the stacks of the ranks are in {self._directory}"
        self._end(message, [sign.process for sign in hung.values() if is_there(sign)])


def _key(number: int) -> str:
    return f"megadpo-sign-{number}"


def own_store() -> dist.Store:
    """A connection of one's own to the store where the processes have met: what waits on it keeps nobody else waiting."""
    host, port = LOOPBACK if is_alone() else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
    store.set_timeout(timedelta(days=1))
    return store


def _memory_file() -> int:
    """A descriptor of a file that has no name, for the stacks of this process: others on this machine can read it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(MEMORY_FILE)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def is_there(sign: Sign) -> bool:
    """Whether the process that gave the sign is on this machine, and its number not another's by now."""
    with contextlib.suppress(OSError):
        return MEMORY_FILE in os.readlink(f"/proc/{sign.process}/fd/{sign.stacks}")
    return False


def stacks_of(sign: Sign) -> bytes:
    """The stack of the main thread of another process on this machine; it may be stopped, and is so afterwards.

    Raises:
        OSError: the process cannot be reached.
    """
    if not is_there(sign):
        return b""
    file, size = Path(f"/proc/{sign.process}/fd/{sign.stacks}"), 0
    _send_to_main_thread(sign.process, signal.SIGUSR2)
    os.kill(sign.process, signal.SIGCONT)
    deadline = time.monotonic() + MOST_SECONDS_FOR_STACKS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        before, size = size, file.stat().st_size
        if size and size == before:  # on a busy machine it is not done at once
            break
    os.kill(sign.process, signal.SIGSTOP)
    return file.read_bytes()


def _send_to_main_thread(process: int, number: signal.Signals) -> None:
    """A signal to the main thread of another process, whose id is the process's; any thread may hear one to the process.

    Raises:
        OSError: the process cannot be reached.
    """
    tgkill = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)
    if tgkill is None:
        os.kill(process, number)
    elif tgkill(process, process, int(number)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def watched(timeout: float, output_dir: Path) -> Iterator[Progress]:
    """Within, hangs of any rank are found (timeout 0: they are not); yields what the training loop tells its progress.

    Collective.
    """
    progress = Progress()
    # A process group that the caller has made may have met anywhere.
    if not timeout or (world_size() > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        yield progress
        return
    watchdog = Watchdog(timeout, output_dir, progress)
    watchdog.start()
    try:
        yield progress
    finally:
        watchdog.close()
