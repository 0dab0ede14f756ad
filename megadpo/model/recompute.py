"""Results of cheap operations are computed again in the backward pass, where they would be kept (`train.recompute: small`).

Norms, SwiGLU, rope and gathered keys and values say by `recomputable` how they come about. During a stage's forward pass,
hooks on what autograd saves know such a result by its storage and save the operation and its inputs in its place: inputs
that the operation's own backward needs anyway, or that are known in the same way. Autograd's graph is the one it was, and
so is every bit of the gradients. What is not known goes on to the offloader, where there is one (offload.py).

A result is computed again each time it is read. In the models there are, one operation reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megadpo.model.activations import Activations
from megadpo.model.offload import Offloader
from megadpo.parallel.zero3 import is_partitioned

Operation = Callable[..., Tensor]
"""A pure function of tensors: the same bits whenever it is called."""


def recompute_small(models: Sequence[Any], activations: Activations, offloader: Offloader | None) -> Recomputer | None:
    """Make a stage's chunks compute cheap results again, if `activations` asks for it."""
    if activations.recompute != "small":
        return None
    recomputer = Recomputer(offloader)
    for model in models:
        recomputer.follow(model)
    return recomputer


def recomputable(operation: Operation, *inputs: Tensor) -> Tensor:
    """`operation(*inputs)`, which a `Recomputer` that follows the pass does not keep."""
    result = operation(*inputs)
    remember(result, operation, *inputs)
    return result


def remember(result: Tensor, operation: Operation, *inputs: Tensor) -> None:
    """Let a `Recomputer` that follows the pass know that `result` is `operation(*inputs)`, in memory of its own."""
    if _following is not None and result.requires_grad:
        _following.learn(result, operation, inputs)


def is_remembering() -> bool:
    """Whether a `Recomputer` follows the pass."""
    return _following is not None


_following: Recomputer | None = None
"""That of the forward pass with gradients that is under way."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a result comes about; its inputs as they are saved."""

    operation: Operation
    inputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A result of this pass.

    Attributes:
        storage: while this reference is there, the storage's address is not given to another one, freed or not.
        version: how often it had been written to in place.
    """

    storage: StorageWeakRef
    version: int
    dtype: torch.dtype
    recipe: _Recipe


@dataclass(frozen=True, slots=True)
class _View:
    """What autograd keeps in place of a result, or of a view of one."""

    recipe: _Recipe
    shape: Sequence[int]
    stride: Sequence[int]
    offset: int


class Recomputer:
    """Hooks on what a stage's chunks save for the backward pass.

    Attributes:
        num_recomputed: operations computed again so far.
    """

    def __init__(self, offloader: Offloader | None = None) -> None:
        """`offloader`: takes what is not known; it follows the same models, and has been told so before."""
        self.keep: Callable[[Tensor], Any] = _kept if offloader is None else offloader.pack
        self.restore: Callable[[Any], Tensor] = _restored if offloader is None else offloader.unpack
        self.num_recomputed = 0
        self._known: dict[int, _Known] = {}
        self._hooks: Any = None

    def follow(self, model: Any) -> None:
        """Keep less of what `model` (a GPTModel) saves from now on, whoever calls it."""
        model.register_forward_pre_hook(self._begin_pass)
        # Within the offloader's, which begin before and so are to end after.
        model.register_forward_hook(self._end_pass, always_call=True, prepend=True)

    def learn(self, result: Tensor, operation: Operation, inputs: Sequence[Tensor]) -> None:
        """See `remember`."""
        storage = result.untyped_storage()
        if any(storage._cdata == x.untyped_storage()._cdata for x in inputs):
            return  # a view costs no memory
        recipe = _Recipe(operation, tuple(map(self._held, inputs)))
        self._known[storage._cdata] = _Known(StorageWeakRef(storage), result._version, result.dtype, recipe)

    def _held(self, tensor: Tensor) -> Any:
        # What ZeRO-3 has gathered for a module's forward is gone when another one's backward asks: a norm's weight is small.
        return tensor.detach().clone() if is_partitioned(tensor) else self._pack(tensor)

    def _begin_pass(self, *unused: Any) -> None:
        global _following
        if not torch.is_grad_enabled():
            return
        _following = self
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def _end_pass(self, *unused: Any) -> None:
        global _following
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = _following = None
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Any:
        known = self._known.get(tensor.untyped_storage()._cdata)
        # What was written to in place is no longer that result. An alias with a count of its own begins at 0.
        if known is None or tensor._version > known.version or tensor.dtype is not known.dtype:
            return self.keep(tensor)
        return _View(known.recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _View):
            return self.restore(saved)
        self.num_recomputed += 1
        with torch.no_grad():
            result = saved.recipe.operation(*map(self._unpack, saved.recipe.inputs))
            return result.as_strided(saved.shape, saved.stride, saved.offset)


def _kept(tensor: Tensor) -> Tensor:
    # Parameters as they are: their values may be moved. Of a result its alias, without the node that saves it: else node
    # and result would keep each other for ever where no backward comes.
    return tensor if tensor.is_leaf else tensor.detach()


def _restored(tensor: Tensor) -> Tensor:
    return tensor
