"""A data set that can be packed: from the groups of a step to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megadpo.data.batches.bin_packing import FloatArray, IntArray, check_groups_fit, group_costs, pack_micro_batches
from megadpo.data.batches.collate import collate_step
from megadpo.data.batches.halves import with_halves
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore


@dataclass(frozen=True)
class PackingOptions:
    """How groups become micro-batches.

    Attributes:
        tokens_per_micro_batch: the most tokens of a micro-batch's stream.
        hidden_size: of the model; weighs attention against the dense layers in a group's cost.
        share_prompts: whether a prompt stands once for all of its responses.
        score_prompts: whether the log-probs of prompts are read too.
        split_pairs: whether micro-batches, whose groups are pairs, are split into halves (see data/batches/halves.py).
        num_data_parallel: replicas of the model.
        stream_multiple: every stream's length is padded up to a multiple of it.
        micro_batches_multiple_of: each replica's number of micro-batches is a multiple of it.
        head_work: cost of one scored token in the head, in units of one token's cost in the dense layers.
        max_length: the most tokens of a prompt and a response, for `PackedDataset.mismatched`; None: no limit.
        setting: the configuration key of `tokens_per_micro_batch`, for error messages.
    """

    tokens_per_micro_batch: int
    hidden_size: int
    share_prompts: bool = True
    score_prompts: bool = False
    split_pairs: bool = False
    num_data_parallel: int = 1
    stream_multiple: int = 1
    micro_batches_multiple_of: int = 1
    head_work: float = 0.0
    max_length: int | None = None
    setting: str = "train.tokens_per_micro_batch"


@dataclass(frozen=True)
class PackedDataset:
    """Groups, each measured once, and the options by which they are packed. Made by `PackedDataset.of`.

    Attributes:
        num_tokens_G: int64, stream tokens of each group.
        costs_G: float64, work of each group (see `group_costs`).
    """

    groups: GroupStore
    options: PackingOptions
    num_tokens_G: IntArray
    costs_G: FloatArray

    @staticmethod
    def of(groups: GroupStore, options: PackingOptions) -> PackedDataset:
        """The data set of `groups`.

        Raises:
            UserError: a group is longer than `options.tokens_per_micro_batch`.
        """
        num_tokens_G = groups.num_tokens(options.share_prompts)
        check_groups_fit(num_tokens_G, groups.rows, options.tokens_per_micro_batch, options.setting)
        costs_G = group_costs(groups, options.share_prompts, options.hidden_size, options.head_work, options.score_prompts)
        return PackedDataset(groups, options, num_tokens_G, costs_G)

    def micro_batches(self, group_ids: Sequence[int] | IntArray, data_rank: int) -> list[MicroBatch]:
        """The micro-batches that replica `data_rank` computes in a step with the groups `group_ids`, on the CPU.

        Every replica gets the same number of micro-batches and near-equal work. Where there are fewer groups than
        micro-batches, some micro-batches hold padding only, which adds nothing to any sum.
        """
        options = self.options
        micro_batches = collate_step(
            self.groups,
            np.asarray(group_ids, np.int64),
            self.bins(group_ids)[data_rank],
            options.share_prompts,
            options.stream_multiple,
            score_prompts=options.score_prompts,
        )
        if options.split_pairs:
            return [with_halves(micro_batch, options.stream_multiple) for micro_batch in micro_batches]
        return micro_batches

    def bins(self, group_ids: Sequence[int] | IntArray) -> list[list[list[int]]]:
        """[replica][micro-batch] -> positions among `group_ids` of the groups that go through the model together."""
        step_ids = np.asarray(group_ids, np.int64)
        return pack_micro_batches(
            self.num_tokens_G[step_ids],
            self.costs_G[step_ids],
            self.options.tokens_per_micro_batch,
            self.options.num_data_parallel,
            self.options.micro_batches_multiple_of,
        )

    def mismatched(self, group_ids: Sequence[int] | IntArray) -> PackedDataset:
        """KTO's mismatched answers: each group's prompt, followed by the first response of the group before it.

        The first prompt is followed by the last group's response; a single group keeps its own. Responses are cut to
        `options.max_length` tokens with their prompt, to one token at least.
        """
        step_groups = [self.groups[int(group_id)] for group_id in group_ids]
        groups = []
        for position, group in enumerate(step_groups):
            prompt, response = group.prompts[0], step_groups[position - 1].responses[0]
            max_length = self.options.max_length
            num_kept = None if max_length is None else max(max_length - len(prompt), 1)
            groups.append(Group((prompt,), (response[:num_kept],), group.row))
        options = replace(self.options, score_prompts=False, split_pairs=False, setting="train.tokens_per_micro_batch")
        return PackedDataset.of(GroupStore.of(groups), options)
