"""Values whose heads have another dimension than those of queries and keys (multi-head latent attention, arXiv:2405.04434),
for kernels that know one dimension only.

Axes: T and S rows, A and K heads, D head dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def of_one_dim(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with D the larger one of the two: zeros after a query and a key leave their product as it is, and zeros
    after a value give zeros after an output."""
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:
        return query, key, F.pad(value, (0, missing))
    if missing < 0:
        return F.pad(query, (0, -missing)), F.pad(key, (0, -missing)), value
    return query, key, value


def cut_to(output: Tensor, value_dim: int) -> Tensor:
    """An output without what `of_one_dim` has added to its values; itself where that was nothing."""
    return output if output.shape[-1] == value_dim else output[..., :value_dim]
