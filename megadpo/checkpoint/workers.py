"""Processes that convert parts: forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

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


def share_cores(num_workers: int) -> None:
    """Threads of torch that find no core wait busily: with twice as many as cores a part takes three times as long."""
    import torch

    torch.set_num_threads(max(torch.get_num_threads() // num_workers, 1))
