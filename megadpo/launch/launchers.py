"""`train --launcher X`: who the machines of a run are, and the command by which X starts the processes on them.

megadpo, torchrun and deepspeed are started on every machine with the same command; mpirun and srun once, and reach the
other machines themselves. Each worker gets `megadpo train CONFIG key=value …` and finds its rank in its environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megadpo.console.heartbeat import write_line
from megadpo.errors import UserError
from megadpo.launch.foreign import is_distributed
from megadpo.launch.hostfile import Host, number_of_this_machine, read_hostfile
from megadpo.launch.supervisor import DEFAULT_PORT, Node, start_workers, threads_per_process

LAUNCHERS = ("megadpo", "torchrun", "deepspeed", "mpirun", "srun")


@dataclass(frozen=True)
class Request:
    """The launch options of the command line; None: not given."""

    launcher: str | None = None
    nproc: int | None = None
    nnodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    port: int | None = None
    hostfile: Path | None = None

    def names(self) -> list[str]:
        """The options that were given, as they are written."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class Machines:
    """What a request comes to: this machine among the others, and how many processes each has."""

    node: Node
    nproc: int
    hosts: tuple[Host, ...] = ()
    hostfile: Path | None = None


def start_processes(request: Request, worker: Sequence[str]) -> int | None:
    """Starts the processes that a request asks for, each as ``megadpo *worker``, and waits for those of this machine.

    Returns:
        Their exit status; None where nothing is to be started, and this process does the work: it is one of torchrun's, or
        the only one. With another launcher than our own this never returns: the launcher takes this process's place.

    Raises:
        UserError: options that contradict each other, or a launcher that is not there.
    """
    if not request.names() or is_worker(request):
        return None
    found = machines(request)
    if request.launcher not in (None, "megadpo"):
        become(request.launcher, found, worker)
    if found.nproc * found.node.count == 1:
        return None
    write_line(f"starting {found.nproc} {'process' if found.nproc == 1 else 'processes'}")
    return start_workers(found.nproc, [sys.executable, "-m", "megadpo", *worker], found.node)


def is_worker(request: Request) -> bool:
    """True in a process that torchrun, srun, … has started, whose options may repeat how many there are.

    Raises:
        UserError: they ask for something else.
    """
    if not is_distributed(os.environ):
        return False
    world_size, names = os.environ["WORLD_SIZE"], request.names()
    repeats = {"--nproc", "--nnodes", "--node-rank", "--master"}.issuperset(names)
    if not repeats or world_size != str((request.nproc or 1) * (request.nnodes or 1)):
        given = " and ".join(f"{name} {getattr(request, name[2:].replace('-', '_'))}" for name in names)
        raise UserError(
            f"{given} is given, but this process is already one of {world_size} (started by torchrun, srun, …); "
            f"leave {' and '.join(names)} out"
        )
    return True


