"""Bin packing: a step's groups into micro-batches, and these onto the data-parallel ranks. Pure and deterministic."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megadpo.data.store import GroupStore
from megadpo.errors import UserError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_MAX_BALANCING_ROUNDS = 2000
_BALANCED = 0.01  # spread of the micro-batches' costs, as a share of their mean, below which balancing stops
_MAX_FULL_BINS = 64  # bins without room that are tried before giving up
_MAX_SUBSET_SUMS = 20_000  # groups x bins up to which subset sums are computed, which then takes milliseconds


def pack_micro_batches(
    num_tokens: npt.ArrayLike,
    costs: npt.ArrayLike,
    tokens_per_micro_batch: int,
    num_data_parallel: int,
    multiple_of: int = 1,
) -> list[list[list[int]]]:
    """Pack the groups of a step into micro-batches within capacity: as many for each rank, of near-equal work.

    The number of micro-batches is that of best-fit-decreasing, rounded up to a multiple of the ranks (and, on each rank,
    of `multiple_of`); packing by subset sums is tried too where it could save some. The groups are then spread over that
    many bins by cost; where the capacity does not allow that, the costs of the packed bins are balanced.

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
    packed = best_fit_decreasing(tokens_N, tokens_per_micro_batch)
    unit = num_data_parallel * multiple_of
    num_bins = _round_up(len(packed), unit)
    fewest = _round_up(-(-int(tokens_N.sum()) // tokens_per_micro_batch), unit)
    if fewest < num_bins and len(tokens_N) * len(packed) <= _MAX_SUBSET_SUMS:
        tighter = pack_by_subset_sums(tokens_N, tokens_per_micro_batch)
        if len(tighter) < len(packed):
            packed, num_bins = tighter, _round_up(len(tighter), unit)
    bins = _spread_by_cost(tokens_N, costs_N, tokens_per_micro_batch, num_bins)
    if bins is None:
        bins = packed + [[] for _ in range(num_bins - len(packed))]
    _balance(bins, tokens_N, costs_N, tokens_per_micro_batch)
    return _assign_to_ranks(bins, costs_N, num_data_parallel)


def _round_up(num_bins: int, unit: int) -> int:
    return max(-(-num_bins // unit), 1) * unit


def check_groups_fit(
    num_tokens: npt.ArrayLike,
    rows: npt.ArrayLike | None,
    tokens_per_micro_batch: int,
    setting: str = "train.tokens_per_micro_batch",
) -> None:
    """Refuse groups that are longer than a micro-batch; call it on all groups before training.

    Args:
        num_tokens: int [N], tokens of each group in the stream.
        rows: int [N], their rows, which the message names; None: their positions.
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


def group_costs(
    groups: GroupStore, share_prompts: bool, hidden_size: int, head_work: float = 0.0, score_prompts: bool = False
) -> FloatArray:
    """Work of each group: its tokens, its scored positions, and attention's query-key pairs.

    The unit is the work of one token in the dense layers.
    A token costs about 24 x hidden_size^2 in a layer's projections and MLP, a query-key pair 4 x hidden_size.

    Args:
        head_work: work of one scored position in the head, in that unit.
        score_prompts: whether the tokens of prompts are scored too.

    Returns:
        float64 [G].
    """
    group_R, lengths_R, prompts_R = _response_lengths(groups)
    num_scored_R = lengths_R - (prompts_R == 0)
    if score_prompts:
        is_first_R = np.diff(group_R, prepend=-1) > 0
        num_scored_R = num_scored_R + np.where(is_first_R, np.maximum(prompts_R - 1, 0), 0)
    num_scored_G = np.bincount(group_R, num_scored_R, minlength=len(groups))
    pairs_G = attention_pairs(groups, share_prompts)
    return groups.num_tokens(share_prompts) + pairs_G / (6.0 * hidden_size) + head_work * num_scored_G


def attention_pairs(
    groups: GroupStore, share_prompts: bool, window: int | None = None, chunk: int | None = None
) -> FloatArray:
    """float64 [G]: query-key pairs of each group's causal attention; a response attends to its prompt and itself, of a
    layer with a window to that many of these tokens, of one with chunks to those of its chunk."""
    group_R, lengths_R, prompts_R = _response_lengths(groups)
    is_first_R = np.diff(group_R, prepend=-1) > 0
    shared_R = (groups.columns.num_prompts_G[group_R] == 1) & share_prompts
    to_prompt_R = _chunked_pairs(prompts_R, window, chunk)
    own_R = _chunked_pairs(prompts_R + lengths_R, window, chunk) - to_prompt_R
    of_prompt_R = np.where(is_first_R | ~shared_R, to_prompt_R, 0.0)
    return np.bincount(group_R, own_R + of_prompt_R, minlength=len(groups)).astype(np.float64)


def _chunked_pairs(lengths: IntArray, window: int | None, chunk: int | None) -> FloatArray:
    """Query-key pairs of sequences of these lengths, cut into chunks."""
    if chunk is None:
        return _causal_pairs(lengths, window)
    whole, rest = np.divmod(lengths, chunk)
    return whole * _causal_pairs(np.asarray(chunk), window) + _causal_pairs(rest, window)


def _causal_pairs(lengths: IntArray, window: int | None) -> FloatArray:
    """Query-key pairs of sequences of these lengths."""
    if window is None:
        return lengths * (lengths + 1) / 2
    inside = np.minimum(lengths, window)
    return inside * (inside + 1) / 2 + (lengths - inside) * float(window)


def _response_lengths(groups: GroupStore) -> tuple[IntArray, IntArray, IntArray]:
    """Of every response, int64 [R]: its group, its number of tokens, and its prompt's."""
    columns, lengths_S = groups.columns, groups.segment_lengths()
    num_prompts_G = np.asarray(columns.num_prompts_G, np.int64)
    group_R = np.repeat(np.arange(len(groups)), np.diff(groups.response_offsets_G))
    within_R = np.arange(len(group_R)) - groups.response_offsets_G[group_R]
    first_R = columns.group_segments_G[group_R]
    prompt_R = first_R + np.where(num_prompts_G[group_R] > 1, within_R, 0)
    return group_R, lengths_S[first_R + num_prompts_G[group_R] + within_R], lengths_S[prompt_R]


def best_fit_decreasing(tokens_N: IntArray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing: each group, longest first, into the fullest bin that still has room.

    A bit mask of the room that bins have finds the bin in one operation, and groups of equal length are placed together
    as long as they fit: a million groups take seconds.

    Returns:
        The bins, each a list of positions among the N groups.
    """
    order = np.argsort(-tokens_N, kind="stable")
    starts_L = np.flatnonzero(np.diff(tokens_N[order], prepend=-1))
    starts, lengths, order_list = starts_L.tolist(), tokens_N[order[starts_L]].tolist(), order.tolist()
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where by_room[r] has a bin
    for length, (start, end) in zip(lengths, pairwise([*starts, len(order_list)]), strict=True):
        while start < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                number = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
            else:
                room, number = capacity, len(bins)
                bins.append([])
            count = min(room // length, end - start) if length else end - start
            bins[number] += order_list[start : start + count]
            start += count
            room -= count * length
            by_room.setdefault(room, []).append(number)
            rooms |= 1 << room
    return bins


def pack_by_subset_sums(tokens_N: IntArray, capacity: int) -> list[list[int]]:
    """Fill one bin after the other: the longest group left, and the subset of the others that fills the bin best.

    Slower than best-fit-decreasing, and tighter. The possible sums are a bit mask: bit s is set where some of the groups
    add up to s. Returns bins as `best_fit_decreasing` does.
    """
    left = np.argsort(-tokens_N, kind="stable").tolist()
    tokens = tokens_N.tolist()
    bins = []
    while left:
        first, *others = left
        room = capacity - tokens[first]
        within = (1 << (room + 1)) - 1
        sums = [1]
        for position in others:
            sums.append((sums[-1] | sums[-1] << tokens[position]) & within)
        rest = sums[-1].bit_length() - 1
        chosen = [first]
        for place in range(len(others) - 1, -1, -1):
            # Longer groups are preferred: short ones fit more easily into later bins.
            if not sums[place] >> rest & 1:
                chosen.append(others[place])
                rest -= tokens[others[place]]
        bins.append(chosen)
        taken = set(chosen)
        left = [position for position in others if position not in taken]
    return bins


def _spread_by_cost(tokens_N: IntArray, costs_N: FloatArray, capacity: int, num_bins: int) -> list[list[int]] | None:
    """Each group, costliest first, into the cheapest bin with room; None where no bin has room for one."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [capacity] * num_bins
    cheapest = [(0.0, number) for number in range(num_bins)]
    tokens, costs = tokens_N.tolist(), costs_N.tolist()
    for position in np.argsort(-costs_N, kind="stable").tolist():
        full: list[tuple[float, int]] = []
        while cheapest and room[cheapest[0][1]] < tokens[position] and len(full) < _MAX_FULL_BINS:
            full.append(heapq.heappop(cheapest))
        if not cheapest or room[cheapest[0][1]] < tokens[position]:
            return None
        cost, number = cheapest[0]
        heapq.heapreplace(cheapest, (cost + costs[position], number))
        bins[number].append(position)
        room[number] -= tokens[position]
        for entry in full:
            heapq.heappush(cheapest, entry)
    return bins


def _balance(bins: list[list[int]], tokens_N: IntArray, costs_N: FloatArray, capacity: int) -> None:
    """Balance the bins' costs in place: move a group from a costly bin to the cheapest, or swap two, while that helps.

    Empty bins are filled first.
    """
    bin_costs = np.array([costs_N[members].sum() for members in bins])
    room = np.array([capacity - int(tokens_N[members].sum()) for members in bins])
    for _ in range(min(_MAX_BALANCING_ROUNDS, 8 * len(bins))):
        taker = int(bin_costs.argmin())
        if bins[taker] and bin_costs.max() - bin_costs[taker] <= _BALANCED * bin_costs.mean():
            return
        change = _best_move(bins, taker, bin_costs, room, tokens_N, costs_N)
        if change is None:
            return
        giver, given, taken = change
        for position, source, target in ((given, giver, taker), (taken, taker, giver)):
            if position is None:
                continue
            bins[source].remove(position)
            bins[target].append(position)
            for number, sign in ((source, -1), (target, 1)):
                bin_costs[number] += sign * costs_N[position]
                room[number] -= sign * tokens_N[position]


def _best_move(
    bins: list[list[int]], taker: int, bin_costs: FloatArray, room: IntArray, tokens_N: IntArray, costs_N: FloatArray
) -> tuple[int, int, int | None] | None:
    """The move (giver, group given, group taken back or None) that best balances a costly bin with the bin `taker`."""
    if not bins[taker]:
        givers = [number for number in np.argsort(-bin_costs, kind="stable").tolist() if len(bins[number]) > 1][:1]
    else:
        givers = np.argsort(-bin_costs, kind="stable")[:4].tolist()
    for giver in givers:
        gap = bin_costs[giver] - bin_costs[taker]
        if giver == taker or gap <= 0:
            continue
        given = np.sort(np.array(bins[giver]))
        # Against every group of the taker, and last against none at all.
        back_tokens = np.append(tokens_N[bins[taker]], 0)
        back_costs = np.append(costs_N[bins[taker]], 0.0)
        moved = costs_N[given][:, None] - back_costs
        growth = tokens_N[given][:, None] - back_tokens
        allowed = (growth <= room[taker]) & (-growth <= room[giver]) & (moved > 0) & (moved < gap)
        if not bins[taker]:
            allowed = growth <= room[taker]
        if len(given) < 2:
            allowed[:, -1] = False
        if allowed.any():
            best = int(np.where(allowed, np.abs(gap - 2 * moved), np.inf).argmin())
            row, column = divmod(best, len(back_costs))
            return giver, int(given[row]), None if column == len(back_costs) - 1 else bins[taker][column]
    return None


def _assign_to_ranks(bins: list[list[int]], costs_N: FloatArray, num_ranks: int) -> list[list[list[int]]]:
    """Assign bins to ranks in rounds of `num_ranks`, costliest first; in a round, the costliest to the least loaded rank."""
    by_cost = sorted((-float(costs_N[members].sum()), members) for members in bins)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(by_cost), num_ranks):
        idlest_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, (minus_cost, members) in zip(idlest_first, by_cost[start : start + num_ranks], strict=True):
            ranks[rank].append(sorted(members))
            totals[rank] -= minus_cost
    return ranks
