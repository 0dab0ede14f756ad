"""Who carries micro-batches through the pipeline: Megatron's schedules, or ours."""

from __future__ import annotations

from typing import Any

from megadpo.parallel import own_schedule, schedule


def passes_by(name: str) -> Any:
    """The module with `forward_only` and `forward_backward` for a `schedule.name`."""
    return {"megatron": schedule, "1f1b": own_schedule}[name]
