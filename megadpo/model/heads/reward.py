"""The scalar head of a reward model: one number a response, read at its last token.

Axes: T stream tokens, R responses of the micro-batch, H hidden, S columns of the response sums.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.heads.base import StreamHead
from megadpo.objectives.statistics import RESPONSE_SUMS


class RewardHead(StreamHead):
    """GPTModel's output layer of a reward model: hidden [T, 1, H] -> rewards [R, 1, 1], float32.

    Under context parallelism a reward is zero on the ranks that do not hold the response's last token.

    Every tensor rank holds the whole head and computes every reward, so each has the whole gradient already: nothing is
    summed over the tensor ranks on the way back.
    """

    def __init__(self, weight: torch.nn.Parameter, padding_token: int | None, sequence_parallel: bool) -> None:
        """`weight` is [1, H]; `padding_token` is the config's pad_token_id, see `reward_positions`."""
        super().__init__()
        self.weight = weight
        self.padding_token = padding_token
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor, weight: None = None, **unused: Any) -> tuple[Tensor, None]:
        assert weight is None, "a scalar head is tied to no embedding"
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        micro_batch = self.micro_batch
        places_R, shard = reward_positions(micro_batch, self.padding_token), micro_batch.shard
        if shard is not None:
            places_R = shard.order[places_R] - shard.first
            is_held_R = (places_R >= 0) & (places_R < len(shard.tokens_T))
            places_R = places_R.where(is_held_R, 0)
        last_RH = hidden.squeeze(1).index_select(0, places_R)
        rewards_R1 = last_RH.float() @ self.weight.float().t()
        if shard is not None:
            rewards_R1 = rewards_R1 * is_held_R[:, None]
        return rewards_R1.unsqueeze(1), None


def reward_positions(micro_batch: MicroBatch, padding_token: int | None) -> Tensor:
    """int64 [R]: the stream position of each response's last token that is no padding token.

    transformers reads the reward of prompt + response there and nowhere else (GenericForSequenceClassification), so an
    end-of-sequence token that is also the padding token is passed over. Of padding tokens alone it reads the first.
    """
    if padding_token is None:
        return micro_batch.last_R
    tokens_T = micro_batch.tokens_T
    bounds = [(segment.start, segment.end, segment.prompt_start, segment.prompt_end) for segment in micro_batch.segments]
    bounds_S4 = torch.tensor(bounds, dtype=torch.int64, device=tokens_T.device)
    segment_R = torch.searchsorted(bounds_S4[:, 1].contiguous(), micro_batch.last_R + 1)
    start_R, end_R, prompt_start_R, prompt_end_R = bounds_S4[segment_R].unbind(dim=1)
    places_T = torch.arange(len(tokens_T), device=tokens_T.device)
    latest_T = torch.where(tokens_T == padding_token, -1, places_T).cummax(0).values
    has_prompt_R = prompt_end_R > prompt_start_R
    in_prompt_R = latest_T[(prompt_end_R - 1).clamp(min=0)]
    first_R = torch.where(has_prompt_R, prompt_start_R, start_R)
    before_R = torch.where(has_prompt_R & (in_prompt_R >= prompt_start_R), in_prompt_R, first_R)
    in_segment_R = latest_T[end_R - 1]
    return torch.where(in_segment_R >= start_R, in_segment_R, before_R)


def reward_sums(output: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The head's output [1, R, 1] as response sums [R, S], float64, differentiable: zeros but for the column "reward"."""
    rewards_R1 = output[0].double()
    assert len(rewards_R1) == micro_batch.num_responses
    column = RESPONSE_SUMS.index("reward")
    return torch.nn.functional.pad(rewards_R1, (column, len(RESPONSE_SUMS) - column - 1))
