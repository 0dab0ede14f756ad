"""Several ranks on one card: gloo, its messages through host memory, in place of NCCL, which refuses two ranks on one.

gloo takes CUDA tensors in some collectives only (torch's table: neither send nor recv), and which ones depends on its
version. So every function that Megatron-core and megadpo call is replaced by one that gives gloo copies in host memory.
What was received is in the tensor on the device once the caller has waited for it, no sooner: who forgets to wait computes
with what was there before. What is sent is copied when the call is made, so that a buffer which is overwritten too early
goes unnoticed here; over NCCL it would be wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

RECEIVED_BY = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "_all_gather_base": "output_tensor",
    "reduce_scatter": "output",
    "reduce_scatter_tensor": "output",
    "_reduce_scatter_base": "output",
    "all_to_all": "output_tensor_list",
    "all_to_all_single": "output",
    "gather": "gather_list",
    "scatter": "tensor",
    "send": None,
    "isend": None,
    "recv": "tensor",
    "irecv": "tensor",
}
"""torch.distributed's functions, and the parameter in which they leave what came."""

_originals: dict[str, Any] = {}

_together: list[list[_Handle]] = []
"""Of each coalescing manager that is open, what was begun within."""


def use_staged_gloo() -> None:
    """From now on, in this process, for groups whose backend is gloo. Called again, also for modules imported meanwhile."""
    if not _originals:
        for name in (*RECEIVED_BY, "P2POp", "batch_isend_irecv", "_coalescing_manager"):
            _originals[name] = getattr(dist, name)
    replaced = {name: _staged(name) for name in RECEIVED_BY}
    replaced |= {"P2POp": _p2p_op, "batch_isend_irecv": _batch_isend_irecv, "_coalescing_manager": _coalescing_manager}
    # Modules keep some of them under names of their own, as they were at the import.
    by_original = {id(_originals[name]): function for name, function in replaced.items()}
    for module_name, module in list(sys.modules.items()):
        if module_name == "torch.distributed" or module_name.startswith(("megatron.core.", "megadpo.")):
            for name, value in list(vars(module).items()):
                if id(value) in by_original:
                    setattr(module, name, by_original[id(value)])


class _Handle:
    """Work that gloo does on copies; `wait` brings back what it received."""

    def __init__(self, work: Any, received: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.work, self.received = work, received

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self, timeout: Any = None) -> bool:
        if self.work is not None:
            self.work.wait()
        for tensor, copy in self.received:
            tensor.copy_(copy)
        self.received = []
        return True


def _is_gloo(group: Any) -> bool:
    return dist.is_initialized() and dist.get_backend(group) == "gloo"


@functools.cache
def _staged(name: str) -> Callable[..., Any]:
    original, received_by = _originals[name], RECEIVED_BY[name]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not _is_gloo(given.get("group")):
            return original(*args, **kwargs)
        received: list[tuple[torch.Tensor, torch.Tensor]] = []
        copied = {key: _copy(value, received if key == received_by else None) for key, value in given.items()}
        answer = original(**copied)
        is_work = hasattr(answer, "wait")
        handle = _Handle(answer if is_work else None, received)
        if _together:
            _together[-1].append(handle)
        if is_work:
            return handle
        handle.wait()
        return answer

    return call


def _copy(value: Any, received: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
    """Host copies of the tensors in an argument; noted with the tensors they are of where `received` is given."""
    if isinstance(value, torch.Tensor):
        copy = value.detach().to("cpu", copy=True)
        if received is not None:
            received.append((value.detach(), copy))
        return copy
    if isinstance(value, (list, tuple)):
        return [_copy(each, received) for each in value]
    return value


def _p2p_op(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _originals["P2POp"](_originals.get(op.__name__, op), *args, **kwargs)


def _batch_isend_irecv(operations: Sequence[Any]) -> list[Any]:
    if not _is_gloo(operations[0].group):
        answer: list[Any] = _originals["batch_isend_irecv"](operations)
        return answer
    return [_staged(each.op.__name__)(each.tensor, each.peer, each.group, each.tag) for each in operations]


@contextlib.contextmanager
def _coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """Messages one by one in the place of one for all; gives what waits for all of them."""
    if not _is_gloo(group):
        with _originals["_coalescing_manager"](group, device, async_ops) as manager:
            yield manager
        return
    everything = _Everything()
    _together.append(everything.handles)
    try:
        yield everything
    finally:
        _together.pop()
    if not async_ops:
        everything.wait()


class _Everything:
    def __init__(self) -> None:
        self.handles: list[_Handle] = []

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()


def outcomes_over_gloo(*arguments: Any) -> Any:
    """`tests.parity.worker.outcomes` on a rank that shares its device."""
    from megadpo.platform.megatron_cpu import prepare_megatron
    from tests.parity.worker import outcomes

    prepare_megatron()
    for name in ("engine.megatron", "pipeline.executor", "parallel.context", "training.step"):
        importlib.import_module(f"megadpo.{name}")
    use_staged_gloo()
    return outcomes(*arguments, backend="gloo")
