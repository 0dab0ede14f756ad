"""Rotary embedding by position id, in GPTModel's rotary_pos_emb slot: a packed stream restarts its positions.

Axes: T stream tokens, A query heads and K key-value heads of this tensor rank, D head dimension, N pairs of columns that are
turned together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.errors import UserError
from megadpo.model.frequencies import ByLength, Rope
from megadpo.model.norm import unweighted_norm
from megadpo.model.recompute import recomputable, remember
from megadpo.model.shape import Temperature

if TYPE_CHECKING:  # it imports Megatron-core, for which `prepare_megatron` comes first
    from megadpo.model.attention.core import StreamParams


class PositionRope(torch.nn.Module):
    """Angles [T, 1, 1, D] of each stream token's position id."""

    def __init__(self, inverse_frequencies: Tensor) -> None:
        """`inverse_frequencies` [D / 2], float32, scaling included (transformers' ROPE_INIT_FUNCTIONS)."""
        super().__init__()
        # An attribute and no buffer: a cast of the model to bf16 must not touch the frequencies.
        self.inverse_frequencies = inverse_frequencies.float()

    def get_rotary_seq_len(self, *args: Any) -> StreamParams:
        """GPTModel asks here for what it hands to `forward`; the stream's parameters come last."""
        return args[-1]

    def forward(self, stream: StreamParams, **unused: Any) -> Tensor:
        """Rotation angles in float32, as Megatron's unfused rope wants them."""
        angles = self.angles(stream)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]

    def angles(self, stream: StreamParams) -> Tensor:
        """[T, D / 2] in float32."""
        assert stream.micro_batch is not None
        positions_T = stream.micro_batch.local.positions_T
        self.inverse_frequencies = self.inverse_frequencies.to(positions_T.device)
        return torch.outer(positions_T.float(), self.inverse_frequencies)


