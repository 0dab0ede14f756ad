"""Collates the groups of a step into the token streams of its micro-batches.

Axes as in data/batches/micro_batch.py: T tokens, N scored positions, R responses, G groups, S segments; and U runs (the
tokens of a prompt or a response in a stream). All arrays here are of all streams, concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.batches.micro_batch import MicroBatch, Segment
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore, offsets_of

IntArray = npt.NDArray[np.int64]


def collate_groups(
    groups: Sequence[Group],
    group_ids: Sequence[int],
    share_prompts: bool = True,
    multiple_of: int = 1,
    padding_token: int = 0,
    score_prompts: bool = False,
) -> MicroBatch:
    """One micro-batch of groups in memory, whose positions in the store are `group_ids`; arguments as of `collate_step`."""
    store, everything = GroupStore.of(groups), np.arange(len(groups))
    (micro_batch,) = collate_step(
        store, everything, [everything.tolist()], share_prompts, multiple_of, padding_token, score_prompts
    )
    return replace(micro_batch, group_ids=tuple(int(group_id) for group_id in group_ids))


def collate_step(
    store: GroupStore,
    group_ids: Sequence[int] | IntArray,
    members: Sequence[Sequence[int]],
    share_prompts: bool = True,
    multiple_of: int = 1,
    padding_token: int = 0,
    score_prompts: bool = False,
) -> list[MicroBatch]:
    """Collate a step's groups into micro-batches, each group as ``[prompt | response 1 | … | response K]``.

    Without `share_prompts`, or where a group's prompts differ, each response gets its own copy of its prompt.

    Args:
        group_ids: the groups' positions in the store.
        members: of each micro-batch, the positions of its groups among `group_ids`.
        score_prompts: read the log-probs of the first response's prompt too (all its tokens but the first).
        multiple_of: each stream's length is padded up to a multiple of it (sequence parallelism shards it evenly).
    """
    positions_G = np.array([position for positions in members for position in positions], np.int64)
    group_ids_G = np.asarray(group_ids, np.int64)[positions_G]
    # All streams at once, split at the end: numpy calls for a few groups each would take longer than their work.
    runs = _runs_of(store, group_ids_G, [len(positions) for positions in members], share_prompts)
    tokens_T = np.concatenate([np.zeros(0, np.int32), *_token_views(store, runs)]).astype(np.int64)
    positions_T = _ranges(runs.position_U, runs.length_U)
    segments_S4, segment_R = _segments_of(runs)
    scored_N, following_N, response_N, place_N, begin_R = _scored_of(runs, score_prompts)
    lengths_R = runs.length_U[runs.response_U]
    last_R = runs.start_U[runs.response_U] + lengths_R - 1
    responses_R = store.response_ids_of(group_ids_G)
    row_values_R = {name: np.asarray(values_R)[responses_R] for name, values_R in store.row_values.items()}
    offsets = (
        runs.offsets_G,
        runs.offsets_R,
        runs.offsets_T,
        runs.stream_offsets(begin_R, len(scored_N)),
        runs.stream_offsets(segment_R, len(segments_S4)),
    )
    micro_batches = []
    for positions, (begins, ends) in zip(members, pairwise(np.stack(offsets, axis=1).tolist()), strict=True):
        of_G, of_R, of_T, of_N, of_S = map(slice, begins, ends)
        segments = [Segment._make(bounds) for bounds in segments_S4[of_S].tolist()]
        num_padding = _num_padding(of_T.stop - of_T.start, multiple_of)
        stream_T = _padded(tokens_T[of_T], np.full(num_padding, padding_token))
        if num_padding:
            segments.append(Segment(len(stream_T) - num_padding, len(stream_T)))
        micro_batch = MicroBatch(
            tokens_T=torch.from_numpy(stream_T),
            positions_T=torch.from_numpy(_padded(positions_T[of_T], np.arange(num_padding))),
            segments=tuple(segments),
            scored_N=torch.from_numpy(scored_N[of_N]),
            targets_N=torch.from_numpy(stream_T[following_N[of_N]]),
            response_N=torch.from_numpy(response_N[of_N]),
            place_N=torch.from_numpy(place_N[of_N]),
            num_completion_tokens_R=torch.from_numpy(lengths_R[of_R]),
            last_R=torch.from_numpy(last_R[of_R]),
            group_R=torch.from_numpy(runs.group_R[of_R] - of_G.start),
            group_ids=tuple(group_ids_G[of_G].tolist()),
            batch_positions=tuple(positions),
            num_padding=num_padding,
            row_values={name: torch.from_numpy(values_R[of_R]) for name, values_R in row_values_R.items()},
        )
        micro_batches.append(micro_batch)
    return micro_batches


def _num_padding(num_tokens: int, multiple_of: int) -> int:
    """Padding tokens of a stream; a stream without any token is padded to `multiple_of`."""
    return -num_tokens % multiple_of if num_tokens else multiple_of


def _padded(values_T: IntArray, padding: IntArray) -> IntArray:
    return np.concatenate([values_T, padding]) if len(padding) else values_T


@dataclass(frozen=True)
class _Runs:
    """The prompts and responses of all streams, in their order in the streams.

    Attributes:
        source_U: int64, where the run's tokens begin in the store.
        length_U, start_U: int64, its number of tokens, and where they begin in its stream.
        position_U: int64, the position id of its first token.
        response_U: int64 [R], which runs are responses.
        prompt_R: int64, the run that is each response's prompt.
        group_R: int64, the group of each response, counted over all streams.
        shared_R: bool, whether the response's prompt is shared by the whole group.
        offsets_G, offsets_R, offsets_T: int64 [streams + 1], where each stream begins among the groups, responses and tokens
            of all streams; the last is their number.
    """

    source_U: IntArray
    length_U: IntArray
    start_U: IntArray
    position_U: IntArray
    response_U: IntArray
    prompt_R: IntArray
    group_R: IntArray
    shared_R: npt.NDArray[np.bool_]
    offsets_G: IntArray
    offsets_R: IntArray
    offsets_T: IntArray

    def stream_offsets(self, begin_R: IntArray, end: int) -> IntArray:
        """int64 [streams + 1]: where each stream begins in an array of `end` items, given where each response does."""
        return np.append(begin_R, end)[self.offsets_R]

    @property
    def is_first_R(self) -> npt.NDArray[np.bool_]:
        """bool [R]: whether it is the first response of its group."""
        return np.diff(self.group_R, prepend=-1) > 0


def _runs_of(store: GroupStore, group_ids_G: IntArray, num_groups: Sequence[int], share_prompts: bool) -> _Runs:
    # Plain arrays: indexing a memory map makes another memory map, which takes longer than the reading.
    offsets_S, segments_G = np.asarray(store.columns.segment_offsets_S), np.asarray(store.columns.group_segments_G)
    first_G = segments_G[group_ids_G]
    num_prompts_G = np.asarray(store.columns.num_prompts_G)[group_ids_G].astype(np.int64)
    num_responses_G = segments_G[group_ids_G + 1] - first_G - num_prompts_G
    shared_G = (num_prompts_G == 1) & share_prompts
    # [prompt, response 1, …, response K] of a group that shares, else [prompt, response 1, prompt, response 2, …].
    num_runs_G = np.where(shared_G, 1, num_responses_G) + num_responses_G
    before_G = np.cumsum(num_runs_G) - num_runs_G
    group_R = np.repeat(np.arange(len(group_ids_G)), num_responses_G)
    within_R, shared_R = _ranges(np.zeros_like(num_responses_G), num_responses_G), shared_G[group_R]
    response_U = before_G[group_R] + np.where(shared_R, within_R, 2 * within_R) + 1
    prompt_R = np.where(shared_R, before_G[group_R], response_U - 1)
    segment_U = np.empty(int(num_runs_G.sum()), np.int64)
    segment_U[prompt_R] = first_G[group_R] + np.where(num_prompts_G[group_R] > 1, within_R, 0)
    segment_U[response_U] = (first_G + num_prompts_G)[group_R] + within_R
    source_U = offsets_S[segment_U]
    length_U = offsets_S[segment_U + 1] - source_U
    position_U = np.zeros_like(length_U)
    position_U[response_U] = length_U[prompt_R]
    offsets_G, before_U = offsets_of(num_groups), offsets_of(length_U)
    offsets_U = offsets_of(num_runs_G)[offsets_G]
    offsets_T = before_U[offsets_U]
    start_U = before_U[:-1] - np.repeat(offsets_T[:-1], np.diff(offsets_U))
    offsets_R = offsets_of(num_responses_G)[offsets_G]
    return _Runs(
        source_U, length_U, start_U, position_U, response_U, prompt_R, group_R, shared_R, offsets_G, offsets_R, offsets_T
    )


def _token_views(store: GroupStore, runs: _Runs) -> list[npt.NDArray[np.int32]]:
    """The tokens of all streams as views of the store; runs that are adjacent in the store share a view."""
    ends_U = runs.source_U + runs.length_U
    tokens_T, is_break_U = np.asarray(store.columns.tokens_T), runs.source_U[1:] != ends_U[:-1]
    starts = runs.source_U[:1].tolist() + runs.source_U[1:][is_break_U].tolist()
    ends = ends_U[:-1][is_break_U].tolist() + ends_U[-1:].tolist()
    return [tokens_T[start:end] for start, end in zip(starts, ends, strict=True)]


def _segments_of(runs: _Runs) -> tuple[IntArray, IntArray]:
    """The segments of all streams, int64 [S, 4] (the fields of `Segment`), and each response's first segment, int64 [R].

    A shared prompt (unless it is empty) is a segment, and so is each of its responses; an unshared prompt is one segment
    together with its response.
    """
    end_U, shared_R = runs.start_U + runs.length_U, runs.shared_R
    prompts_R2 = np.stack([runs.start_U[runs.prompt_R], end_U[runs.prompt_R]], axis=1)
    has_prompt_R = runs.is_first_R & shared_R & (prompts_R2[:, 1] > prompts_R2[:, 0])
    segment_R = np.arange(len(shared_R)) + np.cumsum(has_prompt_R)
    bounds_S4 = np.zeros((len(shared_R) + int(has_prompt_R.sum()), 4), np.int64)
    bounds_S4[segment_R[has_prompt_R] - 1, :2] = prompts_R2[has_prompt_R]
    bounds_S4[segment_R, 0] = np.where(shared_R, runs.start_U[runs.response_U], prompts_R2[:, 0])
    bounds_S4[segment_R, 1] = end_U[runs.response_U]
    bounds_S4[segment_R, 2:] = prompts_R2 * shared_R[:, None]
    return bounds_S4, segment_R - has_prompt_R


def _scored_of(runs: _Runs, score_prompts: bool) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """The scored positions of all streams.

    The first token of a sequence is predicted by nothing, so it has no log-prob (as in TRL).

    Returns:
        Four int64 [N]: the scored positions, the positions of their targets, and the targets' responses, each counted in
        its stream; the targets' places in their completion (`MicroBatch.place_N`). And int64 [R]: where each response's
        scored positions begin.
    """
    lengths_R, prompts_R = runs.length_U[runs.response_U], runs.length_U[runs.prompt_R]
    without_R = (prompts_R == 0).astype(np.int64)
    starts, lengths = runs.start_U[runs.response_U] + without_R, lengths_R - without_R
    responses = np.arange(len(lengths)) - np.repeat(runs.offsets_R[:-1], np.diff(runs.offsets_R))
    places = 1 + without_R
    if score_prompts:  # the prompt's scored positions come before those of the first response
        num_read_R = np.where(runs.is_first_R, np.maximum(prompts_R - 1, 0), 0)
        starts = np.stack([runs.start_U[runs.prompt_R] + 1, starts], axis=1).ravel()
        lengths = np.stack([num_read_R, lengths], axis=1).ravel()
        responses = np.repeat(responses, 2)
        places = np.stack([np.zeros_like(places), places], axis=1).ravel()
    begins = np.cumsum(lengths) - lengths
    following_N, place_N = _ranges(starts, lengths), _ranges(places, lengths)
    response_N = np.repeat(responses, lengths)
    scored_N = following_N - 1
    begin_R = answer_R = begins
    if score_prompts:
        place_N[np.repeat(places == 0, lengths)] = 0
        begin_R, answer_R = begins[::2], begins[1::2]
    # A response's first token is predicted by its prompt's last one, which is not the token before it where it is shared.
    prompted_R = prompts_R > 0
    scored_N[answer_R[prompted_R]] = (runs.start_U + runs.length_U - 1)[runs.prompt_R[prompted_R]]
    return scored_N, following_N, response_N, place_N, begin_R


def _ranges(firsts: IntArray, lengths: IntArray) -> IntArray:
    """int64: the ranges first, first + 1, …, first + length - 1 of all firsts and lengths, concatenated."""
    offsets = offsets_of(lengths)
    counted = np.arange(offsets[-1])
    counted += np.repeat(firsts - offsets[:-1], lengths)
    return counted
