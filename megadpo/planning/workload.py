"""What a step has to compute: lengths of pairs, those of the data or assumed ones, and their micro-batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from megadpo.data.batches.bin_packing import FloatArray, IntArray, attention_pairs, group_costs, pack_micro_batches
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.attention.cpu_blocks import MAX_UNIT

NUM_PAIRS = 512
"""Pairs whose lengths are looked at: so many show it as well as all do."""
SPREAD_OF_PROMPTS, SPREAD_OF_RESPONSES = 0.9, 0.6
"""Of the logarithm of assumed lengths: as in UltraFeedback."""
ASSUMED_PROMPT, ASSUMED_RESPONSE = 110, 230
"""Median tokens that are assumed where no data is there: UltraFeedback's."""


@dataclass(frozen=True)
class Mix:
    """Means over pairs: tokens of a pair, and of its tokens the share that is scored, the query-key pairs of each, and the
    keys that attention's kernels read for each (a prompt's are copied for each answer)."""

    pair: float
    scored: float
    attended: float
    keys: float


@dataclass(frozen=True)
class MicroBatches:
    """A step's micro-batches as the package packs them.

    Attributes:
        count: of each replica.
        imbalance: work of the busiest replica, over the mean.
        tokens: of each micro-batch of the replica that has the largest one, in their order.
        mask_bytes: of the masks by which a CPU attends to the groups of such a micro-batch that are short, at most.
    """

    count: int
    imbalance: float
    tokens: tuple[int, ...]
    mask_bytes: float = 0.0

    def most_tokens(self, num_under_way: int) -> int:
        """The most tokens of so many micro-batches one after the other."""
        width = min(num_under_way, len(self.tokens))
        ends = np.cumsum([0, *self.tokens])
        return int((ends[width:] - ends[: len(ends) - width]).max())


@dataclass(frozen=True, eq=False)
class Workload:
    """Groups (pairs, mostly), each with what it takes.

    Attributes:
        tokens_G: int64, of each group's stream.
        costs_G: float64, its work as `group_costs` counts it.
        scored_G: float64, positions whose log-probs are read.
        attended_G: float64, query-key pairs.
        copied_G: float64, keys that a kernel for sequences reads.
        source: where the lengths come from, in words.
    """

    tokens_G: IntArray
    costs_G: FloatArray
    scored_G: FloatArray
    attended_G: FloatArray
    copied_G: FloatArray
    source: str

    @staticmethod
    def of(store: GroupStore, hidden_size: int, head_work: float, source: str, share_prompts: bool = True) -> Workload:
        """Of groups that are there."""
        lengths = [
            ([len(prompt) for prompt in group.prompts], [len(response) for response in group.responses]) for group in store
        ]
        copies = [
            sum(prompts) + sum(responses) + (prompts[0] * len(responses) if len(prompts) == 1 and share_prompts else 0)
            for prompts, responses in lengths
        ]
        return Workload(
            store.num_tokens(share_prompts),
            group_costs(store, share_prompts, hidden_size, head_work),
            np.array([float(sum(responses)) for _, responses in lengths]),
            attention_pairs(store, share_prompts),
            np.array(copies, np.float64),
            source,
        )

    @functools.cached_property
    def mix(self) -> Mix:
        """Means over the groups."""
        tokens = float(self.tokens_G.sum())
        return Mix(
            tokens / len(self.tokens_G),
            float(self.scored_G.sum()) / tokens,
            float(self.attended_G.sum()) / tokens,
            float(self.copied_G.sum()) / tokens,
        )

    @functools.cache  # noqa: B019 - a workload is made once and lives as long as its plans
    def packed(self, num_pairs: int, data: int, capacity: int, multiple_of: int) -> MicroBatches:
        """Of a step of so many pairs. Where these are many, half of them on half of the replicas stand for all, and so on.

        Raises:
            UserError: a group is longer than a micro-batch.
        """
        while num_pairs > NUM_PAIRS and num_pairs % 2 == data % 2 == 0:
            num_pairs, data = num_pairs // 2, data // 2
        chosen = np.arange(num_pairs) % len(self.tokens_G)
        tokens, costs = self.tokens_G[chosen], self.costs_G[chosen]
        ranks = pack_micro_batches(tokens, costs, capacity, data, multiple_of)
        of_ranks = [tuple(int(tokens[some].sum()) for some in rank) for rank in ranks]
        masks = max(float((tokens[some][tokens[some] <= MAX_UNIT] ** 2).sum()) for rank in ranks for some in rank)
        busiest = max(float(costs[[each for some in rank for each in some]].sum()) for rank in ranks)
        return MicroBatches(len(ranks[0]), busiest * data / float(costs.sum()), max(of_ranks, key=max), 4 * masks)


def assumed_groups(prompt: float, response: float, longest: int | None, num_pairs: int = NUM_PAIRS) -> list[Group]:
    """Pairs of zeros whose lengths have these medians, log-normal, cut as `data.max_length` would cut them."""
    random = np.random.default_rng(7)
    longest = longest or 1 << 20

    def lengths(median: float, spread: float) -> IntArray:
        return np.clip(random.lognormal(np.log(median), spread, num_pairs), 4, longest).astype(np.int64)

    prompts = np.minimum(lengths(prompt, SPREAD_OF_PROMPTS), max(1, longest * 3 // 4))
    first, second = (np.minimum(lengths(response, SPREAD_OF_RESPONSES), longest - prompts) for _ in range(2))
    return [_group(*sizes, row) for row, sizes in enumerate(zip(prompts, first, second, strict=True))]


def _group(prompt: int, first: int, second: int, row: int) -> Group:
    prompt_T, first_T, second_T = (np.zeros(size, np.int32) for size in (prompt, first, second))
    return Group((prompt_T,), (first_T, second_T), row)
