"""The bytes of tensors that a run holds: what is alive between two steps, and every allocation and release during one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    """Of each configuration's run on the groups, in its third step, by the trainer's own functions.

    Between steps, tensors that Python knows are counted; within one, what torch's allocator is asked for and given back, by
    its own account.
    """
    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build, training_step
    from megadpo.validation.load import load_config

    found = []
    for config in configs:
        setup = setup_on(prepare(load_config(config)), groups)
        before = _storages()  # what an earlier run has left to be collected is not this one's
        with joined_world(setup.layout, setup.config.train.seed):
            run = build(setup, Callbacks())
            for step in range(2):
                training_step(run, step)
            for name in ("forward_backward", "finish_gradients"):
                setattr(run.engine, name, _after(_mark, getattr(run.engine, name)))
            between = sum(size for address, size in _storages().items() if address not in before)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
                training_step(run, 2)
            run.close()
            del run
        gc.collect()
        found.append(Held(between, *(between + most for most in _most_of_each_part(profile))))
    return found


def _after(first: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        first()
        return function(*arguments, **named)

    return both


MARK = "megadpo: another part of the step"


def _mark() -> None:
    with torch.profiler.record_function(MARK):
        pass


def _most_of_each_part(profile: Any) -> list[int]:
    """The most bytes that were allocated since the profile began, of each part of it that a mark ends, and of the last."""
    most, now = [0], 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == MARK:
            most.append(now)
        elif event.name() == "[memory]":
            now += event.nbytes()
            most[-1] = max(most[-1], now)
    return most


def _storages() -> dict[int, int]:
    """Bytes of each live storage of a tensor, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor) and item.device.type != "meta"]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
