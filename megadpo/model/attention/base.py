"""What a backend of attention is: one way to compute attention over a packed stream.

A backend is a file of this folder with a class that does what `AttentionBackend` says and one instance of it, `BACKEND`;
the file's name is the backend's, and its entry in `backends.BACKENDS` makes it known.

Axes: T stream tokens, S keys of the stream, A query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment, ShardSegment


@dataclass(frozen=True)
class AttentionNeeds:
    """What a run asks of a backend; a backend that lacks any of it says so in `why_not`.

    Attributes:
        device: where queries, keys and values are.
        dtype: theirs.
        head_dim: D.
        has_windows: whether any layer's queries see a sliding window of keys only.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_windows: bool = False


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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prepared: Any, scale: float) -> Tensor:
        """Output [T, A, D] in the dtype of `query`, differentiable.

        Args:
            query: [T, A, D].
            key, value: [S, K, D], where K divides A.
            prepared: by `prepare`.
            scale: what scores are multiplied by before their softmax.
        """
        ...
