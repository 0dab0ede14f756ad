"""How a packed stream is cut for layers whose state runs on from token to token: it begins at zero with each sequence, and
for a response that shares its prompt as it is at the prompt's end.

A segment is cut into chunks of C tokens, the last of which may be shorter. A chunk needs the state after the one before it;
a response's first chunk, that after the last of its prompt. So chunks are ordered by how many come before them in their
sequence: all chunks of one step are computed together, and each state that they begin with is one of the step before.

Axes: T stream tokens, N chunks, C tokens of a chunk, S segments, E rows of the stream with each segment's context put before
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import Segment
from megadpo.model.attention.sequences import copied_to

CHUNK_SIZE = 64


@dataclass(frozen=True)
class Chunks:
    """The chunks of a stream, by their steps.

    Attributes:
        tokens_NC: int64, each chunk's tokens in the stream; T where it has none.
        place_T: int64, where each token lies in the flattened [N, C].
        steps: how many chunks each step has: they are next to each other.
        before: for each step but the first, int64: which chunk of the step before gives the state that each begins with.
    """

    tokens_NC: Tensor
    place_T: Tensor
    steps: tuple[int, ...]
    before: tuple[Tensor, ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], num_tokens: int, device: torch.device, size: int = CHUNK_SIZE) -> Chunks:
        """Of a stream of `num_tokens`, which `segments` cover."""
        there = [segment for segment in segments if segment.end > segment.start]
        counts = {(s.start, s.end): -(-(s.end - s.start) // size) for s in there}
        firsts = [counts[s.prompt_start, s.prompt_end] if s.prompt_end > s.prompt_start else 0 for s in there]
        lasts = {(s.start, s.end): (number, counts[s.start, s.end] - 1) for number, s in enumerate(there)}
        # (step, segment, chunk of the segment), sorted: a step's chunks next to each other, in the order of segments.
        chunks = sorted(
            (first + chunk, number, chunk)
            for number, (segment, first) in enumerate(zip(there, firsts, strict=True))
            for chunk in range(counts[segment.start, segment.end])
        )
        tokens_NC = np.full((len(chunks), size), num_tokens, np.int64)
        for row, (_, number, chunk) in enumerate(chunks):
            start = there[number].start + chunk * size
            length = min(size, there[number].end - start)
            tokens_NC[row, :length] = np.arange(start, start + length)
        num_steps = 1 + max((step for step, _, _ in chunks), default=-1)
        by_step: list[dict[tuple[int, int], int]] = [{} for _ in range(num_steps)]
        for step, number, chunk in chunks:
            by_step[step][number, chunk] = len(by_step[step])
        before = []
        for step in range(1, num_steps):
            wanted = []
            for number, chunk in by_step[step]:
                segment = there[number]
                wanted.append((number, chunk - 1) if chunk else lasts[segment.prompt_start, segment.prompt_end])
            before.append(np.array([by_step[step - 1][each] for each in wanted], np.int64))
        flat = tokens_NC.ravel()
        place_T = np.empty(num_tokens, np.int64)
        place_T[flat[flat < num_tokens]] = np.flatnonzero(flat < num_tokens)
        return cls(
            copied_to(device, tokens_NC),
            copied_to(device, place_T),
            tuple(len(each) for each in by_step),
            tuple(copied_to(device, each) for each in before),
        )


@dataclass(frozen=True)
class Contexts:
    """What a causal convolution over a stream reads.

    Attributes:
        rows_E: int64, for each segment the `context` rows before it (its prompt's last ones, where it shares one), then its
            own; T where there is none.
        place_T: int64, where each token's window begins among them.
    """

    rows_E: Tensor
    place_T: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], num_tokens: int, device: torch.device, context: int) -> Contexts:
        """Of a stream of `num_tokens`, which `segments` cover."""
        rows, places, num_rows = [np.zeros(0, np.int64)], np.empty(num_tokens, np.int64), 0
        for segment in segments:
            num_own = segment.end - segment.start
            num_of_prompt = min(context, segment.prompt_end - segment.prompt_start)
            rows.append(np.full(context - num_of_prompt, num_tokens, np.int64))
            rows.append(np.arange(segment.prompt_end - num_of_prompt, segment.prompt_end))
            rows.append(np.arange(segment.start, segment.end))
            places[segment.start : segment.end] = num_rows + np.arange(num_own)
            num_rows += context + num_own
        return cls(copied_to(device, np.concatenate(rows)), copied_to(device, places))
