"""Options that do not fit the data of a run: refused here, once its groups are tokenised and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megadpo.errors import UserError
from megadpo.objectives.specs import measures_kl

if TYPE_CHECKING:
    import numpy.typing as npt

    from megadpo.config.schema import Config
    from megadpo.data.store import GroupStore
    from megadpo.model.frequencies import ByLength
    from megadpo.model.shape import ModelShape


def check_steps_can_fill(config: Config, num_tokens_G: npt.NDArray[np.int64], samples_per_epoch: int) -> None:
    """Refuse a multiple that no step reaches, and an epoch of less than two steps: nothing could be exchanged.

    Args:
        num_tokens_G: of each training group.

    Raises:
        UserError: naming `data.step_tokens_multiple_of`.
    """
    multiple, size = config.data.step_tokens_multiple_of, config.train.pairs_per_step
    if multiple is None:
        return
    mean = float(num_tokens_G.mean()) * size
    if mean < multiple:
        raise UserError(
            f"data.step_tokens_multiple_of is {multiple}, but a step of {size} pairs has {mean:.0f} tokens on average; "
            "lower it to at most that, raise train.pairs_per_step, or remove it"
        )
    if samples_per_epoch < 2 * size:
        raise UserError(
            f"data.step_tokens_multiple_of exchanges pairs between the steps of an epoch, but an epoch of "
            f"{samples_per_epoch} pairs has no two steps of {size}; remove it or lower train.pairs_per_step"
        )


def check_mismatched_fit(config: Config, groups: GroupStore) -> None:
    """KTO puts any prompt before any answer: the longest of these must fit, so that its KL never depends on packing.

    Raises:
        UserError: it is longer than a micro-batch.
    """
    if not measures_kl(config.objective.loss_types):
        return
    longest = groups.longest_mismatch()
    if config.data.max_length is not None:
        longest = min(longest, config.data.max_length)
    if longest > config.train.tokens_per_micro_batch:
        raise UserError(
            f"train.tokens_per_micro_batch is {config.train.tokens_per_micro_batch}, but kto may put a prompt before "
            f"another row's answer, {longest} tokens together; raise it or lower data.max_length"
        )


def check_shared_prompts(groups: GroupStore, shape: ModelShape) -> None:
    """Refuse prompts that the rope turns differently in the sequences that share them (rope.py says so of a stream).

    Raises:
        UserError: naming `data.share_prompts`, and how many there are.
    """
    ropes = {id(rope): rope for rope in shape.ropes if rope is not None and rope.by_length is not None}
    for rope in ropes.values():
        assert rope.by_length is not None
        num_groups = num_turned_differently(groups, rope.by_length)
        if num_groups:
            raise UserError(
                f"{num_groups} of {len(groups)} rows have responses with which their shared prompt is turned differently by "
                "the model's rope (rope_parameters: rope_type longrope or dynamic, by a sequence's length); set "
                "data.share_prompts to false, or data.max_length to the length up to which it is not"
            )


def num_turned_differently(groups: GroupStore, by_length: ByLength) -> int:
    """Groups with one prompt whose sequences, each with one of the responses, have not all the same frequencies."""
    columns = groups.columns
    starts_S, first_G = np.asarray(columns.segment_offsets_S), np.asarray(columns.group_segments_G)
    num_prompts_G = np.asarray(columns.num_prompts_G)
    lengths_S, num_segments_G = np.diff(starts_S), np.diff(first_G)
    shared_G = np.flatnonzero((num_prompts_G == 1) & (num_segments_G > 2))
    found = 0
    kinds: dict[int, int] = {}
    for group in shared_G:
        prompt, *responses = lengths_S[first_G[group] : first_G[group + 1]].tolist()
        of_group = {kinds.setdefault(length, by_length.kind(length)) for length in (prompt + each for each in responses)}
        found += len(of_group) > 1
    return found
