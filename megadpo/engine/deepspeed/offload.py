"""What offload needs: DeepSpeed's compiled parts (an Adam for CPUs, asynchronous reads and writes of files) and a directory.

The parts are compiled at their first use, which takes minutes, and then lie in torch's cache of extensions. torch lets one
process compile, and the others wait until its file `lock` is gone: after a compilation that was killed, for ever. Here
the processes of a machine take turns under a lock that ends with its process; a `lock` found in one's turn is a leftover.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import importlib
import mmap
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from megadpo.errors import UserError, first_line
from megadpo.platform.patches import patch, patches_undone

_held: dict[Path, TextIO] = {}

NEEDED_FOR_NVME = "parallel.offload nvme needs DeepSpeed's async_io"


def cpu_adam() -> type[torch.optim.Optimizer] | None:
    """DeepSpeedCPUAdam where its kernel builds or is built, else None.

    Raises:
        UserError: a killed compilation has left its lock.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        _load(CPUAdamBuilder(), "cpu_adam")
    except UserError:
        raise
    except Exception:  # no compiler, no headers, another instruction set: torch's AdamW does the same
        return None
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam


def begin_bias_correction_anew(optimizer: Any) -> None:
    """Before a step of DeepSpeedCPUAdam: its powers of the betas are computed from the number of the step.

    From one step to the next it multiplies them up in float32, each product rounded, but after a jump it takes std::pow: a
    run that went on from a checkpoint would differ in the last bit from one that was never stopped. Step 0 is a jump.
    """
    if (kernel := getattr(optimizer, "ds_opt_adam", None)) is None:
        return
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    kernel.adam_update(optimizer.opt_id, 0, 0.0, beta1, beta2, 1.0, 0.0, False, *(torch.zeros(1) for _ in range(4)))


def can_swap_to_nvme() -> bool:
    """Whether the asynchronous file operations that NVMe offload needs can be built here."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def require_async_io() -> None:
    """Loads async_io, which DeepSpeed itself would do later and with a longer story where it cannot.

    Raises:
        UserError: it does not build here: what to install.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not can_swap_to_nvme():
        raise UserError(
            f"{NEEDED_FOR_NVME}, for which libaio or a C++ compiler is missing here; install them (Debian and Ubuntu: "
            "apt-get install libaio-dev g++; Fedora: dnf install libaio-devel gcc-c++) or use parallel.offload cpu"
        )
    try:
        _load(AsyncIOBuilder(), "pin_memory", "async_io")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{NEEDED_FOR_NVME}, which does not build here ({first_line(error)}); use parallel.offload cpu"
        ) from error


def require_lockable(num_bytes: int) -> None:
    """Raises UserError where this process may not lock so much memory, for DeepSpeed would just be aborted."""
    if not _can_lock(num_bytes):
        wanted, limit = num_bytes / 2**20, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] / 2**20
        raise UserError(
            f"{NEEDED_FOR_NVME}, which locks up to {wanted:,.0f} MiB of memory, but a process may lock {limit:,.0f} MiB "
            "here; raise it (ulimit -l unlimited, or memlock in /etc/security/limits.conf)"
        )


def _can_lock(num_bytes: int) -> bool:
    try:
        memory = mmap.mmap(-1, num_bytes)
    except OSError:
        return False
    first = ctypes.c_char.from_buffer(memory)
    status = ctypes.CDLL(None).mlock(ctypes.byref(first), ctypes.c_size_t(num_bytes))
    del first
    memory.close()
    return bool(status == 0)


def _load(builder: Any, *names: str) -> None:
    """Load or compile what `builder` makes in torch's directories of these names, one process of a machine at a time."""
    directories = [Path(cpp_extension._get_build_directory(name, verbose=False)) for name in names]
    with open(directories[-1].parent / f"megadpo-{names[-1]}.turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        for directory in directories:
            if (directory / "lock").exists():
                raise UserError(
                    f"{directory / 'lock'} is there: a compilation of DeepSpeed's {directory.name} was killed, or another "
                    "program is just compiling it; unless one is, remove that file and start again"
                )
        _put_own_programs_first()
        with patches_undone():
            _ask_lscpu(builder)
            patch(cpp_extension, "load", functools.partial(_load_without_symbols, cpp_extension.load))
            builder.load(verbose=False)


def _ask_lscpu(builder: Any) -> None:
    """Which processor this is, DeepSpeed asks py-cpuinfo, which takes seconds, and else `lscpu`, which takes none."""
    known = builder._backup_cpuinfo() if shutil.which("lscpu") else None
    if known is not None and known["arch"]:
        patch(importlib.import_module("cpuinfo"), "get_cpu_info", lambda: known)


def _load_without_symbols(load: Callable[..., Any], *args: Any, extra_cflags: Sequence[str] = (), **kwargs: Any) -> Any:
    """`cpp_extension.load` without the symbols for a debugger that DeepSpeed asks for: they take as long as the rest."""
    return load(*args, extra_cflags=[*extra_cflags, "-g0"], **kwargs)


def _put_own_programs_first() -> None:
    """One ninja for all, the environment's own: another version takes what it built for out of date, and compiles again."""
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if not path.startswith(own + os.pathsep):
        os.environ["PATH"] = own + os.pathsep + path


def own_directory(offload_dir: str) -> Path:
    """This rank's directory for offload to NVMe: locked until this process ends, which then removes it.

    Raises:
        UserError: another run is using it.
    """
    directory = Path(offload_dir) / f"rank{dist.get_rank()}"
    if directory not in _held:
        directory.mkdir(parents=True, exist_ok=True)
        in_use = open(directory / "in-use", "w")  # noqa: SIM115 - until the end of this process
        try:
            fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            in_use.close()
            raise UserError(f"parallel.offload_dir: {offload_dir} is in use by another run; give each its own") from None
        _held[directory] = in_use
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
