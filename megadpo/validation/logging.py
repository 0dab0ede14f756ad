"""What is refused of the options of `logging`: trackers that are not known, windows of the profiler that are none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megadpo.config import strict
from megadpo.errors import UserError
from megadpo.metrics.trackers import TRACKERS, require_installed

if TYPE_CHECKING:
    from megadpo.config.schema import LoggingConfig

TAG = re.compile(r"[A-Za-z0-9._:/-][A-Za-z0-9 ._:/-]{0,63}")
MOST_PROFILED_STEPS = 100
"""A trace of more is too large to be opened."""


def check_logging_options(options: LoggingConfig) -> None:
    """Raises UserError for the first option that cannot be honoured, whatever the run."""
    for name in options.trackers:
        if name not in TRACKERS:
            guess = strict.closest(name.lower(), TRACKERS)
            hint = f"did you mean {guess!r}?" if guess else f"choose from {', '.join(TRACKERS)}"
            own = " (metrics.jsonl is always written, TensorBoard by logging.tensorboard)" if guess is None else ""
            raise UserError(f"logging.trackers: {name!r} is not known; {hint}{own}")
    if len(set(options.trackers)) < len(options.trackers):
        raise UserError(f"logging.trackers is {options.trackers}; name each tracker once")
    if not options.project.strip():
        raise UserError("logging.project is empty; give a name, or leave it out")
    for tag in options.tags:
        if not TAG.fullmatch(tag):
            raise UserError(
                f"logging.tags: {tag!r} is not a tag that every tracker takes; give 1 to 64 letters, digits, "
                "spaces and . _ - : /"
            )
    steps = options.profile_steps
    if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise UserError(f"logging.profile_steps is {steps}; give [first, last], steps from 1 on, for example [10, 12]")
    if steps is not None and steps[1] - steps[0] >= MOST_PROFILED_STEPS:
        raise UserError(
            f"logging.profile_steps {steps} are {steps[1] - steps[0] + 1} steps, whose trace nothing could open; "
            f"give at most {MOST_PROFILED_STEPS}"
        )
    if steps is not None and (not options.profile_ranks or min(options.profile_ranks) < 0):
        raise UserError(f"logging.profile_ranks is {options.profile_ranks}; give ranks from 0 on, for example [0]")


def check_logging(options: LoggingConfig, num_ranks: int, num_steps: int) -> None:
    """Raises UserError where this run cannot honour an option: a library is missing, it has no such step or rank."""
    require_installed(options.trackers)
    if options.profile_steps is None:
        return
    if options.profile_steps[0] > num_steps:
        raise UserError(
            f"logging.profile_steps begins with step {options.profile_steps[0]}, but the run has {num_steps}; lower it"
        )
    if max(options.profile_ranks) >= num_ranks:
        raise UserError(
            f"logging.profile_ranks has rank {max(options.profile_ranks)}, but the run has {num_ranks}, from 0 on; lower it"
        )
