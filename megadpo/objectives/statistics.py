"""Statistics of the responses of a micro-batch, a few numbers each: all that objectives and metrics read of it.

Legend of the axis suffixes: R = the responses of all groups at hand, G = those groups, P = preference pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch, counted

RESPONSE_SUMS = ("logps", "token_logps", "prompt_logps", "reward", "entropy", "correct", "mean_logit", "log_square")
"""Columns of `response_sums`; the first four are `DIFFERENTIABLE`, the others are the log-prob head's
`TOKEN_STATISTICS` (model/heads/logprob.py) from the second on, in the same order."""

DIFFERENTIABLE = ("logps_R", "token_logps_R", "prompt_logps_R", "reward_R")
"""What an objective can be differentiated with respect to, in the order of `response_sums`' first columns."""

GIVEN = {
    "score": ("given_score_R", 0.0),
    "label": ("label_R", 1.0),
    "weight": ("row_weight_R", 1.0),
    "margin": ("margin_R", 0.0),
    "label_probability": ("label_probability_R", 1.0),
}
"""What rows may say of their responses (`Group.row_values`): the statistic, and what it is where they do not."""


@dataclass(frozen=True)
class ResponseStatistics:
    """Sums over the scored completion tokens of every response, and what its row says of it.

    "Scored" means: every token of the completion that has a predecessor in the stream, the end-of-sequence token included.

    Attributes:
        logps_R: float, sum of the policy's log-probs, LD-DPO's token weights included where they are on.
        reference_logps_R: float, the same under the reference (zeros where an objective needs no reference).
        num_tokens_R: float, number of scored completion tokens.
        entropy_R: float, sum over scored tokens of the entropy of the policy's next-token distribution, in nats.
        num_correct_R: float, number of scored tokens that are the policy's most likely next token.
        mean_logit_R: float, sum over scored tokens of the logits' mean over the unpadded vocabulary.
        first_G: int64, each group's first response as an index into R; a group's responses follow each other, the best one
            first where they are ranked.
        token_logps_R: float, plain sum of the policy's log-probs.
        prompt_logps_R: float, sum of the policy's log-probs of the prompt's tokens but the first; zero where prompts are
            not scored.
        log_square_R: float, sum over scored tokens of log sum_v p_v^2.
        num_completion_tokens_R: float, number of completion tokens, scored or not.
        reward_R: float, what the scalar head of a reward model gives for the response; zero without one.
        given_score_R: float, the row's score of the response; 0 where rows have none or none is read.
        label_R: float, 1 for a desirable response, 0 for an undesirable one.
        row_weight_R: float, what the row's loss is multiplied by.
        margin_R: float, by how much the pair's chosen response is better, in the loss's logits.
        label_probability_R: float, probability that the pair's chosen response is the better one.
    """

    logps_R: Tensor
    reference_logps_R: Tensor
    num_tokens_R: Tensor
    entropy_R: Tensor
    num_correct_R: Tensor
    mean_logit_R: Tensor
    first_G: Tensor
    token_logps_R: Tensor
    prompt_logps_R: Tensor
    log_square_R: Tensor
    num_completion_tokens_R: Tensor
    reward_R: Tensor
    given_score_R: Tensor
    label_R: Tensor
    row_weight_R: Tensor
    margin_R: Tensor
    label_probability_R: Tensor

    @property
    def chosen_P(self) -> Tensor:
        """int64, each pair's chosen response as an index into R."""
        return self.first_G

    @property
    def rejected_P(self) -> Tensor:
        """int64, each pair's rejected response as an index into R."""
        return self.first_G + 1

    @property
    def num_responses_G(self) -> Tensor:
        """int64, responses of each group."""
        end = self.first_G.new_full((1,), len(self.logps_R))
        return torch.diff(self.first_G, append=end)


def response_sums(token_statistics: Tensor, micro_batch: MicroBatch, ld_alpha: float | None = None) -> Tensor:
    """Sum the log-prob head's output [1, N, S] over each response: [R, len(RESPONSE_SUMS)] in float64, differentiable.

    Thousands of log-probs are added up here: float64 keeps the sum exact to the rounding of its terms, so that it
    does not depend on how the tokens were laid out. Response by response (their scored positions follow each other), because
    scattered adds on a GPU are not reproducible, and step 0 promises margins of exactly zero.

    Args:
        ld_alpha: LD-DPO (arXiv:2409.06411): weight of a pair's completion tokens beyond its shorter answer; None: 1.
    """
    statistics_NS = token_statistics[0].double()
    in_completion_N = (micro_batch.place_N > 0).double()
    logp_N = statistics_NS[:, 0]
    weighted_N = logp_N * (in_completion_N if ld_alpha is None else _length_weights(micro_batch, ld_alpha))
    columns = [weighted_N, logp_N * in_completion_N, logp_N * (1 - in_completion_N), torch.zeros_like(logp_N)]
    terms_NS = torch.cat([torch.stack(columns, dim=-1), statistics_NS[:, 1:] * in_completion_N[:, None]], dim=-1)
    lengths_R = counted(micro_batch.response_N, micro_batch.num_responses)
    return torch.segment_reduce(terms_NS, "sum", lengths=lengths_R, axis=0, unsafe=True)


def _length_weights(micro_batch: MicroBatch, ld_alpha: float) -> Tensor:
    """1 up to the length that both answers of a pair have, `ld_alpha` beyond, 0 on prompts."""
    pairs_P2 = _num_scored(micro_batch).view(-1, 2)
    common_N = pairs_P2.amin(dim=1).repeat_interleave(2)[micro_batch.response_N]
    # Without a prompt the first token is not scored, and places begin at 2.
    first_N = micro_batch.num_completion_tokens_R - _num_scored(micro_batch)
    place_N = micro_batch.place_N - first_N[micro_batch.response_N]
    weights_N = torch.ones_like(place_N, dtype=torch.float64).masked_fill_(place_N > common_N, ld_alpha)
    return weights_N * (micro_batch.place_N > 0)


def _num_scored(micro_batch: MicroBatch) -> Tensor:
    """int64 [R]: scored completion tokens of each response."""
    return counted(micro_batch.response_N, micro_batch.num_responses, micro_batch.place_N > 0)


def response_statistics(sums_RS: Tensor, reference_logps_R: Tensor | None, micro_batch: MicroBatch) -> ResponseStatistics:
    """Statistics of a micro-batch from the policy's response sums and the reference's log-probs.

    Args:
        sums_RS: float64, columns as in RESPONSE_SUMS.
        reference_logps_R: float64; None where there is no reference.
    """
    column = dict(zip(RESPONSE_SUMS, sums_RS.unbind(dim=-1), strict=True))
    given = {
        statistic: micro_batch.row_values.get(name, torch.full_like(column["logps"], default))
        for name, (statistic, default) in GIVEN.items()
    }
    return ResponseStatistics(
        logps_R=column["logps"],
        reference_logps_R=torch.zeros_like(column["logps"]) if reference_logps_R is None else reference_logps_R,
        num_tokens_R=_num_scored(micro_batch).double(),
        entropy_R=column["entropy"],
        num_correct_R=column["correct"],
        mean_logit_R=column["mean_logit"],
        first_G=micro_batch.first_G,
        token_logps_R=column["token_logps"],
        prompt_logps_R=column["prompt_logps"],
        log_square_R=column["log_square"],
        num_completion_tokens_R=micro_batch.num_completion_tokens_R.double(),
        reward_R=column["reward"],
        **given,
    )
