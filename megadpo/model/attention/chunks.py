"""Attention in chunks (Llama 4), by any backend: a sequence is cut into parts of equal length, and a token sees those before
it in its own part. So a segment becomes segments, one for each part that its queries lie in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megadpo.data.batches.micro_batch import Segment, ShardSegment


def in_chunks(segments: Sequence[Segment | ShardSegment], size: int | None) -> Sequence[Segment | ShardSegment]:
    """Segments with the same queries, whose keys are those of a query's own part.

    Args:
        size: tokens of a part, counted from the beginning of the prompt that a segment shares, else from the segment's own;
            None: nothing is cut.
    """
    if size is None:
        return segments
    return [part for segment in segments for part in _parts(segment, size)]


def _parts(segment: Segment | ShardSegment, size: int) -> Iterator[Segment | ShardSegment]:
    num_prompt = segment.prompt_end - segment.prompt_start
    length = num_prompt + segment.keys.stop - segment.keys.start
    if length <= size:
        yield segment
        return
    offset = segment.keys.start - num_prompt  # of a place in the sequence, where it is among the keys
    at, first = segment.start, length - (segment.end - segment.start)
    while first < length:
        begin = first // size * size
        end = min(begin + size, length)
        prompt = (segment.prompt_start + begin, segment.prompt_end) if begin < num_prompt else (0, 0)
        yield ShardSegment(at, at + end - first, offset + max(begin, num_prompt), offset + end, *prompt)
        at, first = at + end - first, end
