"""What this machine has: devices, communication, kernels, compilers, MPI, shared memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megadpo.doctor.check import Check
from megadpo.model.attention.backends import BACKENDS, backend_named, slow_on
from megadpo.model.attention.base import AttentionNeeds
from megadpo.model.attention.sequences import why_not_on_this_gpu
from megadpo.platform import native
from megadpo.platform.device import communication_backend, compute_device, resolve_dtype

USUAL_HEAD_DIM = 128
SECONDS_FOR_MPI = 20
LEAST_SHARED_MEMORY = 64 << 20
"""Below this, NCCL may fail between the GPUs of a machine; containers come with 64 MiB."""
OLDEST_BF16 = (8, 0)
"""CUDA compute capability from which bf16 is computed in hardware."""


def check_machine(needs: AttentionNeeds | None = None) -> Iterator[Check]:
    """Everything here that no configuration is needed for.

    Args:
        needs: what a model asks of attention; None: a usual one.
    """
    yield check_device()
    yield check_communication(communication_backend())
    yield check_attention(needs or AttentionNeeds(compute_device(), resolve_dtype("auto"), USUAL_HEAD_DIM))
    yield from check_native()
    yield check_mpi()
    yield check_shared_memory()


def check_device(devices: Path = Path("/dev")) -> Check:
    """Which device computes; `devices` is where the driver shows its cards."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        free, total = torch.cuda.mem_get_info()
        found = (
            f"{count} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free on the first"
        )
        if torch.cuda.get_device_capability() < OLDEST_BF16:
            return Check("device", "warning", found, "This card has no bf16 of its own: set model.dtype to fp32.")
        return Check("device", "ok", found)
    cards = nvidia_cards(devices)
    if not cards:
        return Check("device", "ok", f"the CPU, {torch.get_num_threads()} threads; there is no NVIDIA card")
    if torch.version.cuda is None:
        fix = "Install torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu128"
        return Check("device", "failed", f"{cards} NVIDIA cards, but torch {torch.__version__} is built without CUDA", fix)
    fix = f"Look at nvidia-smi: the driver is older than CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides the cards."
    return Check("device", "failed", f"{cards} NVIDIA cards, which torch {torch.__version__} cannot use", fix)


def nvidia_cards(devices: Path) -> int:
    """How many cards the driver shows."""
    return sum(path.name[6:].isdecimal() for path in devices.glob("nvidia*"))


def check_communication(wanted: str) -> Check:
    """Whether torch has what its processes talk by: "gloo" or "nccl"."""
    if not dist.is_available():
        fix = "Install an official torch, which is built with torch.distributed."
        return Check("communication", "failed", "torch is built without torch.distributed", fix)
    kinds = [name for name, has in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if has]
    if wanted not in kinds:
        fix = f"Install a torch that is built with {wanted}."
        return Check("communication", "failed", f"{wanted} is missing; there is {', '.join(kinds) or 'nothing'}", fix)
    version = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if wanted == "nccl" else ""
    return Check("communication", "ok", f"{wanted} of {', '.join(kinds)}{version}")


def check_attention(needs: AttentionNeeds) -> Check:
    """Which backend `model.attention: auto` takes, and which faster ones are not to be had."""
    reasons = {name: backend_named(name).why_not(needs) for name in BACKENDS}
    chosen = next(name for name, why_not in reasons.items() if why_not is None)
    before = [f"{name}: {reasons[name]}" for name in BACKENDS[: BACKENDS.index(chosen)]]
    found = f"{chosen}" + (f" (before it would come {'; '.join(before)})" if before else "")
    slow = slow_on(needs.device.type, chosen)
    if slow is not None:
        never = why_not_on_this_gpu(needs)
        fix = f"{slow.partition('; ')[2].capitalize()}." if never is None else f"No installation helps: {never[5:]}."
        return Check("attention", "warning", found, fix)
    return Check("attention", "ok", found)


def check_native() -> Iterator[Check]:
    """The kernels of csrc/: there, made now, or impossible; and what makes them."""
    on_cuda = torch.cuda.is_available()
    for library in native.LIBRARIES.values():
        if library.is_cuda and not on_cuda:
            continue
        compiler = "nvcc of the CUDA toolkit (CUDA_HOME)" if library.is_cuda else "a C++ compiler (apt install g++)"
        name = f"kernels {library.name}"
        try:
            native.load(library.name)
            yield Check(name, "ok", "built and loaded")
        except native.Unavailable as problem:
            fix = f"Install {compiler} and try again; until then torch does the same, slower."
            yield Check(name, "warning", str(problem), fix)
        try:
            yield Check(f"compiler of {library.name}", "ok", native.find_compiler(library))
        except native.Unavailable as problem:
            fix = f"Install {compiler}: what is compiled on first use is then."
            yield Check(f"compiler of {library.name}", "warning", str(problem), fix)


def check_mpi(python: str = sys.executable) -> Check:
    """MPI, which only --launcher mpirun needs; mpi4py where it is installed is tried in a process of its own."""
    program = shutil.which("mpirun")
    code = "import importlib.util as u, sys\nif u.find_spec('mpi4py') is None: sys.exit(3)\n"
    code += "from mpi4py import MPI\nprint(MPI.Get_library_version().split('\\n')[0].strip('\\0'))"
    try:
        tried = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=SECONDS_FOR_MPI)
        status, words = tried.returncode, (tried.stdout.strip() or tried.stderr.strip()).splitlines()
    except subprocess.TimeoutExpired:
        status, words = 1, [f"it does not start within {SECONDS_FOR_MPI} s"]
    if status == 3:
        found = f"{program}, without mpi4py" if program else "none: only --launcher mpirun needs it"
        return Check("MPI", "ok", found)
    if status != 0:
        fix = "Install an MPI (apt install libopenmpi-dev), or name its library in MPI4PY_LIBMPI; or use another launcher."
        return Check("MPI", "warning", f"mpi4py does not work: {words[-1] if words else f'status {status}'}", fix)
    if program is None:
        fix = "Put the MPI's bin directory into PATH, or use another launcher."
        return Check("MPI", "warning", f"mpi4py has {words[0]}, but there is no mpirun in PATH", fix)
    return Check("MPI", "ok", f"{program}, mpi4py with {words[0]}")


def check_shared_memory(directory: Path = Path("/dev/shm")) -> Check:
    """Room for what processes of one machine share."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        fix = "Mount it; without it NCCL may fail."
        return Check("shared memory", "warning", f"{directory}: {error.strerror}", fix)
    if free < LEAST_SHARED_MEMORY:
        fix = "Give the container more (docker run --shm-size=8g): NCCL uses it."
        return Check("shared memory", "warning", f"{free / 2**20:.0f} MiB free in {directory}", fix)
    return Check("shared memory", "ok", f"{free / 2**30:.1f} GiB free in {directory}")
