"""Who carries micro-batches through the pipeline: Megatron's schedules, or ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.pipeline import megatron_schedule as schedule
from megadpo.pipeline import run_schedule as own_schedule


class Passes(NamedTuple):
    """As in schedule.py."""

    forward_only: Callable[..., Any]
    forward_backward: Callable[..., Any]


def passes_by(options: PipelineScheduleConfig) -> Passes:
    """What does as the options say."""
    if options.name == "megatron":
        return Passes(schedule.forward_only, schedule.forward_backward)
    forward_backward = functools.partial(own_schedule.forward_backward, is_zero_bubble=options.zero_bubble)
    return Passes(own_schedule.forward_only, forward_backward)
