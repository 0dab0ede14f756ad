"""Checkpoints written in the step loop, or on a thread behind it: there whole, or not at all, and known to all ranks.

A save has three parts. Its state is gathered from the ranks, in the step loop (run_state.py). Each writer writes its files
to the staging directory. Rank 0 gives the directory its name once all writers have said that their files are on the disk,
and removes the oldest checkpoints. An asynchronous save copies its state to host memory, and does the second and third part
on a thread, while training goes on; the ranks' threads talk to each other over a process group of their own. There is one
such save at a time: the next one, and the end of the run, wait for it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.checkpoint.companions import Companions
from megadpo.checkpoint.sharded import begin, commit, step_checkpoints, step_directory, step_of, write_shard_file
from megadpo.checkpoint.staging import abandon, remove, writing
from megadpo.config.schema import CheckpointConfig
from megadpo.errors import UserError
from megadpo.model.families import ParameterShard
from megadpo.parallel.agreement import first_problem, from_all_ranks, problem_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Item = tuple[str, ParameterShard, Tensor]
SECONDS_FOR_A_SAVE_OF_A_FAILED_RUN = 60.0
CONTAINER = Path("/sys/fs/cgroup")


@dataclass
class Save:
    """What a checkpoint is written from.

    Attributes:
        writer: the name that this rank's files begin with.
        items: what this rank writes (kind, shard, values); taken one after the other, with collectives in between unless
            they are in host memory already.
        state: as `commit` takes it.
        check: refuses, on all ranks alike, to publish what is not finite in `items`, once they were taken; given what
            removes the files that were written by then. Collective, in the step loop.
    """

    step: int
    writer: str
    items: Iterable[Item]
    state: dict[str, Any]
    check: Callable[[Callable[[], None]], None] | None = None


@dataclass
class SaveTimes:
    """How long the saves of a run take, each from its beginning in the step loop until it is on the disk.

    Attributes:
        longest: seconds, of those that have ended; None: none has.
        began: `time.monotonic()` of the one that has not; None: there is none.
    """

    longest: float | None = None
    began: float | None = None

    def begin(self) -> None:
        self.began = time.monotonic()

    def end(self) -> None:
        if self.began is not None:
            self.longest = max(self.longest or 0.0, time.monotonic() - self.began)
            self.began = None


@dataclass
class Saver:
    """The saves of a run. Every method but `report` and `remove_oldest` is collective.

    Attributes:
        root: where the checkpoints are.
        companions, hf_config: what else is in them.
        shapes: of the tensors in them.
        kept: the same of each kind of them.
        log: shows the user a line.
        check_owner: raises UserError where the run's directory is another run's by now; called on rank 0.
        on_saved: called on each rank, in the step loop, with step and directory of a checkpoint that is there.
        kept_steps: gives steps of which the last one that has a checkpoint stays, however old it is; asked on rank 0.
        last_step: of the newest checkpoint that this run has written, once `on_saved` was called.
        times: what its saves take.
    """

    root: Path
    options: CheckpointConfig
    companions: Companions
    hf_config: PretrainedConfig
    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[str, tuple[int, ...]]]
    log: Callable[[str], None]
    check_owner: Callable[[], None]
    on_saved: Callable[[int, Path], None]
    kept_steps: Callable[[], Sequence[int]] = tuple
    last_step: int | None = None
    times: SaveTimes = field(default_factory=SaveTimes)
    _pool: ThreadPoolExecutor | None = field(default=None, init=False)
    _group: dist.ProcessGroup | None = field(default=None, init=False)
    _in_flight: tuple[int, Future[str | None]] | None = field(default=None, init=False)
    _is_asynchronous: bool | None = field(default=None, init=False)
    _not_removed: str | None = field(default=None, init=False)
    _pinned: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # Not made with the first save: by then the launcher that keeps the ranks' store may be gone, and what they have must
        # still be saved. Collectives of the thread must not come between those of the step loop.
        if self.options.asynchronous is not False and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def save(self, save: Save, num_bytes: int) -> Path:
        """Write a checkpoint, or begin to; where it is, or will be. A save that is still being written is waited for.

        Args:
            num_bytes: of this rank's items.

        Raises:
            UserError: this save or the one before cannot be written, and `checkpoint.on_failed_write` is `stop`.
        """
        self.finish()
        self.times.begin()
        if self._runs_behind(num_bytes):
            assert self._pool is not None
            save.items = _taken_out(deque(self._in_host_memory(save.items)))
            if save.check is not None:
                save.check(lambda: None)
                save.check = None
            self._in_flight = (save.step, self._pool.submit(self._write, save))
        else:
            self._ended(save.step, self._write(save))
        return step_directory(self.root, save.step)

    def report(self) -> None:
        """Call `on_saved` where the save behind the loop has ended well by now. Waits for nothing, and is not collective:
        ranks see the end at different steps, so that a failure is told by the next method that all of them call."""
        if self._in_flight is not None:
            written = self._in_flight[1]
            if written.done() and written.exception() is None and written.result() is None:
                self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written behind the loop, if there is one.

        Raises:
            UserError: as `save`.
        """
        if self._in_flight is not None:
            (step, written), self._in_flight = self._in_flight, None
            self._ended(step, written.result())

    def close(self, has_failed: bool = False, at_once: bool = False) -> None:
        """End the thread, when it has written what it is writing.

        Args:
            has_failed: the run ends with an error; the save is given some time, and what comes of it is not said.
            at_once: or no time.
        """
        if has_failed:
            if self._in_flight is not None and not at_once:
                concurrent.futures.wait([self._in_flight[1]], SECONDS_FOR_A_SAVE_OF_A_FAILED_RUN)
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            return
        self.finish()
        if self._pool is not None:
            self._pool.shutdown()
        if self._group is not None:
            dist.barrier()  # nobody closes a connection on which another one still reads
            dist.destroy_process_group(self._group)
        self._pool = self._group = None

    def _runs_behind(self, num_bytes: int) -> bool:
        """Whether saves are asynchronous: decided once, the same on all ranks."""
        if self._is_asynchronous is None:
            asked = self.options.asynchronous
            self._is_asynchronous = all(from_all_ranks(_has_room_for(num_bytes))) if asked is None else asked
            if asked is None and not self._is_asynchronous:
                self.log("host memory has no room for a copy of the training state: the step loop waits for its saves")
            if self._is_asynchronous:
                self._pool = ThreadPoolExecutor(1, "megadpo-save")
        return self._is_asynchronous

    def _in_host_memory(self, items: Iterable[Item]) -> list[Item]:
        """Values that later steps do not change. From a device they go to pinned memory, which is kept for the next save."""
        taken: list[Item] = []
        for kind, shard, values in items:
            if values.device.type == "cpu":
                taken.append((kind, shard, values))
                continue
            buffer = self._pinned.get((kind, shard.name))
            if buffer is None:
                buffer = self._pinned[kind, shard.name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            taken.append((kind, shard, buffer.copy_(values, non_blocking=True)))
        if self._pinned:
            torch.cuda.synchronize()
        return taken

    def _write(self, save: Save) -> str | None:
        """Second and third part of a save; why it failed on one of the ranks, else None."""
        try:
            return self._write_untimed(save)
        finally:
            self.times.end()

    def _write_untimed(self, save: Save) -> str | None:
        directory, is_first = step_directory(self.root, save.step), dist.get_rank() == 0
        problem = first_problem(problem_of(lambda: begin(directory)) if is_first else None, self._group)
        if problem is not None:
            for _ in save.items:  # takes part in gathering what the others wait for
                pass
            return problem
        manifest: dict[str, Any] | None = None
        try:
            manifest = write_shard_file(directory, save.writer, save.items)
        except UserError as error:
            problem = str(error)
            for _ in save.items:
                pass
        answers = from_all_ranks((problem, manifest), self._group)
        problem = next((found for found, _ in answers if found is not None), None)
        if problem is None and save.check is not None:
            save.check(lambda: abandon(directory))
        if is_first:
            if problem is None:
                problem = problem_of(self.check_owner)
            if problem is None:
                manifests = [manifest for _, manifest in answers]
                also = self.companions, self.hf_config, self.shapes, self.kept
                problem = problem_of(lambda: commit(directory, manifests, save.state, *also))
            if problem is not None:
                abandon(directory)
        problem = first_problem(problem, self._group)
        if is_first and problem is None:
            self._not_removed = problem_of(lambda: self.remove_oldest(save.step))
        return problem

    def remove_oldest(self, step: int) -> None:
        """Of the checkpoints up to that of `step`, remove all but the newest `keep` and that of `kept_steps`; on rank 0.

        Raises:
            UserError: the disk refuses.
        """
        earlier = [path for path in step_checkpoints(self.root) if (step_of(path) or 0) <= step]
        by_step = {step_of(path): path for path in earlier}
        kept = next((by_step[best] for best in reversed(self.kept_steps()) if best in by_step), None)
        for old in earlier[: -self.options.keep]:
            if old == kept:
                continue
            with writing(old):
                remove(old)

    def _ended(self, step: int, problem: str | None) -> None:
        if problem is None:
            if self._not_removed is not None:
                self.log(f"warning: an old checkpoint stays: {self._not_removed}")
            self.last_step = step
            self.on_saved(step, step_directory(self.root, step))
        elif self.options.on_failed_write == "skip":
            self.log(f"warning: no checkpoint of step {step}: {problem}; going on without it")
        else:
            raise UserError(f"no checkpoint of step {step}: {problem}; what was saved before is as it was")


def _taken_out(items: deque[Item]) -> Iterator[Item]:
    """One after the other, and none is kept that was taken."""
    while items:
        yield items.popleft()


def _has_room_for(num_bytes: int) -> bool:
    """Whether this machine's memory has room for a copy of so many bytes by each of its processes, and as much again."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return False
    with contextlib.suppress(OSError, ValueError):  # in a container there may be less
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return 2 * num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size()))) <= available
