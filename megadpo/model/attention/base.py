"""What a backend of attention is: one way to compute attention over a packed stream.

A backend is a file of this folder with a class that does what `AttentionBackend` says and one instance of it, `BACKEND`;
the file's name is the backend's, and its entry in `backends.BACKENDS` makes it known.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment

if TYPE_CHECKING:
    from megadpo.model.shape import ModelShape


@dataclass(frozen=True)
class AttentionNeeds:
    """What a run asks of a backend; a backend that lacks any of it says so in `why_not`.

    Attributes:
        device: where queries, keys and values are.
        dtype: theirs.
        head_dim: D.
        has_windows: whether any layer's queries see a sliding window of keys only.
        value_dim: D of the values; None: as that of queries and keys.
        has_softcap: whether scores are capped before their softmax.
        has_sinks: whether heads have a learned number in their softmax's denominator.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_windows: bool = False
    value_dim: int | None = None
    has_softcap: bool = False
    has_sinks: bool = False

    @classmethod
    def of(cls, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> AttentionNeeds:
        """What a model asks for."""
        return cls(
            device,
            dtype,
            shape.head_dim,
            shape.has_windows,
            None if shape.latents is None else shape.latents.value_dim,
            has_softcap=shape.attention_softcap is not None,
            has_sinks=shape.attention_sinks,
        )

    @property
    def largest_dim(self) -> int:
        """D of a kernel that knows one dimension only: head_dims.py."""
        return max(self.head_dim, self.value_dim or 0)


class AttentionBackend(Protocol):
    """One way to compute attention: causal within each segment, wholly visible shared prompts, sliding windows.

    The keys of a segment are its prompt's, then its own. The last query sees all of them, each before it one fewer; a window
    counts over both. A segment that context parallelism has cut (a ShardSegment) may have fewer queries than keys.
    """

    @property
    def name(self) -> str:
        """The value of `model.attention` that asks for it, and the name of its file."""
        ...

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """Why it cannot be used, as the second half of "model.attention is NAME, but …"; None: it can."""
        ...

    def prepare(self, segments: Sequence[Segment | ShardSegment], window: int | None, key: Tensor) -> Any:
        """What `attend` needs to know of a stream, made once for all layers with this window.

        Args:
            segments: the queries, in order, with their keys in the stream.
            window: a query sees this many keys, itself included; None: all before it.
            key: [S, K, D] of any layer, for its length, dtype and device.
        """
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prepared: Any,
        scale: float,
        softcap: float | None = None,
        sinks_A: Tensor | None = None,
    ) -> Tensor:
        """Output [T, A, D of the values] in the dtype of `query`, differentiable.

        Args:
            query: [T, A, D].
            key, value: [S, K, D], where K divides A. The D of the values may differ.
            prepared: by `prepare`.
            scale: what scores are multiplied by before their softmax.
            softcap: scores become softcap * tanh(score / softcap) before their softmax. None is what a backend gets whose
                `why_not` refuses them; the same is true of sinks.
            sinks_A: a score more in each head's softmax, whose weight no value gets; has a gradient.
        """
        ...
