"""A reference that is asked once: for tests whose every step is on the same batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.training.reference import Reference


class RememberedReference(Reference):
    """What a reference said of the micro-batches of a step, for further steps on them."""

    def __init__(self, logps: Sequence[Tensor | None]) -> None:
        self._logps = logps

    def logps(self, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        return self._logps
