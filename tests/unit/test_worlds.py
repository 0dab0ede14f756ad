"""Worlds of the tests: their processes are used again, and what one world leaves changed is not there in the next one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.helpers.worlds import run_world


def _joined() -> tuple[int, str, float]:
    from megadpo.parallel.world import joined_world

    with joined_world(Layout(data=2), seed=1):
        total = torch.tensor([1.0 + torch.distributed.get_rank()])
        torch.distributed.all_reduce(total)
    return os.getpid(), os.environ["MASTER_PORT"], total.item()


def test_a_process_joins_one_world_after_another() -> None:
    worlds = [run_world(2, _joined) for _ in range(2)]
    pids, ports, totals = zip(*(answer for world in worlds for answer in world), strict=True)
    assert len(set(pids)) == 2 and len(set(ports)) == 2, "the same two processes met at two places"
    assert totals == (3.0,) * 4


def _careless(directory: str) -> tuple[int, Any]:
    seen = os.getcwd(), os.environ.get("LEFT"), random.random(), torch.rand(1).item(), torch.get_default_dtype()
    os.chdir(directory)
    os.environ["LEFT"] = "this"
    torch.set_default_dtype(torch.float64)
    return os.getpid(), seen


def test_what_belongs_to_the_process_is_as_it_was(tmp_path: Path) -> None:
    ((first, before),), ((second, after),) = (run_world(1, _careless, str(tmp_path)) for _ in range(2))
    assert first == second and after == before


def _exchange(name: str) -> int:
    from megadpo.model.heads import logprob
    from megadpo.training import trainer

    if name == "constant":
        logprob.TILE_ROWS = 7
    elif name == "function":
        trainer.training_step = lambda *unused: None  # type: ignore[assignment]
    return os.getpid()


@pytest.mark.parametrize("name", ["constant", "function"])
def test_a_process_in_which_a_module_was_changed_is_not_used_again(name: str) -> None:
    (kept,) = run_world(1, _exchange, "")
    assert run_world(1, _exchange, name) == [kept]
    assert run_world(1, _exchange, "") != [kept]


def test_new_processes_are_used_once() -> None:
    (kept,) = run_world(1, _exchange, "")
    (new,) = run_world(1, _exchange, "", new=True)
    assert new != kept and run_world(1, _exchange, "") == [kept]


def _end(how: str) -> None:
    if os.environ["RANK"] == "1":
        os._exit(9)
    if how == "others speak":
        raise ValueError("what rank 0 has to say")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("others speak", "rank 0 of 2 failed:(.|\n)*what rank 0 has to say"),
        ("in silence", "rank 1 of 2 failed: its process"),
    ],
)
def test_a_rank_that_ends_in_silence_fails_the_world_and_others_may_say_why(how: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_world(2, _end, how)
