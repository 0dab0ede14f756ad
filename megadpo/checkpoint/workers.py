"""Processes that convert parts: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from megadpo.platform.allocator import give_back_freed_blocks

IMPORTED = (
    *("megadpo.checkpoint.importing", "megadpo.checkpoint.convert"),
    *("transformers.utils.type_validators", "transformers.models.auto.configuration_auto"),
)
"""What workers need; the latter two transformers imports when the first config is made, which takes as long as torch."""


def start_workers() -> ForkServerContext:
    """Have the process that workers are forked from begin to import, beside this one, if it has not; their context.

    Threads of torch do not survive a fork, and that process only imports. Imported once, the workers share it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    forkserver.ensure_running()
    return context


def begin_worker(num_workers: int) -> None:
    """A worker gives memory back, and has its share of the cores.

    Threads of torch that find no core wait busily: with twice as many as cores a part takes three times as long.
    """
    import torch

    give_back_freed_blocks()
    torch.set_num_threads(max(torch.get_num_threads() // num_workers, 1))
