"""Ranks of processes that mpirun started: Open MPI's, MPICH's, Intel's and MVAPICH's variables become RANK, WORLD_SIZE, …

Where the processes meet is MASTER_ADDR and MASTER_PORT where both are set, else what rank 0 tells the others through mpi4py.
MPI is used for nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from megadpo.errors import UserError, first_line
from megadpo.launch.supervisor import free_port


@dataclass(frozen=True)
class Names:
    """One MPI's names of the variables of a process."""

    rank: str
    size: str
    local_rank: str
    local_size: str


FAMILIES = (
    Names("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Names("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def adopt_mpi_environment(environ: MutableMapping[str, str]) -> None:
    """Inside mpirun with several processes: sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Does nothing where RANK is set already, outside mpirun, and for a single process. Starts MPI only where it is needed.

    Raises:
        UserError: a variable is no number, or what is missing needs mpi4py, which does not work here.
    """
    names = _family(environ)
    if "RANK" in environ or names is None:
        return
    rank, size = _number(environ, names.rank), _number(environ, names.size)
    if size < 2:
        return
    found = {"RANK": str(rank), "WORLD_SIZE": str(size)}
    for variable, name in (("LOCAL_RANK", names.local_rank), ("LOCAL_WORLD_SIZE", names.local_size)):
        if name in environ:
            found[variable] = str(_number(environ, name))
    needed = {"MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"} - {*environ, *found}
    environ.update({**_agreed(_communicator(names, rank, size)), **found} if needed else found)


def _family(environ: Mapping[str, str]) -> Names | None:
    for names in FAMILIES:
        # srun sets PMI_RANK too, without local ranks; its own variables say more.
        of_slurm = names.rank == "PMI_RANK" and "SLURM_PROCID" in environ and names.local_rank not in environ
        if {names.rank, names.size} <= environ.keys() and not of_slurm:
            return names
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(f"{name} is {environ[name]!r}, not a number; mpirun sets it, so leave it alone")
    return int(environ[name])


def _communicator(names: Names, rank: int, size: int) -> Any:
    """mpi4py's COMM_WORLD."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpirun gives no address where the processes meet, and mpi4py, which would tell it, does not work here "
            f"({first_line(error)}); install MPI and mpi4py, or set MASTER_ADDR, MASTER_PORT and LOCAL_RANK, or use "
            "--launcher mpirun"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, size):
        raise UserError(
            f"mpi4py has rank {world.Get_rank()} of {world.Get_size()}, {names.rank} says {rank} of {size}: "
            "mpi4py uses another MPI than this mpirun: name this one's library in MPI4PY_LIBMPI, install mpi4py for it, "
            "or use --launcher mpirun, which needs no mpi4py"
        )
    return world


def _agreed(world: Any) -> dict[str, str]:
    """What the processes tell each other: rank 0's address and port, and who is on the same machine."""
    rank, hosts = world.Get_rank(), world.allgather(socket.gethostname())
    alone = len(set(hosts)) == 1
    meeting = ("127.0.0.1" if alone else _address(), free_port()) if rank == 0 else None
    address, port = world.bcast(meeting, root=0)
    return {
        "MASTER_ADDR": str(address),
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(hosts[:rank].count(hosts[rank])),
        "LOCAL_WORLD_SIZE": str(hosts.count(hosts[rank])),
    }


def _address() -> str:
    """This machine's address for others; its name where the name leads to a loopback here (Debian's 127.0.1.1)."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if address.startswith("127.") else address