def machines(request: Request) -> Machines:
    """Raises UserError where the options contradict each other, or the hostfile is wrong (file:line)."""
    for name, value in (("--nproc", request.nproc), ("--nnodes", request.nnodes)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if request.port is not None and not 0 < request.port < 65536:
        raise UserError(f"--port {request.port} is not a port from 1 to 65535")
    if request.launcher == "srun":
        return _of_slurm(request)
    return _of_hostfile(request, request.hostfile) if request.hostfile else _of_options(request)


def _of_slurm(request: Request) -> Machines:
    for name in ("--hostfile", "--master", "--node-rank", "--port"):
        if name in request.names():
            raise UserError(f"{name} is not for --launcher srun: SLURM knows the machines; leave it out")
    return Machines(Node(0, request.nnodes or 1), request.nproc or 1)


def _of_hostfile(request: Request, path: Path) -> Machines:
    for name in ("--nnodes", "--master"):
        if name in request.names():
            raise UserError(f"{name} and --hostfile {path} both say which machines there are; leave {name} out")
    hosts = read_hostfile(path)
    if request.launcher == "deepspeed" and hosts[0].slots is None:
        raise UserError(f"{hosts[0].where}: deepspeed wants `{hosts[0].name} slots=N` with the number of processes")
    if None not in (request.nproc, hosts[0].slots) and request.nproc != hosts[0].slots:
        raise UserError(f"--nproc {request.nproc} contradicts slots={hosts[0].slots} ({hosts[0].where}); leave --nproc out")
    nproc = request.nproc or hosts[0].slots
    if nproc is None:
        raise UserError(f"{hosts[0].where} gives no slots=N; say how many processes a machine takes with --nproc N")
    if request.node_rank is not None and not 0 <= request.node_rank < len(hosts):
        raise UserError(f"--node-rank {request.node_rank} is not from 0 to {len(hosts) - 1}, the hosts of {path}")
    if request.launcher == "mpirun":
        _refuse_node_rank(request)
        number = 0
    else:
        number = number_of_this_machine(hosts) if request.node_rank is None else request.node_rank
    if len(hosts) == 1 and request.launcher != "mpirun":
        return Machines(_one_machine(request), nproc)
    return Machines(Node(number, len(hosts), f"{hosts[0].name}:{request.port or DEFAULT_PORT}"), nproc, tuple(hosts), path)


def _of_options(request: Request) -> Machines:
    count, number, master = request.nnodes or 1, request.node_rank, request.master
    if request.launcher == "mpirun":
        _refuse_node_rank(request)
    if count == 1:
        if number or master:
            raise UserError(f"{'--node-rank' if number else '--master'} is for several machines: it needs --nnodes > 1")
        return Machines(_one_machine(request), request.nproc or 1)
    if request.launcher in ("deepspeed", "mpirun"):
        raise UserError(f"--launcher {request.launcher} on several machines needs --hostfile FILE with their names")
    if master is None:
        raise UserError(f"--nnodes {count} needs --master HOST[:PORT], the first machine's address")
    host, _, port = master.partition(":")
    if not host or (":" in master and not (port.isdecimal() and 0 < int(port) < 65536)):
        hint = "; give a host name in place of an IPv6 address" if master.count(":") > 1 else ""
        raise UserError(f"--master {master} is not HOST or HOST:PORT{hint}")
    if port and request.port is not None and int(port) != request.port:
        raise UserError(f"--master {master} and --port {request.port} are two ports; give one")
    if number is None or not 0 <= number < count:
        raise UserError(f"--nnodes {count} needs --node-rank, from 0 to {count - 1}, got {number}")
    return Machines(Node(number, count, f"{host}:{port or request.port or DEFAULT_PORT}"), request.nproc or 1)


def _refuse_node_rank(request: Request) -> None:
    if request.node_rank is not None:
        raise UserError("--node-rank is not for --launcher mpirun, which is started once; leave it out")


def _one_machine(request: Request) -> Node:
    return Node(master=f"127.0.0.1:{request.port}" if request.port else None)


def become(launcher: str, machines: Machines, worker: Sequence[str]) -> NoReturn:
    """Replaces this process by `launcher`, which starts `python -m megadpo *worker` as every rank.

    Raises:
        UserError: the launcher is not installed, or the port is taken.
    """
    machines.node.require_free_port()
    os.environ.setdefault("OMP_NUM_THREADS", threads_per_process(machines.nproc))
    arguments = command(launcher, machines, worker, os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(arguments[0], arguments)
    except OSError as error:
        raise UserError(f"--launcher {launcher}: {arguments[0]} cannot be started ({error.strerror})") from error


def command(launcher: str, machines: Machines, worker: Sequence[str], environ: MutableMapping[str, str]) -> list[str]:
    """The launcher's command line; sets in `environ` what it hands on to the workers."""
    if launcher == "torchrun":
        return [*_torchrun(machines), "-m", "megadpo", *worker]
    if launcher == "deepspeed":
        return [*_deepspeed(machines, environ), "--module", "megadpo", *worker]
    python = [sys.executable, "-m", "megadpo", *worker]
    return [*(_srun(machines) if launcher == "srun" else _mpirun(machines, environ)), *python]


def _torchrun(machines: Machines) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={machines.nproc}"]
    torch = importlib.util.find_spec("torch")
    program = Path(torch.origin).parent / "distributed" / "run.py" if torch is not None and torch.origin else None
    if program is not None and "--signals-to-handle" in program.read_text(encoding="utf-8"):
        start.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    if machines.node.master is None:
        return [*start, "--standalone"]
    host, port = machines.node.address()
    nodes = [f"--nnodes={machines.node.count}", f"--node-rank={machines.node.number}"]
    return [*start, *nodes, f"--master-addr={host}", f"--master-port={port}"]


def _deepspeed(machines: Machines, environ: MutableMapping[str, str]) -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("--launcher deepspeed: DeepSpeed is not installed here; pip install deepspeed, or use torchrun")
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    host, port = machines.node.address()
    if machines.node.count > 1:
        # Without ssh: the same command is given on every machine, as with the other launchers.
        nodes = ["--hostfile", str(machines.hostfile), "--no_ssh", "--node_rank", str(machines.node.number)]
        return [*start, *nodes, "--master_addr", host, "--master_port", port]
    # An empty file, for else it reads /job/hostfile.
    start += ["--hostfile", os.devnull, "--master_port", port]
    devices = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if not devices:
        return [*start, "--num_gpus", str(machines.nproc)]
    if len(devices) < machines.nproc:
        raise UserError(f"--nproc {machines.nproc} is more than the devices of CUDA_VISIBLE_DEVICES={','.join(devices)}")
    return [*start, "--include", f"localhost:{','.join(devices[: machines.nproc])}"]


def _mpirun(machines: Machines, environ: MutableMapping[str, str]) -> list[str]:
    program = _program("mpirun", "MPI (Open MPI, MPICH or Intel MPI)")
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = machines.node.address()
    start = [program, "-np", str(machines.nproc * machines.node.count)]
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    version = answer.stdout + answer.stderr
    is_open_mpi = any(name in version for name in ("Open MPI", "OpenRTE", "PRRTE"))
    hosts = ",".join(f"{host.name}:{machines.nproc}" for host in machines.hosts)
    if is_open_mpi:
        # Of the environment Open MPI hands on only what it is told to.
        # Its binding to cores would put all threads of a process on one.
        start += ["--bind-to", "none"]
        names = [name for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONPATH") if name in environ]
        return [*start, *(["--host", hosts] if hosts else []), *(word for name in names for word in ("-x", name))]
    return [*start, *(["-hosts", hosts] if hosts else [])]


def _srun(machines: Machines) -> list[str]:
    program = _program("srun", "SLURM")
    total = str(machines.nproc * machines.node.count)
    counts = ["--nodes", str(machines.node.count), "--ntasks", total, "--ntasks-per-node", str(machines.nproc)]
    return [program, "--kill-on-bad-exit=1", *counts]


def _program(name: str, what: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UserError(f"--launcher {name}: {what} is not installed here: there is no {name} in PATH")
    return path
