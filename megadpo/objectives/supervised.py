"""The supervised loss, alone (SFT) or added to a preference loss: on the chosen, best, desirable or only response."""

from __future__ import annotations

import torch
from torch import Tensor

from megadpo.objectives.terms import Normalisers, Responses


def sft(responses: Responses, normalisers: Normalisers) -> Tensor:
    """Every unit's part of the mean negative log-prob over all supervised completion tokens of the global batch: [U].

    Supervised is the first response of a group, unless it is labelled undesirable; the others add 0.
    """
    s = responses.statistics
    supervised_R = torch.zeros_like(s.token_logps_R)
    supervised_R[s.first_G] = (s.label_R[s.first_G] > 0).to(supervised_R.dtype)
    share = normalisers.num_units / max(1, normalisers.num_chosen_tokens)
    return responses.of_units(-share * supervised_R * s.token_logps_R)