class LayerRopes(torch.nn.Module):
    """Ropes that are not the same in all layers, turn a part of a head, or depend on a sequence's length; and what goes with
    being turned, or not.

    It leaves it to attention to rotate queries and keys (`StreamParams.rotate`), each layer's by the rope that it has.
    """

    def __init__(
        self,
        ropes: Sequence[Rope | None],
        is_interleaved: bool,
        turns_last: bool = False,
        norm_epsilon: float | None = None,
        temperature: Temperature | None = None,
    ) -> None:
        """`ropes` has one entry a layer of the whole model; None: the layer has no rope.

        Args:
            turns_last: the part of a head that is turned is its last columns, not its first.
            norm_epsilon: of the norm that turned queries and keys have; None: they have none.
            temperature: of queries that are not turned.
        """
        super().__init__()
        self.distinct = list({id(rope): rope for rope in ropes if rope is not None}.values())
        numbers = {id(rope): number for number, rope in enumerate(self.distinct)}
        self.number_of_layer = [None if rope is None else numbers[id(rope)] for rope in ropes]
        self.is_interleaved, self.turns_last = is_interleaved, turns_last
        self.norm_epsilon, self.temperature = norm_epsilon, temperature

    def get_rotary_seq_len(self, *args: Any) -> StreamParams:
        """As in PositionRope."""
        return args[-1]

    def forward(self, stream: StreamParams, **unused: Any) -> None:
        """Tell the stream how each layer rotates."""
        assert stream.micro_batch is not None
        turns = []
        for rope in self.distinct:
            angles_TN = angles_of(rope, stream.micro_batch)
            turns.append((angles_TN.cos() * rope.scaling, angles_TN.sin() * rope.scaling))
        factor_T = None
        if self.temperature is not None:
            factor_T = temperatures(self.temperature, stream.micro_batch.local.positions_T)
        stream.rotate = functools.partial(self._rotated, turns, factor_T)

    def _rotated(
        self,
        turns: Sequence[tuple[Tensor, Tensor]],
        factor_T: Tensor | None,
        query_TAD: Tensor,
        key_TKD: Tensor,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        number = self.number_of_layer[layer]
        if number is None:
            return query_TAD if factor_T is None else recomputable(_times, query_TAD, factor_T), key_TKD
        query, key = (rotated(x, *turns[number], self.is_interleaved, self.turns_last) for x in (query_TAD, key_TKD))
        if self.norm_epsilon is None:
            return query, key
        norm = functools.partial(unweighted_norm, eps=self.norm_epsilon)
        return recomputable(norm, query), recomputable(norm, key)


def temperatures(temperature: Temperature, positions_T: Tensor) -> Tensor:
    """float32 [T], what a query at each position is multiplied by."""
    return torch.log1p(torch.floor((positions_T.float() + 1.0) / temperature.floor)) * temperature.strength + 1.0


def _times(x_TAD: Tensor, factor_T: Tensor) -> Tensor:
    """In float32, rounded once."""
    return (x_TAD * factor_T[:, None, None]).to(x_TAD.dtype)


def angles_of(rope: Rope, micro_batch: MicroBatch) -> Tensor:
    """[T, N] in float32, of the tokens that are computed here.

    Raises:
        UserError: responses share a prompt, and by their lengths not the same frequencies.
    """
    positions_T = micro_batch.local.positions_T
    frequencies_N = rope.inverse_frequencies.to(positions_T.device)
    if rope.by_length is None:
        return torch.outer(positions_T.float(), frequencies_N)
    kinds = kinds_of_segments(micro_batch, rope.by_length)
    if not any(kinds):
        return torch.outer(positions_T.float(), frequencies_N)
    distinct = sorted(set(kinds))
    of_kinds = [rope.by_length.inverse_frequencies_of(kind) if kind else rope.inverse_frequencies for kind in distinct]
    lengths_S = torch.tensor([segment.end - segment.start for segment in micro_batch.segments])
    which_S = torch.tensor([distinct.index(kind) for kind in kinds])
    which_T = which_S.repeat_interleave(lengths_S).to(positions_T.device)[micro_batch.local_places()]
    return positions_T.float()[:, None] * torch.stack(of_kinds).to(positions_T.device)[which_T]


def kinds_of_segments(micro_batch: MicroBatch, by_length: ByLength) -> list[int]:
    """The kind of frequencies of each segment of the stream, by the whole sequence that it is of.

    Raises:
        UserError: as `angles_of`.
    """
    of_prompt: dict[tuple[int, int], int] = {}
    kinds: list[int] = []
    for start, end, prompt_start, prompt_end in micro_batch.segments:
        kind = by_length.kind(end - start + prompt_end - prompt_start)
        kinds.append(kind)
        if prompt_end > prompt_start and of_prompt.setdefault((prompt_start, prompt_end), kind) != kind:
            raise UserError(
                "a prompt is shared by responses with which it is "
                f"{_lengths(micro_batch, prompt_start, prompt_end)} tokens long, and the "
                "model's rope (rope_parameters: rope_type longrope or dynamic) turns it differently in each; set "
                "data.share_prompts to false, or data.max_length to the length up to which it does not"
            )
    places = [(segment.start, segment.end) for segment in micro_batch.segments]
    return [of_prompt.get(place, kind) for place, kind in zip(places, kinds, strict=True)]


def _lengths(micro_batch: MicroBatch, prompt_start: int, prompt_end: int) -> str:
    lengths = [
        segment.end - segment.start + prompt_end - prompt_start
        for segment in micro_batch.segments
        if (segment.prompt_start, segment.prompt_end) == (prompt_start, prompt_end)
    ]
    return " and ".join(map(str, lengths))


def rotated(x_TAD: Tensor, cosine_TN: Tensor, sine_TN: Tensor, is_interleaved: bool, turns_last: bool = False) -> Tensor:
    """2 N columns of each head turned, the first or the last, the others as they are; in float32 and rounded once.

    Args:
        is_interleaved: columns 2 n and 2 n + 1 of them are turned together; else n and n + N.
    """
    turn = functools.partial(_turned, is_interleaved=is_interleaved, turns_last=turns_last)
    result = _Rotation.apply(x_TAD, cosine_TN, sine_TN, turn)
    remember(result, turn, x_TAD, cosine_TN, sine_TN)
    return result


class _Rotation(torch.autograd.Function):
    """Keeps cosine and sine, which layers share."""

    @staticmethod
    def forward(ctx: Any, x_TAD: Tensor, cosine_TN: Tensor, sine_TN: Tensor, turn: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(cosine_TN, sine_TN)
        ctx.turn = turn
        return turn(x_TAD, cosine_TN, sine_TN)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The transposed: the same factor, the other way around."""
        cosine_TN, sine_TN = ctx.saved_tensors
        return ctx.turn(gradients[0], cosine_TN, -sine_TN), None, None, None


def _turned(x_TAD: Tensor, cosine_TN: Tensor, sine_TN: Tensor, is_interleaved: bool, turns_last: bool) -> Tensor:
    num_pairs = cosine_TN.shape[-1]
    first = x_TAD.shape[-1] - 2 * num_pairs if turns_last else 0
    end = first + 2 * num_pairs
    result = torch.empty(x_TAD.shape, dtype=x_TAD.dtype, device=x_TAD.device)
    parts = (slice(first, end, 2), slice(first + 1, end, 2))
    if not is_interleaved:
        parts = (slice(first, first + num_pairs), slice(first + num_pairs, end))
    one, other = (x_TAD[..., part].float() for part in parts)
    cosine, sine = cosine_TN[:, None], sine_TN[:, None]
    result[..., parts[0]] = one * cosine - other * sine
    result[..., parts[1]] = other * cosine + one * sine
    for rest in (slice(0, first), slice(end, None)):
        result[..., rest] = x_TAD[..., rest]
    return result
