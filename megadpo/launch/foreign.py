"""Processes that somebody else's launcher has started: their rank from SLURM's and deepspeed's variables and arguments, and
whether that launcher is still there. (Those of mpirun: mpi.py.)"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from megadpo.errors import UserError

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
