"""What code may leave changed in its process: put back, or found out."""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy
import torch

LOOKED_AT = ("megadpo", "megatron.core", "tests", "subprocess", "shutil", "socket")
"""How the names of modules begin whose contents are compared."""


@dataclass(frozen=True)
class ProcessState:
    """What is the process's and not a run's: read once, and written before the next world."""

    environment: dict[str, str]
    warnings: list[Any]
    signals: dict[int, Any]
    random: Any
    numpy: Any
    torch: Any
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def now(cls) -> ProcessState:
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what libraries use
        made = cls(dict(os.environ), list(warnings.filters), signals, *states)
        assert made.has_modules_as_they_were()
        return made

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

    def has_modules_as_they_were(self) -> bool:
        """Whether no function, class or constant of a module was exchanged, by a test that looks on or by what it tests."""

        def is_constant(key: str) -> bool:
            return key.isupper() and not key.startswith("_")  # Megatron's groups, of which some outlive a world

        for name, module in list(sys.modules.items()):
            if isinstance(module, ModuleType) and name.startswith(LOOKED_AT):
                now = {key: value for key, value in vars(module).items() if callable(value) or is_constant(key)}
                before = self.modules.setdefault(name, now)
                if any(now.get(key) is not value for key, value in before.items()):
                    return False
        return True
