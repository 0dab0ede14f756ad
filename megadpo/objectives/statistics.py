"""What an objective and the metrics know of the responses of a micro-batch: a few numbers a response, no tokens.

Legend of the axis suffixes: R = the responses of all groups at hand, P = the preference pairs among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.data.micro_batch import MicroBatch


@dataclass(frozen=True)
class ResponseStatistics:
    """Sums over the scored completion tokens of every response, and which responses form pairs.

    "Scored" means: every token of the completion that has a predecessor in the stream, the end-of-sequence token included.

    Attributes:
        logps_R: float, sum of the policy's log-probs; the leaf that an objective differentiates with respect to.
        reference_logps_R: float, the same under the reference (zeros where an objective needs no reference).
        num_tokens_R: float, number of scored completion tokens.
        entropy_R: float, sum over scored tokens of the entropy of the policy's next-token distribution, in nats.
        num_correct_R: float, number of scored tokens that are the policy's most likely next token.
        mean_logit_R: float, sum over scored tokens of the logits' mean over the unpadded vocabulary.
        weight_R: float, how much the response counts: 1, or 0 for one that only fills up a micro-batch.
        chosen_P: int64, each pair's chosen response as an index into R.
        rejected_P: int64, each pair's rejected response as an index into R.
    """

    logps_R: Tensor
    reference_logps_R: Tensor
    num_tokens_R: Tensor
    entropy_R: Tensor
    num_correct_R: Tensor
    mean_logit_R: Tensor
    weight_R: Tensor
    chosen_P: Tensor
    rejected_P: Tensor


def response_sums(token_statistics: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Sum the head's token statistics [1, N, S] over each response: [R, S] in float64, differentiable.

    Thousands of log-probs are added up here: float64 keeps the sum exact to the rounding of its terms, so that it
    does not depend on how the tokens were laid out. Segment by segment, because scattered adds on a GPU are not
    reproducible, and step 0 promises margins of exactly zero.
    """
    lengths_R = torch.bincount(micro_batch.response_N, minlength=micro_batch.num_responses)
    return torch.segment_reduce(token_statistics[0].double(), "sum", lengths=lengths_R, axis=0, unsafe=True)


def pair_statistics(sums_RS: Tensor, reference_logps_R: Tensor, micro_batch: MicroBatch) -> ResponseStatistics:
    """Statistics of a micro-batch of pairs from the policy's response sums and the reference's log-probs.

    Args:
        sums_RS: float64, columns as in megadpo.model.head.TOKEN_STATISTICS, summed over each response.
        reference_logps_R: float64.
    """
    num_scored_R = torch.bincount(micro_batch.response_N, minlength=micro_batch.num_responses)
    chosen_P = torch.arange(0, micro_batch.num_responses, 2, device=sums_RS.device)
    return ResponseStatistics(
        logps_R=sums_RS[:, 0],
        reference_logps_R=reference_logps_R,
        num_tokens_R=num_scored_R.double(),
        entropy_R=sums_RS[:, 1],
        num_correct_R=sums_RS[:, 2],
        mean_logit_R=sums_RS[:, 3],
        weight_R=torch.ones_like(sums_RS[:, 0]),
        chosen_P=chosen_P,
        rejected_P=chosen_P + 1,
    )
