"""How long the answers of a step are, in tokens: known from the data, the same on every rank.

Axes: N the groups at hand, R their responses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megadpo.data.store import GroupStore, offsets_of


def answer_lengths(groups: GroupStore, group_ids: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean tokens of chosen and rejected answers and of prompts, as metrics; of lists and labels as `logps/…` are.

    What a batch has none of has no metric.
    """
    columns = groups.columns
    first_N = np.asarray(columns.group_segments_G)[group_ids]
    begins_N = first_N + np.asarray(columns.num_prompts_G)[group_ids]
    counts_N = np.asarray(columns.group_segments_G)[group_ids + 1] - begins_N
    offsets_N = offsets_of(counts_N)
    segments_R = np.arange(offsets_N[-1]) + np.repeat(begins_N - offsets_N[:-1], counts_N)
    ends = columns.segment_offsets_S
    lengths_R = np.asarray(ends[segments_R + 1] - ends[segments_R], np.float64)
    label_R = groups.row_values.get("label")
    if label_R is not None:
        is_chosen_R = label_R[groups.response_ids_of(group_ids)] > 0
        sides = {"chosen": lengths_R[is_chosen_R], "rejected": lengths_R[~is_chosen_R]}
    else:
        chosen_N = lengths_R[offsets_N[:-1]]
        have_others_N = counts_N > 1
        others_N = (np.add.reduceat(lengths_R, offsets_N[:-1]) - chosen_N)[have_others_N] / (counts_N[have_others_N] - 1)
        sides = {"chosen": chosen_N, "rejected": others_N}
    sides["prompt"] = np.asarray(ends[first_N + 1] - ends[first_N], np.float64)
    return {f"lengths/{side}": float(values.mean()) for side, values in sides.items() if len(values)}
