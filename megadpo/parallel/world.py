"""The world of processes: joined once, with Megatron's parallel groups on it, and left as it was found."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megadpo.console.activity import activity
from megadpo.parallel.layout import Layout
from megadpo.platform.device import communication_backend, compute_device, seed_everything
from megadpo.platform.megatron_cpu import prepare_megatron
from megadpo.platform.patches import patches_undone
from megadpo.platform.rendezvous import check_environment, meet


def world_size() -> int:
    """Number of processes in this run, known before they are joined (torchrun's WORLD_SIZE).

    Raises:
        UserError: the environment's variables make no sense.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    check_environment()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number in the run, known before the processes are joined (torchrun's RANK); raises as `world_size`."""
    if dist.is_initialized():
        return dist.get_rank()
    check_environment()
    return int(os.environ.get("RANK", "0"))


def place_on_machine() -> tuple[int, int]:
    """This process's number among the run's on this machine, and how many these are; (0, 1) where no launcher says."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (number, count) if number < count else (0, 1)


@contextlib.contextmanager
def joined_world(layout: Layout, seed: int, timeout_minutes: float = 30) -> Iterator[None]:
    """Join the processes of the run and make Megatron's groups for `layout`; on leaving, undo what was made here, and
    whatever `patches.patch` has replaced within.

    A process group that the caller has already made is used and left standing.
    """
    left_groups: list[dist.ProcessGroup] = []
    try:
        with patches_undone():
            with activity("preparing Megatron"):
                prepare_megatron()
            with _joined(layout, seed, timeout_minutes, left_groups):
                yield
    finally:
        gc.collect()  # models refer to each other in circles, and through them to groups with threads of their own
        if left_groups:
            # A gloo group waits 10 milliseconds for its threads as it goes, of which there are dozens.
            threading.Thread(target=left_groups.clear, name="left process groups").start()


def seed_step(seed: int, step: int) -> None:
    """Make what is drawn in a step its own, wherever the run began: replicas and pipeline stages draw apart, tensor ranks
    alike but for what Megatron has them draw apart."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    place = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    number = int.from_bytes(hashlib.blake2b(f"{seed} {step} {place}".encode(), digest_size=4).digest(), "big") >> 1
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number)


@contextlib.contextmanager
def _joined(layout: Layout, seed: int, timeout_minutes: float, left_groups: list[dist.ProcessGroup]) -> Iterator[None]:
    """The process group and Megatron's groups, which are in `left_groups` afterwards where the process group stays."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        torch.cuda.set_device(compute_device())
    made_here = not dist.is_initialized()
    if made_here:
        with activity("joining the processes"):
            _initialize(timedelta(minutes=timeout_minutes))
    seed_everything(seed)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, int(timeout_minutes)),
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # Megatron 0.16 calls collectives by names that newer torch calls deprecated, once a call.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
            warnings.filterwarnings("ignore", message="full scope is deprecated")
            with patches_undone():  # while the groups are still there: DeepSpeed asks for the rank as it leaves
                yield
        if not made_here:
            dist.barrier()  # nobody closes a connection on which another one still reads
            # Megatron forgets its groups, torch keeps them: with gloo three threads each, one of which wakes 100 times a
            # second. None is the caller's own.
            left_groups += [group for group in parallel_state._global_process_group_list or [] if group is not None]
            for group in left_groups:
                dist.destroy_process_group(group)
    finally:
        parallel_state.destroy_model_parallel()
        if made_here:
            dist.destroy_process_group()


_rendezvous: dict[tuple[str | None, ...], list[dist.Store]] = {}
"""The stores where the processes of this run meet, by what the environment says of the run; kept, because their server lives
in rank 0's first store."""


def _initialize(timeout: timedelta) -> None:
    """Join through the environment's rendezvous, every time under keys of its own: a process may train more than once, and
    in one world after another."""
    if "RANK" not in os.environ:
        dist.init_process_group(communication_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    size = int(os.environ["WORLD_SIZE"])
    run = tuple(map(os.environ.get, ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")))
    if run not in _rendezvous:
        _rendezvous.clear()
        _rendezvous[run] = [meet(rank(), size, timeout)]
    stores = _rendezvous[run]
    stores.append(dist.PrefixStore(f"megadpo-{len(stores)}", stores[0]))
    dist.init_process_group(communication_backend(), store=stores[-1], rank=rank(), world_size=size, timeout=timeout)
