"""What code may leave changed in its process, put back."""

from __future__ import annotations

import gc
import os
import random
import signal
import warnings
from dataclasses import dataclass
from typing import Any

import numpy
import torch


@dataclass(frozen=True)
class ProcessState:
    """What is the process's and not a run's: read once, and written before the next world."""

    environment: dict[str, str]
    warnings: list[Any]
    signals: dict[int, Any]
    random: Any
    numpy: Any
    torch: Any

    @classmethod
    def now(cls) -> ProcessState:
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what libraries use
        return cls(dict(os.environ), list(warnings.filters), signals, *states)

    def restore(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        warnings.filters[:] = self.warnings
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        random.setstate(self.random)
        numpy.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        gc.collect()
