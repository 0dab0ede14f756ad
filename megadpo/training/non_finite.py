"""What is not finite is found where it began, and never published.

Every function here is collective, and comes to the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.checkpoint.finite import FiniteWatch, is_finite
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.store import GroupStore
from megadpo.engine.base import Engine
from megadpo.errors import UserError
from megadpo.model.build import Stage
from megadpo.model.families import ParameterShard
from megadpo.parallel.messages import gathered
from megadpo.parallel.zero3 import own_part, place_of_own_part
from megadpo.platform.device import compute_device

if TYPE_CHECKING:
    from megadpo.training.step import StepResult

MOST_ROWS_NAMED = 5

Part = tuple[str, ParameterShard, int, Tensor]
"""What a rank keeps itself of a tensor: kind, shard, first element in the flattened shard, values."""


def cause(engine: Engine, groups: GroupStore, result: StepResult) -> str:
    """Of a step whose loss or gradient norm is not finite: what began it and on which rank, as a sentence's beginning.

    Weights come first, then the log-probs of the reference and of the policy, with their rows, then the gradients.
    """
    here = {
        "weights": _tensor_here(own_weights(engine.stage)),
        "reference": _rows_here(groups, result.micro_batches, result.reference_logps),
        "policy": _rows_here(groups, result.micro_batches, [sums_RS[:, 0] for sums_RS in result.response_sums]),
        "gradient": _tensor_here(engine.own_gradients()),
    }
    everywhere = gathered(here)
    for kind, words in (
        ("weights", "the {} are not finite"),
        ("reference", "the reference's log-probs of {} are not finite"),
        ("policy", "the model's log-probs of {} are not finite"),
        ("gradient", "the {} is the first that is not finite"),
    ):
        ranks = [rank for rank, found in enumerate(everywhere) if found[kind]]
        if ranks:
            what = everywhere[ranks[0]][kind]
            if kind in ("reference", "policy"):
                what = described_rows(sorted({row for rank in ranks for row in everywhere[rank][kind]}))
            return f"; {words.format(what)} on rank {ranks[0]}"
    return ""


def require_finite(
    watch: FiniteWatch, own: Iterable[Part], what: str, abandon: Callable[[], None], advice: Callable[[], str]
) -> None:
    """Refuse to publish what `watch` has seen on any rank, where it is not finite.

    Args:
        own: this rank's parts of it, which are looked at one by one where `watch` has a suspicion.
        abandon: removes what has been written; called on rank 0.
        advice: the end of the sentence.

    Raises:
        UserError: on every rank: the tensor, and the rank whose part of it is not finite.
    """
    is_suspect = torch.tensor(float(watch.suspect() is not None), device=compute_device())
    dist.all_reduce(is_suspect, dist.ReduceOp.MAX)
    if not is_suspect:
        return
    found = gathered(_tensor_here(own))
    ranks = [rank for rank, name in enumerate(found) if name]
    if not ranks:
        return  # the sum of large numbers was too large, not one of them
    if dist.get_rank() == 0:
        abandon()
    dist.barrier()
    raise UserError(f"{what}: the {found[ranks[0]]} are not finite on rank {ranks[0]}, so nothing was written; {advice()}")


def own_weights(stage: Stage, kind: str = "weights") -> Iterator[Part]:
    """This rank's parts of the weights that a stage computes with."""
    for parameter, shard in stage.parameters.values():
        part = own_part(parameter).reshape(-1)
        start = part.numel() * place_of_own_part(parameter)
        yield kind, shard, start, part[: max(0, math.prod(shard.shape) - start)]  # without padding


def require_finite_logps(
    groups: GroupStore,
    responses: Sequence[int] | npt.NDArray[np.int64],
    logps_R: npt.NDArray[np.float64],
    setting: str = "reference.path",
    what: str = "log-probs",
) -> None:
    """Refuse log-probs that are not finite, before anybody keeps them; every rank has the same.

    Args:
        responses: their ids in `groups`.
        setting: the option that names the model.
        what: they are.

    Raises:
        UserError: naming the rows.
    """
    bad = ~np.isfinite(logps_R)
    if bad.any():
        group_ids = np.searchsorted(groups.response_offsets_G, np.asarray(responses)[bad], side="right") - 1
        rows = described_rows(sorted({int(groups.rows[group_id]) for group_id in group_ids}))
        raise UserError(
            f"{setting}: the {what} of {rows} are not finite, so they were not kept; look at these rows and at the "
            f"{'reference' if setting == 'reference.path' else 'model'}'s weights"
        )


def described_rows(rows: Sequence[int]) -> str:
    """ "rows 3, 7 (counted from 0 over all files of the data)", the first few of them."""
    named = ", ".join(map(str, rows[:MOST_ROWS_NAMED]))
    more = f" and {len(rows) - MOST_ROWS_NAMED} more" if len(rows) > MOST_ROWS_NAMED else ""
    return f"{'rows' if len(rows) > 1 else 'row'} {named}{more} (counted from 0 over all files of the data)"


def _rows_here(groups: GroupStore, micro_batches: Sequence[MicroBatch], logps: Iterable[Tensor | None]) -> list[int]:
    """The rows of responses whose log-probs are not finite on this rank."""
    rows: set[int] = set()
    for micro_batch, logps_R in zip(micro_batches, logps, strict=False):  # none on stages without the head
        if logps_R is not None and not is_finite(logps_R):
            bad_groups = micro_batch.group_R[~torch.isfinite(logps_R)].tolist()
            rows |= {int(groups.rows[micro_batch.group_ids[group]]) for group in bad_groups}
    return sorted(rows)


def _tensor_here(own: Iterable[Part]) -> str | None:
    """The first tensor of which this rank's own part is not finite: kind and Hugging Face name."""
    for kind, shard, start, values in own:
        if not is_finite(values):
            first = start + int((~torch.isfinite(values.reshape(-1))).nonzero()[0])
            return f"{kind} of {_logical_name(shard, first)}"
    return None


def _logical_name(shard: ParameterShard, element: int) -> str:
    """The Hugging Face tensor that an element of the flattened shard belongs to."""
    place = np.unravel_index(element, shard.shape)
    for piece in shard.pieces:
        if piece.local_start <= place[piece.dim] < piece.local_start + piece.length:
            return piece.logical_name
    return shard.name
