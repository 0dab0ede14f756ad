"""The bytes of tensors that a run holds: what is alive between two steps, and the most during the parts of one."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadpo.data.groups import Group


@dataclass(frozen=True)
class Held:
    """Bytes of tensors on a rank.

    Attributes:
        between: steps, when the optimizer's state is there.
        reference, gradients, update: the most while a step's reference runs, in its forward and backward passes, and after.
    """

    between: int
    reference: int
    gradients: int
    update: int

    @property
    def peak(self) -> int:
        """The most of a step."""
        return max(self.reference, self.gradients, self.update)


def held_on_this_rank(configs: Sequence[dict[str, Any]], groups: Sequence[Group]) -> list[Held]:
    """Of each configuration's run on the groups, in its third step, by the trainer's own functions."""
    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step
    from megadpo.validation.load import load_config

    found = []
    for config in configs:
        setup = setup_on(prepare(load_config(config)), groups)
        gc.collect()
        before = {storage._cdata for storage in _storages()}  # what an earlier run has left is not this one's
        with joined_world(setup.layout, setup.config.train.seed):
            run = build(setup, Callbacks())
            for step in range(2):
                training_step(run, step)
            gc.collect()
            live = _Live(storage for storage in _storages() if storage._cdata not in before)
            for name in ("forward_backward", "finish_gradients"):
                setattr(run.engine, name, _after(live.begin_part, getattr(run.engine, name)))
            between = live.now
            with _eager_collector(), live:
                training_step(run, 2)
            run.close()
            del run
        gc.collect()
        found.append(Held(between, *live.most))
    return found


class _Live(TorchDispatchMode):
    """Follows storages from the operation that gives the first tensor on them until they are gone, on whatever thread.

    Attributes:
        now: bytes of those that are alive.
        most: bytes that were alive at once, of each part that has begun.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self.now, self.most = 0, [0]
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        for storage in storages:
            self._follow(storage)

    def begin_part(self) -> None:
        """From here on another part of the step is looked at."""
        self.most.append(self.now)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        results = function(*arguments, **(named or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.device.type != "meta":
                self._follow(result.untyped_storage())
        return results

    def _follow(self, storage: torch.UntypedStorage) -> None:
        reference = weakref.ref(storage, self._gone)
        if reference not in self._sizes:
            self._sizes[reference] = storage.nbytes()
            self.now += storage.nbytes()
            self.most[-1] = max(self.most[-1], self.now)

    def _gone(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        self.now -= self._sizes.pop(reference, 0)


@contextlib.contextmanager
def _eager_collector() -> Iterator[None]:
    """Tensors in circles of Python objects go at once, where else they would wait for Python's collector, now and then."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return function(*arguments, **named)

    return both


def _storages() -> list[torch.UntypedStorage]:
    """Each live storage of a tensor that Python knows."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and item.device.type != "meta"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return list({storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}.values())
