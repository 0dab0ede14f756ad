"""A micro-batch: groups laid out as one flat token stream, with what attention and the head need to know of it.

Axes: T tokens of the stream, N scored positions, R responses of the micro-batch, P pairs, G groups, U runs (a prompt or a
response where it stands in the stream).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadpo.data.groups import Group
from megadpo.data.store import GroupStore

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Consecutive stream tokens that attend alike: causally to themselves, and wholly to a shared prompt before them.

    Attributes:
        start, end: the tokens [start, end) of the stream, which are queries and keys.
        prompt_start, prompt_end: further keys, all of them visible; empty (equal) where the segment stands alone.
    """

    start: int
    end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The stream tokens that are its own keys."""
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a Part that attend alike, as part of a segment.

    Attributes:
        start, end: the queries, as places among the part's tokens.
        keys_start, keys_end: their own keys in the stream; the last query sees all of them, each one before one key less.
        prompt_start, prompt_end: further keys in the stream, all of them visible.
    """

    start: int
    end: int
    keys_start: int
    keys_end: int
    prompt_start: int = 0
    prompt_end: int = 0

    @property
    def keys(self) -> slice:
        """The stream tokens that are its own keys."""
        return slice(self.keys_start, self.keys_end)


@dataclass(frozen=True)
class Part:
    """What one context-parallel rank holds of a micro-batch, see data/cut.py; every part has the same number of tokens.
    Or one of two halves, see data/halves.py.

    Attributes:
        tokens_T, positions_T: as in MicroBatch, of the tokens held.
        scored_N: int64 places among the tokens held whose next-token distribution is read.
        targets_N: int64 the token that follows there, wherever it lies.
        numbers_N: int64 which of the micro-batch's scored positions these are.
        pieces: covers the tokens held without gaps, in order.
        order: int64 [the stream's tokens]: where each stands when all parts are put one after the other.
        first: where this part begins there.
    """

    tokens_T: Tensor
    positions_T: Tensor
    scored_N: Tensor
    targets_N: Tensor
    numbers_N: Tensor
    pieces: tuple[Piece, ...]
    order: Tensor
    first: int

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Part:
        """The same part with its tensors changed."""
        return replace(self, **_changed_tensors(self, change))


@dataclass(frozen=True)
class MicroBatch:
    """One flat stream for one forward pass.

    Attributes:
        tokens_T: int64 token ids, padding included.
        positions_T: int64 position ids: each response goes on where its prompt ends.
        segments: covers the stream without gaps, in order.
        scored_N: int64 stream positions whose next-token distribution is read (a shared prompt's end is read K times).
        targets_N: int64 the token that follows there.
        response_N: int64 the response, 0..R-1, that the target belongs to.
        place_N: int64 the target's place in its completion, from 1; 0 for a token of the prompt (see `lay_out`).
        num_completion_tokens_R: int64 tokens of each response, scored or not.
        last_R: int64 stream position of each response's last token.
        group_R: int64 the group, 0..G-1, of each response.
        rows: the group numbers in the store, one a group.
        places: each group's place in the step's batch.
        num_padding: stream tokens that belong to no group.
        numbers: float64 [R] by name: what the rows say of their responses, see `Group`.
        part: what this rank holds of the stream under context parallelism, or computes at once of halves; None: all of it.
        halves: the two streams as which the chosen and the rejected answers of pairs travel, see data/halves.py; empty:
            together.
    """

    tokens_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]
    scored_N: Tensor
    targets_N: Tensor
    response_N: Tensor
    place_N: Tensor
    num_completion_tokens_R: Tensor
    last_R: Tensor
    group_R: Tensor
    rows: tuple[int, ...]
    places: tuple[int, ...]
    num_padding: int
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    part: Part | None = None
    halves: tuple[Part, ...] = ()

    def half(self, number: int) -> MicroBatch:
        """The same micro-batch, of which one of its halves is computed; itself where it has none."""
        return replace(self, part=self.halves[number], halves=()) if self.halves else self

    @property
    def held(self) -> MicroBatch | Part:
        """What this rank computes: its `tokens_T`, `positions_T`, `scored_N` and `targets_N`."""
        return self if self.part is None else self.part

    @property
    def num_tokens(self) -> int:
        """Stream tokens, padding left out."""
        return len(self.tokens_T) - self.num_padding

    @property
    def num_responses(self) -> int:
        """R."""
        return len(self.group_R)

    @property
    def first_G(self) -> Tensor:
        """int64, each group's first response."""
        num_responses_G = torch.bincount(self.group_R, minlength=len(self.rows))
        return num_responses_G.cumsum(0) - num_responses_G

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same micro-batch in memory from which a GPU copies without the processor waiting."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        numbers = {name: change(numbers_R) for name, numbers_R in self.numbers.items()}
        part = None if self.part is None else self.part.with_tensors(change)
        halves = tuple(half.with_tensors(change) for half in self.halves)
        return replace(self, numbers=numbers, part=part, halves=halves, **_changed_tensors(self, change))


