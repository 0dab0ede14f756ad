"""Whether a run stops before its last step: each rank may ask, all agree on the step, in a sum that they make anyway.

A rank asks because it was sent a signal (`launch/signals.py`), because `checkpoint.before_deadline` is near, or because the
torchrun, deepspeed or mpirun that started it is gone. What it asks for is one more number in the reduction of the step's
metrics, so that agreeing costs nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megadpo.errors import UserError
from megadpo.launch.foreign import ancestors, foreign_launcher
from megadpo.launch.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, Request
from megadpo.platform.device import compute_device
from megadpo.training.saving import SaveTimes

INTERRUPTED_VOTE = float(2**20)
"""More than there are ranks, so that a sum of votes says of each kind whether there is one."""
SAVED_BYTES_PER_SECOND = 200e6
"""What a first save is expected to write until one has been measured; slow disks do this."""
SAVED_BYTES_PER_PARAMETER = 12
"""fp32 weights and two moments."""


@dataclass
class Deadline:
    """When the run has to have ended, and how long what must come before that takes.

    Attributes:
        at: `time.time()` of it.
        expected_save: seconds, until a save has been measured.
        saves: the run's, as its Saver measures them.
        longest_step: seconds, of those so far.
    """

    at: float
    expected_save: float
    saves: SaveTimes = field(default_factory=SaveTimes)
    longest_step: float = 0.0

    def is_near(self) -> bool:
        """Whether another step and the save after it might end too late. They are given half as long again.

        A save that is being written behind the loop has to end before that one begins.
        """
        save = self.expected_save if self.saves.longest is None else self.saves.longest
        began = self.saves.began  # the thread that writes may end it at any time
        in_flight = 0.0 if began is None else max(began + save - time.monotonic(), 0.0)
        return time.time() + 1.5 * (self.longest_step + in_flight + save) > self.at


@dataclass
class Stopping:
    """Whether the run is to stop, on this rank and as all have agreed.

    Attributes:
        request: what the signals to this process have asked for.
        agreed: the exit status that the run is to stop with, the same on every rank; None: it goes on.
        deadline: rank 0's; its clock is the one that counts.
        launcher: the processes that this rank must not outlive.
    """

    request: Request = field(default_factory=Request)
    deadline: Deadline | None = None
    agreed: int | None = None
    launcher: tuple[int, ...] | None = field(default_factory=lambda: foreign_launcher(os.environ))

    def vote(self) -> float:
        """What this rank asks for, to be summed over the ranks and given to `count`."""
        if self.request.status == EXIT_INTERRUPTED:
            return INTERRUPTED_VOTE
        is_due = self.deadline is not None and self.deadline.is_near()
        is_orphan = self.launcher is not None and ancestors(len(self.launcher)) != self.launcher
        return float(self.request.status is not None or is_due or is_orphan)

    def count(self, votes: float) -> None:
        """Takes the sum of all ranks' votes."""
        if votes and self.agreed is None:
            self.agreed = EXIT_INTERRUPTED if votes >= INTERRUPTED_VOTE else EXIT_PREEMPTED

    def agree(self) -> bool:
        """Whether the run is to stop, asked where no metrics are reduced; collective."""
        votes = torch.full((1,), self.vote(), dtype=torch.float64, device=compute_device())
        dist.all_reduce(votes)
        self.count(votes.item())
        return self.agreed is not None

    def step_took(self, seconds: float) -> None:
        """Takes how long a step was."""
        if self.deadline is not None:
            self.deadline.longest_step = max(self.deadline.longest_step, seconds)


def deadline_of(before: float | str | None, began: float, num_parameters: int) -> Deadline | None:
    """The deadline of `checkpoint.before_deadline`, for rank 0.

    Args:
        began: `time.time()` of the run's beginning.
        num_parameters: of the whole model.

    Raises:
        UserError: it is "slurm", and SLURM gives no end.
    """
    if before is None:
        return None
    at = slurm_end(os.environ) if isinstance(before, str) else began + before
    return Deadline(at, num_parameters * SAVED_BYTES_PER_PARAMETER / SAVED_BYTES_PER_SECOND)


def slurm_end(environ: Mapping[str, str]) -> float:
    """When this SLURM job has to end, as `time.time()`: from SLURM_JOB_END_TIME, else as squeue says.

    Raises:
        UserError: neither gives a time.
    """
    text = environ.get("SLURM_JOB_END_TIME", "")
    if text.isdecimal():
        return float(text)
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("checkpoint.before_deadline is slurm, but this is no SLURM job; give seconds, or leave it out")
    try:
        answer = subprocess.run(
            ["squeue", "--noheader", "--job", job, "--format", "%L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    left = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", answer)
    if left is None:
        raise UserError(
            f"checkpoint.before_deadline is slurm, but SLURM gives job {job} no end (SLURM_JOB_END_TIME is not set, squeue "
            f"says {answer!r}); give seconds, or submit the job with --time"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in left.groups())
    return time.time() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
