"""An objective of your own: one function from pairs to one loss a pair. Used by

    megadpo train run.yaml objective.loss_type=custom objective.module=examples/custom_objective.py:squared_hinge

It may read whatever `Pairs` has (log-ratios, per-token means, lengths, the scaled margin with its options) and must be
differentiable in the policy's log-probs. It sees some of the global batch's pairs at a time, so that pair i's loss must not
depend on pair j; dividing by the number of pairs is not its business. It never sees a process group: what it computes is
the same in every layout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megadpo.objectives.terms import Normalisers, Pairs


def squared_hinge(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """max(0, 1 - h)^2, h = beta times the difference of log-ratios: [P]."""
    return F.relu(1 - pairs.scaled_margin_P) ** 2
