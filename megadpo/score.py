"""Log-probs of every response of a data set under one frozen model, in any layout: no gradients, no objective."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadpo.data.packing import Packing
from megadpo.model.build import Stage
from megadpo.parallel.schedule import forward_only
from megadpo.platform.device import compute_device

GROUPS_AT_ONCE = 1024
"""Groups packed together; the results of one lot are gathered before the next begins."""


def response_logps(stage: Stage, packing: Packing, ld_alpha: float | None = None) -> Iterator[tuple[range, np.ndarray]]:
    """Sequence log-probs of all groups, lot by lot, on every rank: (group numbers, float64 [groups of the lot, K]).

    Every group must have the same number K of responses.
    """
    stage.model.eval()
    num_groups, num_responses = len(packing.groups), len(packing.groups[0].responses)
    for start in range(0, num_groups, GROUPS_AT_ONCE):
        numbers = range(start, min(start + GROUPS_AT_ONCE, num_groups))
        lot = packing.micro_batches(list(numbers), parallel_state.get_data_parallel_rank())
        micro_batches = [micro_batch.to(compute_device()) for micro_batch in lot]
        sums = forward_only(stage.model, micro_batches, ld_alpha)
        logps_GK = torch.zeros(len(numbers), num_responses, dtype=torch.float64, device=compute_device())
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for micro_batch, sums_RS in zip(micro_batches, sums, strict=False):
                places = torch.tensor(micro_batch.rows, dtype=torch.int64, device=logps_GK.device) - start
                logps_GK[places] = sums_RS[:, 0].view(-1, num_responses)
        # One rank of each replica has each value; the others add zeros.
        dist.all_reduce(logps_GK)
        yield numbers, logps_GK.cpu().numpy()
