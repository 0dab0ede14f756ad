"""What an objective and the metrics know of the responses of a micro-batch: a few numbers a response, no tokens.

Legend of the axis suffixes: R = the responses of all groups at hand, P = the preference pairs among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
