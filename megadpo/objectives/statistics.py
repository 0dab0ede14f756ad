"""What an objective and the metrics know of the responses of a micro-batch: a few numbers a response, no tokens.

Legend of the axis suffixes: R = the responses of all groups at hand, P = the preference pairs among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.data.micro_batch import MicroBatch

RESPONSE_SUMS = ("logps", "token_logps", "prompt_logps", "entropy", "correct", "mean_logit", "log_square")
"""Columns of `response_sums`; the first three are `DIFFERENTIABLE`."""

DIFFERENTIABLE = ("logps_R", "token_logps_R", "prompt_logps_R")
"""What an objective can be differentiated with respect to, in the order of `response_sums`' first columns."""


@dataclass(frozen=True)
class ResponseStatistics:
    """Sums over the scored completion tokens of every response, and which responses form pairs.

    "Scored" means: every token of the completion that has a predecessor in the stream, the end-of-sequence token included.

    Attributes:
        logps_R: float, sum of the policy's log-probs, LD-DPO's token weights included where they are on.
        reference_logps_R: float, the same under the reference (zeros where an objective needs no reference).
        num_tokens_R: float, number of scored completion tokens.
        entropy_R: float, sum over scored tokens of the entropy of the policy's next-token distribution, in nats.
        num_correct_R: float, number of scored tokens that are the policy's most likely next token.
        mean_logit_R: float, sum over scored tokens of the logits' mean over the unpadded vocabulary.
        weight_R: float, how much the response counts: 1, or 0 for one that only fills up a micro-batch.
        chosen_P: int64, each pair's chosen response as an index into R.
        rejected_P: int64, each pair's rejected response as an index into R.
        token_logps_R: float, plain sum of the policy's log-probs.
        prompt_logps_R: float, sum of the policy's log-probs of the prompt's tokens but the first; zero where prompts are
            not scored.
        log_square_R: float, sum over scored tokens of log sum_v p_v^2.
        num_completion_tokens_R: float, number of completion tokens, scored or not.
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
    token_logps_R: Tensor
    prompt_logps_R: Tensor
    log_square_R: Tensor
    num_completion_tokens_R: Tensor


def response_sums(token_statistics: Tensor, micro_batch: MicroBatch, ld_alpha: float | None = None) -> Tensor:
    """Sum the head's token statistics [1, N, S] over each response: [R, len(RESPONSE_SUMS)] in float64, differentiable.

    Thousands of log-probs are added up here: float64 keeps the sum exact to the rounding of its terms, so that it
    does not depend on how the tokens were laid out. Segment by segment, because scattered adds on a GPU are not
    reproducible, and step 0 promises margins of exactly zero.

    Args:
        ld_alpha: LD-DPO (arXiv:2409.06411): weight of a pair's completion tokens beyond its shorter answer; None: 1.
    """
    statistics_NS = token_statistics[0].double()
    in_completion_N = (micro_batch.place_N > 0).double()
    logp_N = statistics_NS[:, 0]
    weighted_N = logp_N * (in_completion_N if ld_alpha is None else _length_weights(micro_batch, ld_alpha))
    columns = [weighted_N, logp_N * in_completion_N, logp_N * (1 - in_completion_N)]
    terms_NS = torch.cat([torch.stack(columns, dim=-1), statistics_NS[:, 1:] * in_completion_N[:, None]], dim=-1)
    lengths_R = torch.bincount(micro_batch.response_N, minlength=micro_batch.num_responses)
    return torch.segment_reduce(terms_NS, "sum", lengths=lengths_R, axis=0, unsafe=True)


def _length_weights(micro_batch: MicroBatch, ld_alpha: float) -> Tensor:
    """1 up to the length that both answers of a pair have, `ld_alpha` beyond, 0 on prompts."""
    pairs_P2 = _num_scored(micro_batch).view(-1, 2)
    common_N = pairs_P2.amin(dim=1).repeat_interleave(2)[micro_batch.response_N]
    # Without a prompt the first token is not scored, and places begin at 2.
    first_N = micro_batch.num_completion_tokens_R - _num_scored(micro_batch)
    place_N = micro_batch.place_N - first_N[micro_batch.response_N]
    weights_N = torch.where(place_N <= common_N, 1.0, ld_alpha).double()
    return weights_N * (micro_batch.place_N > 0)


def _num_scored(micro_batch: MicroBatch) -> Tensor:
    """int64 [R]: scored completion tokens of each response."""
    scored_N = micro_batch.response_N[micro_batch.place_N > 0]
    return torch.bincount(scored_N, minlength=micro_batch.num_responses)


def pair_statistics(sums_RS: Tensor, reference_logps_R: Tensor | None, micro_batch: MicroBatch) -> ResponseStatistics:
    """Statistics of a micro-batch of pairs from the policy's response sums and the reference's log-probs.

    Args:
        sums_RS: float64, columns as in RESPONSE_SUMS.
        reference_logps_R: float64; None where there is no reference.
    """
    chosen_P = torch.arange(0, micro_batch.num_responses, 2, device=sums_RS.device)
    column = dict(zip(RESPONSE_SUMS, sums_RS.unbind(dim=-1), strict=True))
    return ResponseStatistics(
        logps_R=column["logps"],
        reference_logps_R=torch.zeros_like(column["logps"]) if reference_logps_R is None else reference_logps_R,
        num_tokens_R=_num_scored(micro_batch).double(),
        entropy_R=column["entropy"],
        num_correct_R=column["correct"],
        mean_logit_R=column["mean_logit"],
        weight_R=torch.ones_like(column["logps"]),
        chosen_P=chosen_P,
        rejected_P=chosen_P + 1,
        token_logps_R=column["token_logps"],
        prompt_logps_R=column["prompt_logps"],
        log_square_R=column["log_square"],
        num_completion_tokens_R=micro_batch.num_completion_tokens_R.double(),
    )
