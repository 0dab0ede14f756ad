"""What computes the gated delta rule: torch's operations, or fla's kernels (flash-linear-attention) on CUDA.

fla's kernels are untried: no machine with them was at hand. They are called as transformers calls them, with the sequences
of a stream one after the other (`cu_seqlens`) and the states that these begin with.

Axes: T stream tokens, S sequences, G key heads, H value heads, K columns of a query and key head, V of a value head.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment
from megadpo.errors import UserError
from megadpo.model.attention.sequences import copied_to
from megadpo.model.linear_attention.chunks import Chunks
from megadpo.model.linear_attention.delta_rule import gated_delta_rule


class DeltaRule(Protocol):
    """One way to compute the rule over a packed stream."""

    def prepare(self, segments: Sequence[Segment], num_tokens: int, device: torch.device) -> Any:
        """What `outputs` needs to know of a stream, made once for all layers."""
        ...

    def outputs(
        self, query_TGK: Tensor, key_TGK: Tensor, value_THV: Tensor, log_decay_TH: Tensor, rate_TH: Tensor, prepared: Any
    ) -> Tensor:
        """[T, H, V]; arguments as of `delta_rule.gated_delta_rule`."""
        ...


class TorchDeltaRule:
    """By delta_rule.py, on any device and in any type."""

    def prepare(self, segments: Sequence[Segment], num_tokens: int, device: torch.device) -> Chunks:
        return Chunks.of(segments, num_tokens, device)

    def outputs(
        self, query_TGK: Tensor, key_TGK: Tensor, value_THV: Tensor, log_decay_TH: Tensor, rate_TH: Tensor, prepared: Chunks
    ) -> Tensor:
        return gated_delta_rule(query_TGK, key_TGK, value_THV, log_decay_TH, rate_TH, prepared)


@dataclass(frozen=True)
class Turn:
    """Sequences that one call of fla's kernel takes.

    Attributes:
        tokens_T: int64, theirs in the stream, one sequence after the other.
        starts: int64 [S + 1], where each begins, and the end of the last.
        before_S: int64, the sequences of the turn before whose last states these begin with; None: with zero.
    """

    tokens_T: Tensor
    starts: Tensor
    before_S: Tensor | None


@dataclass(frozen=True)
class Turns:
    """Prompts and what shares none, then the responses of shared prompts.

    Attributes:
        place_T: int64, where each token of the stream lies among those of all turns.
    """

    turns: tuple[Turn, ...]
    place_T: Tensor


class FlaDeltaRule:
    """By fla's `chunk_gated_delta_rule`.

    Attributes:
        kernel: that function, or one that does the same.
    """

    def __init__(self, kernel: Callable[..., tuple[Tensor, Tensor | None]] | None = None) -> None:
        if kernel is None:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            kernel = chunk_gated_delta_rule
        self.kernel = kernel

    def prepare(self, segments: Sequence[Segment], num_tokens: int, device: torch.device) -> Turns:
        there = [segment for segment in segments if segment.end > segment.start]
        firsts = [segment for segment in there if segment.prompt_end == segment.prompt_start]
        seconds = [segment for segment in there if segment.prompt_end > segment.prompt_start]
        numbers = {(segment.start, segment.end): number for number, segment in enumerate(firsts)}
        before = np.array([numbers[segment.prompt_start, segment.prompt_end] for segment in seconds], np.int64)
        order = np.concatenate([np.arange(s.start, s.end) for s in [*firsts, *seconds]])
        turns = [_turn(firsts, None, device)] + ([_turn(seconds, before, device)] if seconds else [])
        return Turns(tuple(turns), copied_to(device, np.argsort(order)))

    def outputs(
        self, query_TGK: Tensor, key_TGK: Tensor, value_THV: Tensor, log_decay_TH: Tensor, rate_TH: Tensor, prepared: Turns
    ) -> Tensor:
        repeats = value_THV.shape[1] // key_TGK.shape[1]
        query_THK, key_THK = (x.repeat_interleave(repeats, dim=1) for x in (query_TGK, key_TGK))
        found: list[Tensor] = []
        states: Tensor | None = None
        for turn in prepared.turns:
            inputs = (x.index_select(0, turn.tokens_T)[None] for x in (query_THK, key_THK, value_THV, log_decay_TH, rate_TH))
            query, key, value, log_decay, rate = inputs
            output, states = self.kernel(
                query,
                key,
                value,
                g=log_decay,
                beta=rate,
                initial_state=None if turn.before_S is None or states is None else states.index_select(0, turn.before_S),
                output_final_state=turn is not prepared.turns[-1],
                use_qk_l2norm_in_kernel=True,
                cu_seqlens=turn.starts,
            )
            found.append(output.squeeze(0))
        return torch.cat(found).index_select(0, prepared.place_T)


def _turn(segments: Sequence[Segment], before: np.ndarray[Any, Any] | None, device: torch.device) -> Turn:
    tokens = np.concatenate([np.arange(s.start, s.end) for s in segments])
    starts = np.concatenate([[0], np.cumsum([s.end - s.start for s in segments])]).astype(np.int64)
    return Turn(copied_to(device, tokens), copied_to(device, starts), None if before is None else copied_to(device, before))


def choose_delta_rule(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, DeltaRule]:
    """The way that `model.linear_attention` asks for, and its name: of "auto", fla's kernels where they can be used.

    Raises:
        UserError: fla's were asked for and cannot be had.
    """
    reason = _why_no_fla(device, dtype)
    if requested == "fla" and reason is not None:
        raise UserError(f"model.linear_attention is fla, but {reason}; set it to auto")
    if requested == "torch" or reason is not None:
        return "torch", TorchDeltaRule()
    return "fla", FlaDeltaRule()


@functools.cache
def _why_no_fla(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "that needs a CUDA device, of which there is none"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"that computes in bf16 and not in {str(dtype).removeprefix('torch.')}"
    is_there = importlib.util.find_spec("fla") is not None
    return None if is_there else "flash-linear-attention is not installed"
