"""Router replay: which experts one model chose for each token, kept for another one that sends it to the same.

As the routing replay of GSPO (arXiv:2507.18071, section 5.3): where a policy chooses other experts for a token than its
reference does, the ratio of their probabilities compares two networks. With the reference's routes in both it does not.
Routers still learn: the probabilities of the experts that a token goes to have gradients.

Axes: T tokens of a micro-batch (or a half of it) on this rank, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch


@dataclass
class Routes:
    """The routes of the micro-batches that the reference has seen last, on this rank.

    They stay until it sees others: a layer that is recomputed goes by them once more.

    Attributes:
        num_experts: of a layer.
    """

    num_experts: int
    _micro_batches: Sequence[MicroBatch] | None = None
    _chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def begin(self, micro_batches: Sequence[MicroBatch]) -> Routes:
        """What is noted from here on is about these."""
        self._micro_batches, self._chosen = micro_batches, {}
        return self

    def of(self, micro_batches: Sequence[MicroBatch]) -> Routes:
        """These, which must be about the very same micro-batches.

        Raises:
            ValueError: they are about others.
        """
        if self._micro_batches is not micro_batches:
            raise ValueError("the reference has routed other micro-batches than these")
        return self

    def note(self, number: int, layer: int, expert_TK: Tensor) -> None:
        """The choices of a layer, counted over the whole model, for the micro-batch of this number in the step."""
        smallest = torch.uint8 if self.num_experts <= 256 else torch.int16
        self._chosen[number, layer] = expert_TK.to(smallest)

    def chosen_TK(self, number: int, layer: int) -> Tensor:
        """What was noted, int64."""
        return self._chosen[number, layer].long()
