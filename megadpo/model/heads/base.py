"""What the heads have in common: during a pass they know the micro-batch whose stream they read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from megadpo.data.batches.micro_batch import MicroBatch


class StreamHead(torch.nn.Module):
    """GPTModel's output layer, which reads hidden states at the positions that the micro-batch names.

    GPTModel hands its output layer nothing but hidden states, so the micro-batch comes by `reading`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._micro_batch: MicroBatch | None = None

    @contextlib.contextmanager
    def reading(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Within the block, forward passes are over this micro-batch."""
        self._micro_batch = micro_batch
        try:
            yield
        finally:
            self._micro_batch = None

    @property
    def micro_batch(self) -> MicroBatch:
        """The micro-batch of the pass under way."""
        assert self._micro_batch is not None, "a model with a head runs within head.reading(micro_batch)"
        return self._micro_batch
