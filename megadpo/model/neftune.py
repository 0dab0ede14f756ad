"""NEFTune (arXiv:2310.05914): uniform noise on the policy's embeddings while it is trained.

A token's noise is uniform in [-1, 1) times alpha / sqrt(L d), for d the hidden size. L is the length of prompt and longest
response of the token's group, which is what a batch of this group, padded to its longest sequence, has; a prompt that
responses share has one noise. Each number is a function of seed, step, group, place and column alone, not of a generator's
state: the layout, the packing and a resumed run change nothing.

Axes: T tokens of the stream, L tokens that are computed here, R responses, G groups, H hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch

if TYPE_CHECKING:
    from megadpo.model.build import Stage

TILE_ELEMENTS = 1 << 22
"""Of the noise that is made at once: a number takes eight bytes meanwhile."""

_GOLDEN, _FIRST, _SECOND = (word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass
class EmbeddingNoise:
    """The noise of a stage, and whether it is on.

    Attributes:
        step: of the run; to be set before each.
    """

    alpha: float
    seed: int
    step: int = 0
    is_on: bool = False
    _micro_batch: MicroBatch | None = None

    def attach(self, stage: Stage, multiplied: bool = False) -> None:
        """Add noise to what the stage's embedding gives, where it has one.

        Args:
            multiplied: after the model's factor on embeddings, not before: transformers adds it to what its embedding
                module gives, which has some models' factor in it.
        """
        stage.noise = self
        model = stage.models[0]
        if model.pre_process:
            model.register_forward_pre_hook(self._look, with_kwargs=True)
            model.embedding.register_forward_hook(self._add, prepend=not multiplied)

    def _look(self, model: torch.nn.Module, arguments: Any, named: Any) -> None:
        self._micro_batch = named["packed_seq_params"].micro_batch

    def _add(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not self.is_on:
            return output
        assert self._micro_batch is not None
        keys_L, scales_L = self._tokens(self._micro_batch)
        num_here = output.shape[0]
        if num_here < len(keys_L):  # sequence parallelism: each tensor rank has its part of the stream
            first = parallel_state.get_tensor_model_parallel_rank() * num_here
            keys_L, scales_L = keys_L[first : first + num_here], scales_L[first : first + num_here]
        hidden_size = output.shape[-1]
        noise_LH = torch.empty(num_here, hidden_size, dtype=output.dtype, device=output.device)
        scales_L = scales_L * (self.alpha / math.sqrt(hidden_size))
        for rows in torch.arange(num_here, device="cpu").split(max(1, TILE_ELEMENTS // hidden_size)):
            tile = slice(int(rows[0]), int(rows[-1]) + 1)
            noise_LH[tile] = (uniform(keys_L[tile], hidden_size) * scales_L[tile, None]).to(output.dtype)
        return output + noise_LH[:, None]

    def _tokens(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Of each token that is computed here, its key, int64 [L], and 1 / sqrt(L) of its sequence, fp32, 0 for padding."""
        place_L = micro_batch.local_places()
        is_token_L = place_L >= 0
        if micro_batch.num_responses == 0:
            return torch.zeros_like(place_L), torch.zeros_like(place_L, dtype=torch.float32)
        last_R, group_R = micro_batch.last_R, micro_batch.group_R
        is_token_L &= place_L <= last_R[-1]
        response_L = torch.searchsorted(last_R, place_L).clamp(max=len(last_R) - 1)
        group_L = group_R[response_L]
        is_response_L = place_L > (last_R - micro_batch.num_completion_tokens_R)[response_L]
        number_L = (response_L - micro_batch.first_G[group_L] + 1) * is_response_L
        length_R = micro_batch.positions_T[last_R] + 1
        length_G = torch.zeros_like(micro_batch.first_G).scatter_reduce_(0, group_R, length_R, "amax")
        batch_position_G = torch.tensor(micro_batch.batch_positions, device=place_L.device)
        position_L = micro_batch.positions_T[place_L.clamp(min=0)]
        keys_L = torch.full_like(place_L, self.seed)
        for part in (self.step, batch_position_G[group_L], number_L, position_L):
            keys_L = _mixed(keys_L + _GOLDEN) + part
        return keys_L, torch.where(is_token_L, length_G[group_L].float().rsqrt(), 0.0)


def uniform(keys_L: Tensor, num_columns: int) -> Tensor:
    """fp32 [L, columns] in [-1, 1), a function of key and column: the bits of SplitMix64."""
    columns = torch.arange(1, num_columns + 1, device=keys_L.device) * _GOLDEN
    bits = _mixed(_mixed(keys_L)[:, None] + columns)
    return (bits >> 40).float() * 2.0**-23


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64 words, whose products wrap around."""
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, count: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (words >> count) & ((1 << (64 - count)) - 1)


@contextlib.contextmanager
def noise_added(stage: Stage) -> Iterator[None]:
    """Within the block a stage's embeddings have noise, where there is any."""
    if stage.noise is None:
        yield
        return
    stage.noise.is_on = True
    try:
        yield
    finally:
        stage.noise.is_on = False


@contextlib.contextmanager
def without_noise(stage: Stage) -> Iterator[None]:
    """Within the block there is none, whatever the block around it says: of a reference that runs in the policy's stage."""
    if stage.noise is None:
        yield
        return
    was_on, stage.noise.is_on = stage.noise.is_on, False
    try:
        yield
    finally:
        stage.noise.is_on = was_on