def _changed_tensors(item: MicroBatch | Part, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    tensors = {f.name: getattr(item, f.name) for f in fields(item) if isinstance(getattr(item, f.name), Tensor)}
    return {name: change(tensor) for name, tensor in tensors.items()}


def lay_out(
    groups: Sequence[Group],
    rows: Sequence[int],
    share_prompts: bool = True,
    multiple_of: int = 1,
    padding_token: int = 0,
    score_prompts: bool = False,
    places: Sequence[int] | None = None,
) -> MicroBatch:
    """`lay_out_groups` of groups in memory, whose numbers in the store are `rows`."""
    store = GroupStore.of(groups)
    numbers = np.arange(len(groups))
    micro_batch = lay_out_groups(store, numbers, share_prompts, multiple_of, padding_token, score_prompts, places)
    return replace(micro_batch, rows=tuple(int(row) for row in rows))


def lay_out_groups(
    store: GroupStore,
    numbers: Sequence[int] | IntArray,
    share_prompts: bool = True,
    multiple_of: int = 1,
    padding_token: int = 0,
    score_prompts: bool = False,
    places: Sequence[int] | None = None,
) -> MicroBatch:
    """Lay groups out as ``[prompt | response 1 | … | response K]``, one after the other.

    Without `share_prompts`, or where a group's prompts differ, each response gets its own copy of its prompt.

    Args:
        numbers: the groups' numbers in the store.
        places: each group's place in the step's batch; None: as they come.
        score_prompts: read the log-probs of the first response's prompt too (all its tokens but the first).
        multiple_of: the stream's length is padded up to a multiple of it (sequence parallelism cuts the stream evenly).
    """
    numbers_G = np.asarray(numbers, np.int64)
    runs = _runs_of(store, numbers_G, share_prompts)
    num_tokens = int(runs.length_U.sum())
    num_padding = max(-num_tokens % multiple_of, multiple_of if not len(numbers_G) else 0)
    tokens_T = np.full(num_tokens + num_padding, padding_token, np.int64)
    np.concatenate([np.zeros(0, np.int32), *_pieces_of(store, runs)], out=tokens_T[:num_tokens])
    # Every run counts on from its first position, padding from 0.
    positions_T = np.arange(num_tokens + num_padding)
    positions_T[:num_tokens] -= np.repeat(runs.start_U - runs.position_U, runs.length_U)
    positions_T[num_tokens:] -= num_tokens
    segments = _segments_of(runs)
    if num_padding:
        segments.append(Segment(num_tokens, num_tokens + num_padding))
    scored_N, following_N, response_N, place_N = _scored_of(runs, score_prompts)
    responses_R = store.responses_of(numbers_G)
    return MicroBatch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(positions_T),
        segments=tuple(segments),
        scored_N=torch.from_numpy(scored_N),
        targets_N=torch.from_numpy(tokens_T[following_N]),
        response_N=torch.from_numpy(response_N),
        place_N=torch.from_numpy(place_N),
        num_completion_tokens_R=torch.from_numpy(runs.length_U[runs.response_U]),
        last_R=torch.from_numpy((runs.start_U + runs.length_U - 1)[runs.response_U]),
        group_R=torch.from_numpy(runs.group_R),
        rows=tuple(numbers_G.tolist()),
        places=tuple(range(len(numbers_G))) if places is None else tuple(int(place) for place in places),
        num_padding=num_padding,
        numbers={name: torch.from_numpy(np.asarray(number_R)[responses_R]) for name, number_R in store.numbers.items()},
    )


@dataclass(frozen=True)
class _Runs:
    """The prompts and responses of a stream in their order, each a run of tokens.

    Attributes:
        source_U: int64, where its tokens begin in the store.
        length_U, start_U: int64, its tokens, and where they begin in the stream.
        position_U: int64, the position id of its first token.
        response_U: int64 [R], which runs are responses.
        prompt_R: int64, the run that is each response's prompt.
        group_R: int64, the group of each response.
        shared_R: bool, whether its prompt serves the whole group.
    """

    source_U: IntArray
    length_U: IntArray
    start_U: IntArray
    position_U: IntArray
    response_U: IntArray
    prompt_R: IntArray
    group_R: IntArray
    shared_R: npt.NDArray[np.bool_]


