"""From the groups of a step to this rank's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megadpo.data.batches.bin_packing import FloatArray, IntArray, check_groups_fit, group_costs, plan_micro_batches
from megadpo.data.batches.collate import lay_out_step
from megadpo.data.batches.halves import with_halves
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore


@dataclass(frozen=True)
class Packing:
    """A data set with what is needed to pack any of its groups.

    Attributes:
        num_tokens_G: int64, stream tokens of each group.
        costs_G: float64, work of each group.
        hidden_size: of the model; weighs attention against the dense layers in the work.
        head_work: of a row of the head, in tokens' worth of dense layers.
        max_length: the most tokens of a prompt and an answer.
        score_prompts: whether the log-probs of prompts are read too.
        multiple_of: every stream's length is padded up to a multiple of it.
        micro_batches_multiple_of: so is the number of each replica's micro-batches.
        split_pairs: whether micro-batches travel in halves, see data/halves.py.
    """

    groups: GroupStore
    share_prompts: bool
    tokens_per_micro_batch: int
    num_data_parallel: int
    multiple_of: int
    num_tokens_G: IntArray
    costs_G: FloatArray
    hidden_size: int
    max_length: int | None = None
    score_prompts: bool = False
    micro_batches_multiple_of: int = 1
    head_work: float = 0.0
    split_pairs: bool = False

    def micro_batches(self, group_ids: Sequence[int] | IntArray, data_rank: int) -> list[MicroBatch]:
        """The micro-batches of replica `data_rank` out of a step with the groups `group_ids`, on the CPU.

        Every replica gets the same number of micro-batches and near-equal work. Where there are fewer groups than
        micro-batches, some are empty: padding only, which adds nothing to any sum.
        """
        chosen = np.asarray(group_ids, np.int64)
        plan = plan_micro_batches(
            self.num_tokens_G[chosen],
            self.costs_G[chosen],
            self.tokens_per_micro_batch,
            self.num_data_parallel,
            self.micro_batches_multiple_of,
        )
        laid_out = lay_out_step(
            self.groups,
            chosen,
            plan[data_rank],
            self.share_prompts,
            self.multiple_of,
            score_prompts=self.score_prompts,
        )
        return [with_halves(whole, self.multiple_of) for whole in laid_out] if self.split_pairs else laid_out

    def mismatched(self, group_ids: Sequence[int] | IntArray) -> Packing:
        """A data set of the groups `group_ids` in which each prompt stands before the first answer of the one before it.

        The first one gets the last one's answer. What is beyond `max_length` tokens is cut off the answer.
        A group alone stands as it is.
        """
        whole = [self.groups[int(number)] for number in group_ids]
        groups = []
        for place, group in enumerate(whole):
            prompt, answer = group.prompts[0], whole[place - 1].responses[0]
            length = None if self.max_length is None else max(self.max_length - len(prompt), 1)
            groups.append(Group((prompt,), (answer[:length],), group.row))
        return prepare_packing(
            GroupStore.of(groups),
            share_prompts=self.share_prompts,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            setting="train.tokens_per_micro_batch",
            num_data_parallel=self.num_data_parallel,
            multiple_of=self.multiple_of,
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            micro_batches_multiple_of=self.micro_batches_multiple_of,
            head_work=self.head_work,
        )


def prepare_packing(
    groups: GroupStore,
    *,
    share_prompts: bool,
    tokens_per_micro_batch: int,
    setting: str,
    num_data_parallel: int,
    multiple_of: int,
    hidden_size: int,
    max_length: int | None = None,
    score_prompts: bool = False,
    micro_batches_multiple_of: int = 1,
    head_work: float = 0.0,
    split_pairs: bool = False,
) -> Packing:
    """Measure every group once.

    Args:
        setting: the configuration key of `tokens_per_micro_batch`, for the message.
        score_prompts: whether the log-probs of prompts are read too.
        hidden_size, head_work: of the model; weigh attention and head against the dense layers in the work.
        max_length: the most tokens of a prompt and an answer, for `mismatched`.
        split_pairs: whether micro-batches, whose groups are pairs, travel in halves.

    Raises:
        UserError: a group is longer than `tokens_per_micro_batch`.
    """
    num_tokens_G = groups.num_tokens(share_prompts)
    check_groups_fit(num_tokens_G, groups.rows, tokens_per_micro_batch, setting)
    costs_G = group_costs(groups, share_prompts, hidden_size, head_work, score_prompts)
    return Packing(
        groups,
        share_prompts,
        tokens_per_micro_batch,
        num_data_parallel,
        multiple_of,
        num_tokens_G,
        costs_G,
        hidden_size,
        max_length,
        score_prompts,
        micro_batches_multiple_of,
        head_work,
        split_pairs,
    )
