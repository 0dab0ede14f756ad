"""Log-probs, or rewards, of every response of a data set under a frozen model, in any layout: no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from megadpo.console.activity import activity
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.model.build import Stage
from megadpo.objectives.statistics import RESPONSE_SUMS
from megadpo.parallel.context import is_first_rank_of_stage, local_micro_batches
from megadpo.pipeline.megatron_schedule import MegatronSchedule
from megadpo.platform.device import compute_device

GROUPS_AT_ONCE = 1024
"""Groups packed together; the results of one lot are gathered before the next begins."""


def response_logps(
    stage: Stage,
    packing: PackedDataset,
    ld_alpha: float | None = None,
    statistic: str = "logps",
    telling: str = "scoring",
) -> Iterator[tuple[range, np.ndarray]]:
    """Sequence log-probs of all groups, lot by lot, on every rank: (group ids, float64 of each of their responses).

    Args:
        statistic: another one of `RESPONSE_SUMS` in their place: "reward" with a reward model.
        telling: what this is called while it goes on.
    """
    column = RESPONSE_SUMS.index(statistic)
    for model in stage.models:
        model.eval()
    num_groups = len(packing.groups)
    with activity(telling, num_groups, "rows") as scoring:
        for start in range(0, num_groups, GROUPS_AT_ONCE):
            group_ids = range(start, min(start + GROUPS_AT_ONCE, num_groups))
            micro_batches = local_micro_batches(packing, list(group_ids))
            sums = MegatronSchedule().forward_only(stage.models, micro_batches, ld_alpha)
            first, end = packing.groups.response_offsets_G[[group_ids.start, group_ids.stop]]
            logps_R = torch.zeros(end - first, dtype=torch.float64, device=compute_device())
            if is_first_rank_of_stage():
                for micro_batch, sums_RS in zip(micro_batches, sums, strict=False):
                    places_R = torch.from_numpy(packing.groups.response_ids_of(micro_batch.group_ids) - first)
                    logps_R[places_R.to(logps_R.device)] = sums_RS[:, column]
            # One rank of each replica brings each value; the others add zeros.
            dist.all_reduce(logps_R)
            scoring.advance(len(group_ids))
            yield group_ids, logps_R.cpu().numpy()
