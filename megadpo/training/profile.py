"""A window of steps in torch's profiler: `logging.profile_steps`, on the ranks of `logging.profile_ranks`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from megadpo.config.schema import LoggingConfig
from megadpo.errors import reason
from megadpo.parallel.world import rank
from megadpo.training.console import log


class ProfileWindow:
    """Records the steps of the window on this rank, and writes one trace, which Perfetto and chrome://tracing open.

    Shapes, stacks and memory are not recorded, for they would slow the steps. What fails here ends no run.
    """

    def __init__(self, options: LoggingConfig, output_dir: Path) -> None:
        self._steps, self._directory = options.profile_steps, output_dir / "profile"
        self._is_here = rank() in options.profile_ranks
        self._names = ", ".join(map(str, sorted(set(options.profile_ranks))))
        self._first: int | None = None
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Steps count from 1. Of a run that goes on in the middle of the window, the rest of it is recorded."""
        if self._steps is None or self._first is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        self._first = step
        if self._is_here:
            try:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
                self._profiler.start()
            except Exception as error:
                self.close()
                self._steps = None
                log(f"warning: the profiler cannot be started ({reason(error)}); going on without the profile")

    def after(self, step: int, is_last: bool = False) -> None:
        """Writes the trace after the window's last step, or the run's."""
        if self._steps is None or self._first is None or (step < self._steps[1] and not is_last):
            return
        steps, self._steps = f"steps {self._first} to {step}", None
        if self._profiler is not None:
            path = self._directory / f"rank_{rank():05d}_steps_{self._first}_to_{step}.json.gz"
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # outside: an error of the steps' own work shows here
            try:
                self._profiler.stop()
                self._directory.mkdir(parents=True, exist_ok=True)
                self._profiler.export_chrome_trace(str(path))
            except Exception as error:
                log(f"warning: {path} cannot be written ({reason(error)}); going on without the profile")
                return
            finally:
                self._profiler = None
        log(f"profile of {steps} on rank {self._names}: {self._directory} (open a trace in https://ui.perfetto.dev)")

    def close(self) -> None:
        """The run ends within the window, without its last step."""
        if self._profiler is not None:
            with contextlib.suppress(Exception):
                self._profiler.stop()
            self._profiler = None
