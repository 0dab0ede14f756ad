"""Whether what is about to be published is finite: looked at as it goes by, asked once at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megadpo.errors import UserError


class FiniteWatch:
    """Sums every tensor that it sees, which costs a reading of it and makes nobody wait for a device.

    A sum of finite numbers may overflow: a suspicion is followed by `is_finite`, which is exact.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def see(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in, of any floating type and device."""
        self._names.append(name)
        self._sums.append(tensor.detach().sum(dtype=torch.float32))

    def passing(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, seen."""
        for name, tensor in tensors:
            self.see(name, tensor)
            yield name, tensor

    def suspect(self) -> str | None:
        """The name of the first tensor whose sum is not finite; waits for the device once."""
        if not self._sums:
            return None
        bad = ~torch.stack([each.to(self._sums[0].device) for each in self._sums]).isfinite()
        return self._names[int(bad.nonzero()[0])] if bool(bad.any()) else None


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is; waits for the device."""
    # A sum is a dozen times cheaper, and says enough unless it overflows.
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(tensor.detach()).all())


def finite_only(tensors: Iterable[tuple[str, Tensor]], what: str) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, in one process.

    Raises:
        UserError: one is not finite: `what` and its name.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            raise UserError(f"{what}: {name} is not finite, so nothing was written; use an earlier state of the model")
        yield name, tensor
