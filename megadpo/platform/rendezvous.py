"""Where the processes of a run meet: a store on rank 0's machine, a time-out that names who is missing.

The store asks nobody who he is: where all processes are on one machine, it listens on the loopback alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megadpo.errors import UserError, first_line

TIMEOUT_VARIABLE = "MEGADPO_RENDEZVOUS_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 300.0
SECONDS_BETWEEN_LOOKS = 0.2
LOOPBACK = "127.0.0.1"
SECONDS_RANK_0_STAYS = 3.0
"""Rank 0 has the store: it goes last, so that the others can tell who is missing too."""


def meet(rank: int, size: int, lifetime: timedelta) -> dist.Store:
    """The store that all processes of the run have come to, at MASTER_ADDR:MASTER_PORT.

    Args:
        lifetime: how long later waits on the store may take.

    Raises:
        UserError: the port is taken, rank 0 does not answer, or ranks are missing when the time is over: which ones.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError("RANK is set but MASTER_ADDR or MASTER_PORT is not; start with --nproc, or see --launcher")
    host, port, seconds = os.environ["MASTER_ADDR"], _port(os.environ["MASTER_PORT"]), timeout_seconds()
    if spans_machines(size):
        name_network_interface(host)
    elif is_alone():
        host = LOOPBACK
        use_loopback()
    deadline = time.monotonic() + seconds
    store = _open_store(host, port, rank, size, seconds)
    keys = [f"megadpo-here-{number}" for number in range(size)]
    store.set(keys[rank], socket.gethostname())
    missing = _wait(store, keys, deadline + (SECONDS_RANK_0_STAYS if rank == 0 else 0))
    if missing:
        raise UserError(
            f"{_ranks(missing)} of {size} did not come to {host}:{port} within {seconds:g} s; look at what that machine "
            f"printed, start the same command there, or set {TIMEOUT_VARIABLE} to more seconds"
        )
    store.set_timeout(lifetime)
    return store


def check_environment() -> None:
    """Refuse variables by which this process would be a rank of no run.

    Raises:
        UserError: RANK or WORLD_SIZE without the other, or one that is no number in its range.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    how = "unset both to train alone, or start with --nproc, see --launcher"
    if size is None and rank is None:
        return
    if size is None or rank is None:
        given, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        raise UserError(f"{given} is set to {os.environ[given]!r} but {missing} is not set; {how}")
    if not size.isdecimal() or not rank.isdecimal() or not int(rank) < int(size):
        raise UserError(f"RANK is {rank!r} and WORLD_SIZE is {size!r}; give a rank below the number of processes, or {how}")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}, not a number; {how}")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT is {text!r}; give a port from 1 to 65535, the same on every machine")
    return int(text)


def timeout_seconds() -> float:
    """How long to wait for all processes, from the environment.

    Raises:
        UserError: it is no number above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{TIMEOUT_VARIABLE} is {text!r}; give a number of seconds above 0")
    return seconds


def spans_machines(size: int) -> bool:
    """Whether the run has processes elsewhere (torchrun and our launcher say how many are here; SLURM may not)."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(local) < size if local else int(os.environ.get("SLURM_NNODES", "1")) > 1


def is_alone() -> bool:
    """Whether the launcher says that all processes are on this machine, and the store is ours (torchrun has its own)."""
    local, size = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    return local is not None and local == size and not _has_agent_store()


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def use_loopback() -> None:
    """Let gloo listen on the loopback alone, unless GLOO_SOCKET_IFNAME says where."""
    if sys.platform == "linux" and "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def name_network_interface(host: str) -> None:
    """Let gloo use the interface that leads to `host`, unless GLOO_SOCKET_IFNAME says which.

    By itself gloo takes the address that this machine's own name stands for, often a loopback that nobody else reaches.
    """
    name = interface_towards(host) if sys.platform == "linux" else None
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_towards(host: str) -> str | None:
    """The IPv4 interface whose address messages to `host` are sent from; None where there is none, or a loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # nothing is sent: this only asks the kernel for the way
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if not own.startswith("127.") and _address_of(probe, name) == own:
                    return name
        except OSError:
            return None
    return None


def _address_of(probe: socket.socket, name: str) -> str | None:
    get_interface_address = 0x8915
    try:
        answer = fcntl.ioctl(probe.fileno(), get_interface_address, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])


def _open_store(host: str, port: int, rank: int, size: int, seconds: float) -> dist.Store:
    is_server = rank == 0 and not _has_agent_store()
    if not is_server:
        _wait_for_listener(host, port, rank, seconds)
    options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
    try:
        if is_server and host == LOOPBACK:
            options["master_listen_fd"] = _listening_on_loopback(port)
        return dist.TCPStore(host, port, size, is_server, timedelta(seconds=seconds), **options)
    except (RuntimeError, ValueError, OSError) as error:
        if is_server:
            raise UserError(
                f"rank 0 cannot listen on {host}:{port} ({first_line(error)}); is another run using the port? "
                "choose another with --port or MASTER_PORT, the same on every machine"
            ) from error
        raise _no_answer(host, port, rank, seconds, error) from error


def _listening_on_loopback(port: int) -> int:
    """A socket for torch's store, which closes it; by itself that would listen on every interface."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
        return listener.detach()


def _wait_for_listener(host: str, port: int, rank: int, seconds: float) -> None:
    """Raises UserError where nobody accepts connections in time; torch's store would print its stack too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _no_answer(host, port, rank, seconds, error) from error
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _no_answer(host: str, port: int, rank: int, seconds: float, error: Exception) -> UserError:
    return UserError(
        f"rank {rank}: no answer from rank 0 at {host}:{port} within {seconds:g} s ({first_line(error)}); is it "
        f"started, and is {host} the address that this machine reaches it by?"
    )


def _wait(store: dist.Store, keys: Sequence[str], deadline: float) -> list[int]:
    """The numbers of the keys that are not set in time."""
    missing = list(range(len(keys)))
    while True:
        try:
            missing = [number for number in missing if not store.check([keys[number]])]
        except RuntimeError as error:
            raise UserError(f"rank 0 left while the processes were meeting ({first_line(error)})") from error
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _ranks(numbers: Sequence[int]) -> str:
    """ "rank 3", "ranks 2, 3 (node 1)"."""
    text = f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    nodes = sorted({number // local for number in numbers}) if local else []
    return text + (f" (node {', '.join(map(str, nodes))})" if nodes else "")
