"""Adapters of the embedding and of the head, whose matrices have a row for each token of the vocabulary.

Head: logits = W h + scaling B A h. A is whole on every tensor rank, B is cut by rows as W is. The head computes a tile of
logits at a time; what is added to it is a product with A h, which is as narrow as the rank and computed once for all tiles.
Embedding: e(x) = W[x] + scaling B A[:, x]. A is cut by columns, as W is by rows, and B is whole: what is summed over ranks
is as narrow as the rank. No input of it is dropped, as in PEFT.

Under sequence parallelism the matrix that is whole sees this rank's tokens only, as in products.py.

Axes: T tokens of the stream, t of this rank's part under sequence parallelism, N scored positions, H hidden, V this rank's
vocabulary rows (padding included), R the adapter's rank.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megadpo.model.adapters.linear import AdapterSwitch


@dataclass(frozen=True)
class VocabularyAdapter:
    """The adapter of an embedding or a head, whose parameters (or buffers) `lora_A` and `lora_B` are, behind `prefix`."""

    scaling: float
    dropout: float = 0.0
    prefix: str = ""

    def a(self, module: Any) -> Tensor:
        """[R, H] of a head, [R, V] of an embedding."""
        return getattr(module, f"{self.prefix}lora_A")

    def b(self, module: Any) -> Tensor:
        """[V, R] of a head, [H, R] of an embedding."""
        return getattr(module, f"{self.prefix}lora_B")

    def low_NR(self, head: Any, hidden: Tensor, scored_N: Tensor) -> Tensor:
        """scaling A h at the scored positions, the same on every tensor rank; its gradient is summed over these, which have
        a part of the logits each.

        Args:
            head: has the attributes `sequence_parallel` and `adapter_switch`.
            hidden: [T, 1, H], or [t, 1, H] under sequence parallelism.
        """
        if head.sequence_parallel:
            low_tR = self._low(head, hidden.squeeze(1), has_part=True)
            return gather_from_sequence_parallel_region(low_tR).index_select(0, scored_N)
        low_NR = self._low(head, hidden.squeeze(1).index_select(0, scored_N), has_part=False)
        return copy_to_tensor_model_parallel_region(low_NR)

    def _low(self, head: Any, input_H: Tensor, has_part: bool) -> Tensor:
        if self.dropout and head.adapter_switch.drops:
            # Ranks with the same inputs draw the same numbers, those with parts for themselves.
            with get_cuda_rng_tracker().fork() if has_part else contextlib.nullcontext():
                kept = torch.rand_like(input_H, dtype=torch.float32) >= self.dropout
            input_H = input_H * kept / (1 - self.dropout)
        return F.linear(input_H, self.a(head)) * self.scaling

    def embedded(self, embedding: Any, token_ids: Tensor, output: Tensor) -> Tensor:
        """What Megatron's VocabParallelEmbedding gave, with the adapter's part added.

        Args:
            token_ids: [1, T].
            output: [1, T, H], or [t, 1, H] under sequence parallelism.
        """
        a_RV = self.a(embedding)
        rows = token_ids - embedding.vocab_start_index
        is_elsewhere = (rows < 0) | (rows >= a_RV.shape[1])
        low = F.embedding(rows.masked_fill(is_elsewhere, 0), a_RV.t()).masked_fill(is_elsewhere.unsqueeze(-1), 0)
        if embedding.reduce_scatter_embeddings:
            low = reduce_scatter_to_sequence_parallel_region(low.transpose(0, 1).contiguous())
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return torch.add(output, F.linear(low, self.b(embedding)), alpha=self.scaling)


def adapt_embedding(embedding: torch.nn.Module, state: str, adapter: VocabularyAdapter, switch: AdapterSwitch) -> None:
    """Have a VocabParallelEmbedding compute with `adapter` where the switch is turned to `state`."""

    def add(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return adapter.embedded(module, inputs[0], output) if switch.state == state else output

    embedding.register_forward_hook(add)
