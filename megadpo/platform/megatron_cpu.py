"""Megatron-core on a machine without an accelerator.

Megatron names CUDA in its factory calls (``device="cuda"``, ``torch.cuda.current_device()``, streams, events). Where
there is no accelerator, `prepare_megatron` gives each imported megatron module a stand-in for its global name ``torch``
that answers those few names for the CPU, cuts the collectives to what gloo can do, and passes everything else on: for as
long as the scope of `patches.patches_undone` in which it is called, which is that of the joined world. torch itself stays
as it is.

Two things cannot be reached so, methods of torch.Tensor: the distributed optimizer compares ``tensor.type()`` with CUDA
names, and a tied head is moved with ``tensor.cuda()``. `cpu_tensors_pass_for_cuda` redirects both for the length of a
``with`` block and puts them back.
On CUDA nothing here does anything.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megadpo.platform.patches import patch

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like", "rand")
_MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.token_dispatcher",
)
_TRACKERS = ("wandb", "mlflow", "torch.utils.tensorboard")


class _NoStream:
    """A stream or event of a device that runs everything at once, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return self


class _Nvtx:
    """Range markers for a profiler that is not there."""

    def range_push(self, message: str) -> None:
        pass

    def range_pop(self) -> None:
        pass

    def range(self, message: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Cuda:
    """torch.cuda as megatron's modules see it: the CPU answers; names not listed here are torch.cuda's own."""

    Stream = Event = _NoStream
    nvtx = _Nvtx()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def synchronize(self, device: Any = None) -> None:
        pass

    def current_stream(self, device: Any = None) -> _NoStream:
        return _NoStream()

    def default_stream(self, device: Any = None) -> _NoStream:
        return _NoStream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


class _Distributed:
    """torch.distributed as megatron's modules see it: with parts of different sizes, which NCCL takes and gloo does not."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_gather(self, parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        longest = max(len(part) for part in parts)
        if all(len(part) == longest for part in parts):
            return torch.distributed.all_gather(parts, own, group=group, **kwargs)
        padded = [own.new_zeros(longest, *own.shape[1:]) for _ in range(len(parts) + 1)]
        padded[-1][: len(own)] = own
        torch.distributed.all_gather(padded[:-1], padded[-1], group=group)
        for part, received in zip(parts, padded, strict=False):
            part.copy_(received[: len(part)])

    def reduce_scatter(self, own: torch.Tensor, parts: list[torch.Tensor], group: Any = None, **kwargs: Any) -> Any:
        sizes = [len(part) for part in parts]
        if len(set(sizes)) == 1:
            return torch.distributed.reduce_scatter(own, parts, group=group, **kwargs)
        whole = torch.cat(parts)
        torch.distributed.all_reduce(whole, group=group)
        own.copy_(whole.split(sizes)[torch.distributed.get_rank(group)])


class _Torch(types.ModuleType):
    """torch as megatron's modules see it: factories asked for "cuda" make CPU tensors."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()
        self.distributed = _Distributed()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _as_moved_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What the token dispatcher gets of a tensor on its way to the host: torch's collectives take no tensors as sizes."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _get_cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


_stand_in = _Torch()


def prepare_megatron() -> None:
    """Import the megatron modules that are used and, without an accelerator, redirect their CUDA names to the CPU.

    Call before anything of megatron is used; a second call also covers modules imported since the first. Within
    `patches.patches_undone` the redirections end with it.
    """
    # With tensor or pipeline parallelism Megatron relies on kernels being launched in program order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron says at each import that Apex and TransformerEngine are absent.
        with trackers_hidden(), contextlib.nullcontext() if torch.cuda.is_available() else _nothing_compiled():
            for name in _MODULES:
                importlib.import_module(name)
    if torch.cuda.is_available():
        return
    jit = importlib.import_module("megatron.core.jit")
    if jit.jit_fuser is _uncompiled:
        jit.enable_jit_fuser()
    patch(jit, "jit_fuser", jit.noop_decorator)  # for modules that are imported from here on
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron."):
            if getattr(module, "torch", None) is torch:
                patch(module, "torch", _stand_in)
            if getattr(module, "jit_fuser", None) is _uncompiled:
                module.jit_fuser = jit.noop_decorator  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    patch(dispatcher, "maybe_move_tensor_to_cpu", _as_moved_to_cpu)
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    patch(random, "_get_cuda_rng_state", _get_cpu_rng_state)
    patch(random, "_set_cuda_rng_state", _set_cpu_rng_state)


@contextlib.contextmanager
def trackers_hidden() -> Iterator[None]:
    """Within the block trackers that nobody has imported are as if they were not installed: Megatron takes them along for
    its inference engine's logs, DeepSpeed for its autotuner's, and they are one to four seconds of processor time in every
    process."""
    hidden = [name for name in _TRACKERS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it is an ImportError
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _uncompiled(function: Any) -> Any:
    return function


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Functions that modules decorate with torch.compile while they are imported stay as they are.

    None of them is worth a compiler's minute on a CPU, and the compiler alone takes two seconds to import.
    """
    original = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


@contextlib.contextmanager
def cpu_tensors_pass_for_cuda() -> Iterator[None]:
    """Within the block, ``tensor.type()`` of a CPU tensor answers with the CUDA name and ``tensor.cuda()`` is the tensor."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def cuda_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_name  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        # Both are inherited: taking the redirections away restores the class to what it was.
        del torch.Tensor.type, torch.Tensor.cuda
