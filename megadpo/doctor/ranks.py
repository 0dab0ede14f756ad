"""Several processes, tried out: whether they meet, add up right and how fast, are the same, and see the same files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megadpo.doctor.check import Check
from megadpo.doctor.files import nearest
from megadpo.errors import UserError, first_line
from megadpo.parallel.layout import Layout
from megadpo.parallel.messages import gathered
from megadpo.parallel.world import joined_world, rank, world_size
from megadpo.platform.device import communication_backend, compute_device

SMALL_BYTES = 4096
LARGE_MIB = {"cpu": 16, "cuda": 256}
"""Of the all-reduce whose bandwidth is measured."""
REPETITIONS = 5
MINUTES = 5.0
SLOW_GPU_GB_PER_SECOND = 10.0
"""Between cards of one machine: below it they do not talk over NVLink or PCIe peer access."""
SLOW_NETWORK_GB_PER_SECOND = 1.0
"""Between machines: below it they talk over Ethernet, not over InfiniBand or RoCE."""


@dataclass(frozen=True)
class Rank:
    """What a process says of itself; `code` is a digest of megadpo's own."""

    host: str
    python: str
    torch: str
    code: str
    device: str
    sees_output_dir: bool | None

    def versions(self) -> tuple[str, str, str]:
        return self.python, self.torch, self.code


def check_ranks(output_dir: str = "") -> list[Check]:
    """Joins the processes and tries them; every rank calls it. The checks are rank 0's, other ranks get none.

    Args:
        output_dir: where a run would write; "" : that is not looked at.
    """
    name = f"{world_size()} processes"
    try:
        with joined_world(Layout(data=world_size()), seed=0, timeout_minutes=MINUTES):
            ranks = _roll_call(output_dir)
            sums, latency, bandwidth = _all_reduce()
    except (UserError, RuntimeError) as error:
        fix = "Look at firewalls and interfaces (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO says more."
        return [Check(name, "failed", f"they did not come together: {first_line(error)}", fix)] if rank() == 0 else []
    if rank() != 0:
        return []
    hosts = list(dict.fromkeys(one.host for one in ranks))
    machines = f"{len(hosts)} machine{'s' * (len(hosts) > 1)}"
    checks = [Check(name, "ok", f"on {machines} ({', '.join(hosts[:8])}), {communication_backend()}")]
    checks += judge_versions(ranks)
    checks.append(judge_all_reduce(sums, latency, bandwidth, len(ranks), len(hosts)))
    return checks + ([judge_output_dir(ranks, output_dir)] if output_dir else [])


def _roll_call(output_dir: str) -> list[Rank]:
    """What every rank says of itself. Whether all see the same directory is tried with a file of rank 0's."""
    above, here = (nearest(Path(output_dir)), rank()) if output_dir else (Path(), rank())
    directory, name = gathered([str(above), f".megadpo-doctor-{uuid.uuid4().hex}"])[0]
    token = Path(directory) / name
    made = False
    if output_dir and here == 0:
        try:
            token.write_bytes(b"")
            made = True
        except OSError:
            made = False
    sees = token.exists() if gathered(made)[0] else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    own = Rank(socket.gethostname(), platform.python_version(), torch.__version__, code_digest(), device, sees)
    ranks = [Rank(**told) for told in gathered(asdict(own))]
    if made:
        token.unlink()
    return ranks


def _all_reduce() -> tuple[bool, float, float]:
    """Whether sums are right, seconds of a small all-reduce, bytes a second of a large one (of each rank's buffer)."""
    device, size = compute_device(), world_size()
    value = torch.full((SMALL_BYTES // 4,), float(rank() + 1), device=device)
    dist.all_reduce(value)
    right = bool((value == size * (size + 1) / 2).all())
    large = torch.zeros(LARGE_MIB[device.type] << 18, device=device)
    latency = _seconds(torch.zeros(SMALL_BYTES // 4, device=device))
    seconds = _seconds(large)
    return right, latency, large.numel() * 4 * 2 * (size - 1) / size / seconds


def _seconds(tensor: torch.Tensor) -> float:
    """Of one all-reduce, the fastest of some."""
    times = []
    for _ in range(REPETITIONS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def code_digest() -> str:
    """Of all of megadpo's Python files: two checkouts with the same version may differ."""
    package, hasher = Path(__file__).parents[1], hashlib.blake2b(digest_size=4)
    for file in sorted(package.rglob("*.py")):
        hasher.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()


def judge_versions(ranks: list[Rank]) -> list[Check]:
    """All ranks have the same of what computes."""
    odd = next((number for number, one in enumerate(ranks) if one.versions() != ranks[0].versions()), None)
    if odd is None:
        return [Check("same versions", "ok", f"torch {ranks[0].torch} and the same megadpo everywhere")]
    other, first = ranks[odd], ranks[0]
    found = (
        f"rank {odd} on {other.host} has Python {other.python}, torch {other.torch}, megadpo's code {other.code}; "
        f"rank 0 on {first.host} has {first.python}, {first.torch}, {first.code}"
    )
    return [Check("same versions", "failed", found, "Install the same environment on every machine.")]


def judge_all_reduce(right: bool, latency: float, bandwidth: float, size: int, num_machines: int) -> Check:
    """What an all-reduce over all ranks gave.

    Args:
        latency: seconds of a small one.
        bandwidth: bytes a second that each rank sent, as nccl-tests' "busbw".
    """
    if not right:
        fix = "Do not train here: try NCCL_P2P_DISABLE=1, another driver, or one machine less, until sums are right."
        return Check("all-reduce", "failed", f"the sum over {size} ranks is wrong", fix)
    speed = bandwidth / 1e9
    found = f"sums are right; {latency * 1e3:.2f} ms for 4 KiB, {speed:.2f} GB/s a rank for a large one"
    on_gpus = communication_backend() == "nccl"
    if on_gpus and num_machines > 1 and speed < SLOW_NETWORK_GB_PER_SECOND:
        fix = (
            "NCCL goes over Ethernet: name the fast network in NCCL_IB_HCA or NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more."
        )
        return Check("all-reduce", "warning", found, fix)
    if on_gpus and num_machines == 1 and speed < SLOW_GPU_GB_PER_SECOND:
        fix = "The cards do not reach each other directly: look at nvidia-smi topo -m, and at NCCL_P2P_DISABLE."
        return Check("all-reduce", "warning", found, fix)
    return Check("all-reduce", "ok", found)


def judge_output_dir(ranks: list[Rank], output_dir: str) -> Check:
    """All machines see rank 0's output_dir."""
    if ranks[0].sees_output_dir is None:
        fix = "Open it to this user, or set output_dir to another directory."
        return Check("shared output_dir", "failed", f"rank 0 cannot write in {nearest(Path(output_dir))}", fix)
    blind = sorted({one.host for one in ranks if not one.sees_output_dir})
    if blind:
        fix = "Put output_dir on a file system that all machines share: checkpoints are written by several ranks."
        return Check("shared output_dir", "failed", f"{', '.join(blind)} cannot see rank 0's {output_dir}", fix)
    return Check("shared output_dir", "ok", f"all {len(ranks)} ranks see it")


def write_checks(checks: list[Check], path: Path) -> None:
    """For the process that has started these ranks."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps([asdict(check) for check in checks]), encoding="utf-8")
    partial.replace(path)


def read_checks(path: Path) -> list[Check] | None:
    """What `write_checks` has written; None: nothing."""
    return [Check(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else None
