"""What ranks tell each other arrives as it was, whatever its size."""

from __future__ import annotations

import os
from typing import Any

from tests.helpers.worlds import run_world

VALUES: list[Any] = [None, {"name": "é" * 5000, "pieces": [1, 2.5, float("inf")]}, [], "x"]


def _tell() -> list[list[Any]]:
    import torch.distributed as dist

    from megadpo.parallel.messages import gathered

    dist.init_process_group("gloo")
    own = VALUES[int(os.environ["RANK"])]
    pairs = [dist.new_group([0, 1]), dist.new_group([2])]
    found = [gathered(own), gathered(own, pairs[dist.get_rank() // 2])]
    dist.destroy_process_group()
    return found


def test_every_rank_hears_what_each_said_in_their_order() -> None:
    for rank, (everybody, near) in enumerate(run_world(3, _tell)):
        assert everybody == VALUES[:3]
        assert near == (VALUES[:2] if rank < 2 else VALUES[2:3])
