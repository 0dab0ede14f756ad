"""Packs a step's groups into micro-batches and deals them to the data-parallel ranks. Pure and deterministic."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np
import numpy.typing as npt

from megadpo.data.store import GroupStore
from megadpo.errors import UserError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_MAX_LEVEL_ROUNDS = 2000


def plan_micro_batches(
    num_tokens: npt.ArrayLike,
    costs: npt.ArrayLike,
    tokens_per_micro_batch: int,
    num_data_parallel: int,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Pack the groups of a step: no micro-batch above its capacity, all ranks with the same number of near-equal work.

    The number of micro-batches is that of best-fit-decreasing, rounded up to a multiple of the ranks (and, on each rank,
    of `multiple_of`). The groups are then spread over that many by cost; where the capacity does not allow it, best-fit's
    own bins are levelled.

    Args:
        num_tokens: int [N], tokens of each group in the stream.
        costs: float [N], work of each group (see `group_costs`).
        tokens_per_micro_batch: the capacity.
        num_data_parallel: number of data-parallel ranks.
        multiple_of: what each rank's number of micro-batches must be a multiple of.

    Returns:
        [rank][micro-batch] -> positions among the N groups, ascending. A micro-batch is empty only where there are
        fewer groups than micro-batches.

    Raises:
        UserError: for a group above the capacity.
    """
    tokens_N = np.asarray(num_tokens, np.int64)
    costs_N = np.asarray(costs, np.float64)
    assert tokens_N.shape == costs_N.shape and tokens_N.ndim == 1 and num_data_parallel >= 1
    check_groups_fit(tokens_N, None, tokens_per_micro_batch)
    packed = _best_fit_decreasing(tokens_N, tokens_per_micro_batch)
    unit = num_data_parallel * multiple_of
    num_bins = max(-(-len(packed) // unit), 1) * unit
    bins = _spread_by_cost(tokens_N, costs_N, tokens_per_micro_batch, num_bins)
    if bins is None:
        bins = packed + [[] for _ in range(num_bins - len(packed))]
    _level(bins, tokens_N, costs_N, tokens_per_micro_batch)
    return _deal(bins, costs_N, num_data_parallel)


def check_groups_fit(
    num_tokens: npt.ArrayLike,
    rows: npt.ArrayLike | None,
    tokens_per_micro_batch: int,
    setting: str = "train.tokens_per_micro_batch",
) -> None:
    """Refuse groups that no micro-batch holds; call it on all groups before training.

    Args:
        num_tokens: int [N], tokens of each group in the stream.
        rows: int [N], their rows; None to name positions instead.
        tokens_per_micro_batch: the capacity.
        setting: the configuration key to name.

    Raises:
        UserError: naming the longest group.
    """
    tokens_N = np.asarray(num_tokens, np.int64)
    too_long = int((tokens_N > tokens_per_micro_batch).sum())
    if not too_long:
        return
    worst = int(tokens_N.argmax())
    row = worst if rows is None else int(np.asarray(rows)[worst])
    others = f" ({too_long} rows are too long)" if too_long > 1 else ""
    raise UserError(
        f"row {row} has {tokens_N[worst]} tokens, more than {setting} = {tokens_per_micro_batch}{others}; "
        f"raise {setting} to at least {tokens_N[worst]}, or lower data.max_length"
    )


def group_costs(groups: GroupStore, share_prompts: bool, hidden_size: int) -> FloatArray:
    """Work of each group, in tokens' worth of dense layers: tokens + attention's query-key pairs / (6 x hidden_size).

    A token costs about 24 x hidden_size^2 in a layer's projections and MLP, a query-key pair 4 x hidden_size.

    Returns:
        float64 [G].
    """
    pairs_G = attention_pairs(groups, share_prompts)
    return groups.num_tokens(share_prompts) + pairs_G / (6.0 * hidden_size)


def attention_pairs(groups: GroupStore, share_prompts: bool) -> FloatArray:
    """float64 [G]: query-key pairs of a group's causal attention: responses see their prompt and themselves."""
    columns = groups.columns
    lengths_S = groups.segment_lengths().astype(np.float64)
    first_G = np.asarray(columns.group_segments_G[:-1])
    group_of_S = np.repeat(np.arange(len(groups)), np.diff(columns.group_segments_G))
    within_S = np.arange(len(lengths_S)) - first_G[group_of_S]
    num_prompts_S = np.asarray(columns.num_prompts_G)[group_of_S]
    is_response_S = within_S >= num_prompts_S
    prompt_of_S = first_G[group_of_S] + np.where(num_prompts_S > 1, within_S - num_prompts_S, 0)
    prompt_S = np.where(is_response_S, lengths_S[np.where(is_response_S, prompt_of_S, 0)], 0.0)
    pairs_S = lengths_S * (lengths_S + 1) / 2 + lengths_S * prompt_S
    num_copies_S = np.ones_like(lengths_S)
    if not share_prompts:
        num_responses_G = np.diff(columns.group_segments_G) - columns.num_prompts_G
        alone_S = ~is_response_S & (num_prompts_S == 1)
        num_copies_S[alone_S] = num_responses_G[group_of_S[alone_S]]
    return np.bincount(group_of_S, pairs_S * num_copies_S, minlength=len(groups)).astype(np.float64)


def _best_fit_decreasing(tokens_N: IntArray, capacity: int) -> list[list[int]]:
    """Each group, longest first, into the fullest bin that still has room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for position in np.argsort(-tokens_N, kind="stable").tolist():
        need = int(tokens_N[position])
        found = bisect_left(room, (need, -1))
        if found < len(room):
            free, number = room.pop(found)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(position)
        insort(room, (free - need, number))
    return bins


def _spread_by_cost(tokens_N: IntArray, costs_N: FloatArray, capacity: int, num_bins: int) -> list[list[int]] | None:
    """Each group, costliest first, into the cheapest bin with room; None where one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    bin_costs, free = np.zeros(num_bins), np.full(num_bins, capacity, np.int64)
    for position in np.argsort(-costs_N, kind="stable").tolist():
        allowed = np.where(free >= tokens_N[position], bin_costs, np.inf)
        number = int(allowed.argmin())
        if not np.isfinite(allowed[number]):
            return None
        bins[number].append(position)
        bin_costs[number] += costs_N[position]
        free[number] -= tokens_N[position]
    return bins


def _level(bins: list[list[int]], tokens_N: IntArray, costs_N: FloatArray, capacity: int) -> None:
    """Move groups from costly bins to cheap ones with room while the larger cost falls; empty bins are filled first."""
    bin_costs = np.array([costs_N[members].sum() for members in bins])
    free = np.array([capacity - tokens_N[members].sum() for members in bins])
    for _ in range(_MAX_LEVEL_ROUNDS):
        move = _best_move(bins, bin_costs, free, tokens_N, costs_N)
        if move is None:
            return
        position, giver, taker = move
        bins[giver].remove(position)
        bins[taker].append(position)
        for number, sign in ((giver, -1), (taker, 1)):
            bin_costs[number] += sign * costs_N[position]
            free[number] -= sign * tokens_N[position]


def _best_move(
    bins: list[list[int]], bin_costs: FloatArray, free: Any, tokens_N: IntArray, costs_N: FloatArray
) -> tuple[int, int, int] | None:
    """(group, from, to) that brings the costliest bin with several groups nearest to the cheapest one that has room."""
    taker = int(bin_costs.argmin())
    givers = np.argsort(-bin_costs, kind="stable")[:8].tolist()
    if not bins[taker]:
        givers = [number for number in np.argsort(-bin_costs, kind="stable").tolist() if len(bins[number]) > 1][:1]
    for giver in givers:
        if giver == taker or len(bins[giver]) < 2:
            continue
        gap = bin_costs[giver] - bin_costs[taker]
        fitting = [p for p in bins[giver] if tokens_N[p] <= free[taker] and (costs_N[p] < gap or not bins[taker])]
        if fitting:
            best = min(fitting, key=lambda p: (abs(gap - 2 * costs_N[p]), p))
            return best, giver, taker
    return None


def _deal(bins: list[list[int]], costs_N: FloatArray, num_ranks: int) -> list[list[list[int]]]:
    """The k-th costliest `num_ranks` bins are the ranks' k-th micro-batches, the costliest for the idlest rank."""
    by_cost = sorted(bins, key=lambda members: (-costs_N[members].sum(), members))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(by_cost), num_ranks):
        idlest_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, members in zip(idlest_first, by_cost[start : start + num_ranks], strict=True):
            ranks[rank].append(sorted(members))
            totals[rank] += float(costs_N[members].sum())
    return ranks
