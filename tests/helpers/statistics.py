"""Statistics of made-up responses."""

from __future__ import annotations

import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives import evaluate as production
from megadpo.objectives.evaluate import Evaluated
from megadpo.objectives.objective import Objective
from megadpo.objectives.statistics import ResponseStatistics
from megadpo.objectives.terms import Normalisers


def evaluate(statistics: ResponseStatistics, normalisers: Normalisers, options: ObjectiveConfig) -> Evaluated:
    """The value at `statistics` of the objective that `options` describe."""
    return production.evaluate(statistics, normalisers, Objective.of(options))


def random_statistics(num_groups: int, seed: int = 0, size: int = 2, numbers: bool = False) -> ResponseStatistics:
    """Groups of `size` responses with plausible log-probs and lengths, scores best first and labels of both sorts; float64.

    With `numbers` their rows have weights, margins and label probabilities too.
    """
    generator = torch.Generator().manual_seed(seed)
    num_responses = size * num_groups

    def random(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(num_responses, generator=generator, dtype=torch.float64)

    lengths = torch.randint(3, 40, (num_responses,), generator=generator).double()
    logps = -1.5 * lengths + random(2.0)
    places, ones = torch.arange(num_responses), torch.ones(num_responses, dtype=torch.float64)
    of_rows = torch.rand(3, num_responses // size, generator=generator, dtype=torch.float64).repeat_interleave(size, dim=1)
    return ResponseStatistics(
        logps_R=logps,
        reference_logps_R=logps + random(3.0),
        num_tokens_R=lengths,
        entropy_R=ones,
        num_correct_R=ones,
        mean_logit_R=ones,
        first_G=torch.arange(0, num_responses, size),
        token_logps_R=logps + random(0.1),
        prompt_logps_R=-30 + random(2.0),
        log_square_R=-0.5 * lengths + random(0.5),
        num_completion_tokens_R=lengths + 1,
        reward_R=random(),
        given_score_R=(places.flip(0) % size).double() + 0.3 * of_rows[0],
        label_R=(places % 3 != 1).double() if size == 1 else (places % size == 0).double(),
        row_weight_R=of_rows[0] + 0.5 if numbers else ones,
        margin_R=of_rows[1] if numbers else 0 * ones,
        label_probability_R=0.5 + of_rows[2] / 2 if numbers else ones,
    )
