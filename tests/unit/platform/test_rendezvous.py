"""Where processes meet: who is missing is named, a taken port and a wrong time-out are one sentence."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from megadpo.errors import UserError
from megadpo.launch.supervisor import free_port
from megadpo.platform import rendezvous
from tests.helpers.worlds import run_world

HOUR = timedelta(hours=1)


def _meet_all_but_one(missing: int) -> str:
    """What every rank but `missing` is told by a world of one more than there are, two on each machine."""
    os.environ.update(MEGADPO_RENDEZVOUS_TIMEOUT="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    rank = int(os.environ["RANK"])
    try:
        rendezvous.meet(rank + (rank >= missing), 4, HOUR)
    except UserError as error:
        return str(error)
    return "met"


@pytest.mark.alone  # all but one come within 3 s
@pytest.mark.slow
def test_every_rank_that_came_names_the_one_that_did_not() -> None:
    for told in run_world(3, _meet_all_but_one, 2):
        assert told.startswith("rank 2 (node 1) of 4 did not come to 127.0.0.1:"), told
        assert "within 3 s" in told and "MEGADPO_RENDEZVOUS_TIMEOUT" in told


def test_a_port_that_is_taken_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", free_port()))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=r"rank 0 cannot listen on 127\.0\.0\.1:\d+ .*is another run using the port"):
            rendezvous.meet(0, 1, HOUR)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf"])
def test_a_time_out_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(rendezvous.TIMEOUT_VARIABLE, text)
    with pytest.raises(UserError, match=rf"MEGADPO_RENDEZVOUS_TIMEOUT is '{text}'; give a number of seconds above 0"):
        rendezvous.timeout_seconds()


def test_a_run_spans_machines_where_it_has_more_processes_than_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, nodes, spans in (("2", "1", True), ("4", "9", False), (None, "2", True), (None, "1", False)):
        monkeypatch.setenv("SLURM_NNODES", nodes)
        if local is None:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert rendezvous.spans_machines(4) is spans


def test_a_loopback_is_no_interface_towards_another_machine() -> None:
    assert rendezvous.interface_towards("127.0.0.1") is None
    assert rendezvous.interface_towards("no-such-host.invalid") is None


def _listening(port: int) -> list[str]:
    """The addresses that somebody listens on at a port, as the kernel writes them: 0100007F is 127.0.0.1."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and address.endswith(f":{port:04X}"):
                found.append(address.partition(":")[0])
    return found


def _where_it_listens(address: str, local: str) -> list[str]:
    os.environ.update(MASTER_ADDR=address, LOCAL_WORLD_SIZE=local)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    store = rendezvous.meet(int(os.environ["RANK"]), 2, HOUR)
    found = _listening(int(os.environ["MASTER_PORT"]))
    store.set(f"looked-{os.environ['RANK']}", "")
    store.wait(["looked-0", "looked-1"])
    return [*found, os.environ.get("GLOO_SOCKET_IFNAME", "")]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="asks Linux")
def test_on_one_machine_store_and_gloo_listen_on_the_loopback_alone() -> None:
    for address in ("127.0.0.1", socket.gethostname()):
        for found in run_world(2, _where_it_listens, address, "2"):
            assert found == ["0100007F", "lo"], (address, found)
