"""What happened on one rank, known to all: problems found in turn by one process become the same sentence on each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megadpo.errors import UserError, reason
from megadpo.parallel.messages import gathered


def from_all_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value (of JSON), in their order; where no processes are joined, this one's. Collective over `group`."""
    return gathered(value, group) if dist.is_initialized() and dist.get_world_size() > 1 else [value]


def problem_of(action: Callable[[], Any]) -> str | None:
    """What `action` refuses with a UserError, in its own sentence; None where it refuses nothing."""
    try:
        action()
    except UserError as error:
        return reason(error, limit=None)
    return None


def first_problem(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The first rank's problem, on every rank; None where no rank has one. Collective over `group`."""
    return next((found for found in from_all_ranks(problem, group) if found is not None), None)
