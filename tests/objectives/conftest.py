"""Statistics of made-up pairs."""

from __future__ import annotations

import torch

from megadpo.objectives.statistics import ResponseStatistics


def random_statistics(num_pairs: int, seed: int = 0) -> ResponseStatistics:
    """Pairs with plausible log-probs and lengths; float64."""
    generator = torch.Generator().manual_seed(seed)
    num_responses = 2 * num_pairs

    def random(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(num_responses, generator=generator, dtype=torch.float64)

    lengths = torch.randint(3, 40, (num_responses,), generator=generator).double()
    logps = -1.5 * lengths + random(2.0)
    chosen = torch.arange(0, num_responses, 2)
    ones = torch.ones(num_responses, dtype=torch.float64)
    return ResponseStatistics(
        logps_R=logps,
        reference_logps_R=logps + random(3.0),
        num_tokens_R=lengths,
        entropy_R=ones,
        num_correct_R=ones,
        mean_logit_R=ones,
        weight_R=ones,
        chosen_P=chosen,
        rejected_P=chosen + 1,
        token_logps_R=logps + random(0.1),
        prompt_logps_R=-30 + random(2.0),
        log_square_R=-0.5 * lengths + random(0.5),
        num_completion_tokens_R=lengths + 1,
    )