def _runs_of(store: GroupStore, numbers_G: IntArray, share_prompts: bool) -> _Runs:
    # Plain arrays: indexing a memory map makes another memory map, which takes longer than the reading.
    offsets_S, segments_G = np.asarray(store.columns.segment_offsets_S), np.asarray(store.columns.group_segments_G)
    first_G = segments_G[numbers_G]
    num_prompts_G = np.asarray(store.columns.num_prompts_G)[numbers_G].astype(np.int64)
    num_responses_G = segments_G[numbers_G + 1] - first_G - num_prompts_G
    shared_G = (num_prompts_G == 1) & share_prompts
    # [prompt, response 1, …, response K] of a group that shares, else [prompt, response 1, prompt, response 2, …].
    num_runs_G = np.where(shared_G, 1, num_responses_G) + num_responses_G
    before_G = np.cumsum(num_runs_G) - num_runs_G
    group_R = np.repeat(np.arange(len(numbers_G)), num_responses_G)
    within_R, shared_R = _counted(num_responses_G), shared_G[group_R]
    response_U = before_G[group_R] + np.where(shared_R, within_R, 2 * within_R) + 1
    prompt_R = np.where(shared_R, before_G[group_R], response_U - 1)
    segment_U = np.empty(int(num_runs_G.sum()), np.int64)
    segment_U[prompt_R] = first_G[group_R] + np.where(num_prompts_G[group_R] > 1, within_R, 0)
    segment_U[response_U] = (first_G + num_prompts_G)[group_R] + within_R
    source_U = offsets_S[segment_U]
    length_U = offsets_S[segment_U + 1] - source_U
    position_U = np.zeros_like(length_U)
    position_U[response_U] = length_U[prompt_R]
    start_U = np.cumsum(length_U) - length_U
    return _Runs(source_U, length_U, start_U, position_U, response_U, prompt_R, group_R, shared_R)


def _pieces_of(store: GroupStore, runs: _Runs) -> list[npt.NDArray[np.int32]]:
    """The stream's tokens as views of the store: runs that follow each other there too are one."""
    ends_U = runs.source_U + runs.length_U
    tokens_T, is_break_U = np.asarray(store.columns.tokens_T), runs.source_U[1:] != ends_U[:-1]
    starts = runs.source_U[:1].tolist() + runs.source_U[1:][is_break_U].tolist()
    ends = ends_U[:-1][is_break_U].tolist() + ends_U[-1:].tolist()
    return [tokens_T[start:end] for start, end in zip(starts, ends, strict=True)]


def _segments_of(runs: _Runs) -> list[Segment]:
    """A shared prompt (unless it is empty) and its responses apart; a prompt of its own together with its response."""
    end_U = runs.start_U + runs.length_U
    starts = np.where(runs.shared_R, runs.start_U[runs.response_U], runs.start_U[runs.prompt_R])
    prompt_starts = np.where(runs.shared_R, runs.start_U[runs.prompt_R], 0)
    prompt_ends = np.where(runs.shared_R, end_U[runs.prompt_R], 0)
    table = np.stack([starts, end_U[runs.response_U], prompt_starts, prompt_ends], axis=1).tolist()
    segments, prompt_of_last = [], -1
    for (start, end, prompt_start, prompt_end), shared, prompt in zip(
        table, runs.shared_R.tolist(), runs.prompt_R.tolist(), strict=True
    ):
        if shared and prompt != prompt_of_last and prompt_end > prompt_start:
            segments.append(Segment(prompt_start, prompt_end))
        segments.append(Segment(start, end, prompt_start, prompt_end))
        prompt_of_last = prompt
    return segments


def _scored_of(runs: _Runs, score_prompts: bool) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Four int64 [N]: the positions that are read, where in the stream their targets stand, and these's response and place.

    Nothing stands before the first token of a sequence, so that one has no log-prob (as in TRL).
    """
    lengths_R, prompts_R = runs.length_U[runs.response_U], runs.length_U[runs.prompt_R]
    without_R = (prompts_R == 0).astype(np.int64)
    starts, lengths = runs.start_U[runs.response_U] + without_R, lengths_R - without_R
    responses, places = np.arange(len(lengths)), 1 + without_R
    if score_prompts:  # what is read of the first response's prompt goes before what is read of that response
        is_first_R = np.diff(runs.group_R, prepend=-1) > 0
        num_read_R = np.where(is_first_R, np.maximum(prompts_R - 1, 0), 0)
        starts = np.stack([runs.start_U[runs.prompt_R] + 1, starts], axis=1).ravel()
        lengths = np.stack([num_read_R, lengths], axis=1).ravel()
        responses = np.repeat(responses, 2)
        places = np.stack([np.zeros_like(places), places], axis=1).ravel()
    begins = np.cumsum(lengths) - lengths
    count_N = np.arange(int(lengths.sum()))
    following_N = count_N - np.repeat(begins - starts, lengths)
    place_N = count_N - np.repeat(begins - places, lengths)
    response_N = np.repeat(responses, lengths)
    scored_N = following_N - 1
    if score_prompts:
        place_N[np.repeat(places == 0, lengths)] = 0
        begins = begins[1::2]
    # A shared prompt's end is read for every response: it does not stand right before all of them.
    prompted_R = prompts_R > 0
    scored_N[begins[prompted_R]] = (runs.start_U + runs.length_U - 1)[runs.prompt_R[prompted_R]]
    return scored_N, following_N, response_N, place_N


def _counted(lengths: IntArray) -> IntArray:
    """0, 1, …, length - 1 for each length, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
