"""Hostfiles, as DeepSpeed and Open MPI read them: `HOST slots=N` a line, or plain host names; `#` begins a comment."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadpo.errors import UserError

LINE = re.compile(r"(?P<name>[\w.-]+)(?:\s+slots=(?P<slots>\d+))?")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile.

    Attributes:
        slots: how many processes it takes; None where the line does not say.
        where: file:line, for messages.
    """

    name: str
    slots: int | None
    where: str


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order, all with the same number of slots or all without.

    Raises:
        UserError: the file cannot be read, a line is malformed, a host comes twice, the slots are uneven, or none is left.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path} cannot be read: {error}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            hosts.append(_checked(_host(text, f"{path}:{number}"), hosts))
    if not hosts:
        raise UserError(f"--hostfile {path} names no host; give a line `HOST slots=N` for every machine")
    if len(hosts) > 1 and (local := next((host for host in hosts if _is_loopback_name(host.name)), None)):
        raise UserError(
            f"{local.where}: {local.name} is another machine on each of several; give the name others reach it by"
        )
    return hosts


def _host(text: str, where: str) -> Host:
    match = LINE.fullmatch(text)
    if match is None:
        hint = "; give a host name in place of an IPv6 address" if text.count(":") > 1 else ""
        raise UserError(f"{where}: {text!r} is not `HOST` or `HOST slots=N`{hint}")
    if match["slots"] is not None and int(match["slots"]) < 1:
        raise UserError(f"{where}: slots={match['slots']} is not above 0; leave the host out instead")
    return Host(match["name"], None if match["slots"] is None else int(match["slots"]), where)


def _checked(host: Host, before: Sequence[Host]) -> Host:
    if twin := next((other for other in before if other.name == host.name), None):
        raise UserError(f"{host.where}: host {host.name} is already in {twin.where}; name every machine once")
    if before and before[0].slots != host.slots:
        raise UserError(
            f"{host.where}: host {host.name} has {_slots(host)}, but {before[0].name} has {_slots(before[0])} "
            f"({before[0].where}); every machine takes the same number of processes"
        )
    return host


def _slots(host: Host) -> str:
    return "no slots=N" if host.slots is None else f"slots={host.slots}"


def number_of_this_machine(hosts: Sequence[Host]) -> int:
    """Which of the hosts this machine is, by its names and its addresses, from 0.

    Raises:
        UserError: none of them, or several.
    """
    mine = [number for number, host in enumerate(hosts) if is_this_machine(host.name)]
    if not mine:
        path = hosts[0].where.rpartition(":")[0]
        raise UserError(
            f"this machine ({socket.gethostname()}) is not in --hostfile {path}, which has "
            f"{', '.join(host.name for host in hosts)}; add it, or say which it is with --node-rank"
        )
    if len(mine) > 1:
        first, second = hosts[mine[0]], hosts[mine[1]]
        raise UserError(f"{second.where}: host {second.name} is this machine, and so is {first.name} ({first.where})")
    return mine[0]


def is_this_machine(name: str) -> bool:
    """True where `name` is one of this machine's names, or leads to one of its addresses."""
    own = socket.gethostname()
    if name in (own, own.partition(".")[0]):
        return True
    try:
        addresses = {(family, address) for family, _, _, _, address in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return False
    return any(_is_own_address(family, address) for family, address in addresses)


def _is_own_address(family: int, address: tuple[object, ...]) -> bool:
    # A socket can only be bound to an address that one of this machine's interfaces has.
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _is_loopback_name(name: str) -> bool:
    return name.partition(".")[0] == "localhost" or re.fullmatch(r"127(\.\d+){3}", name) is not None
