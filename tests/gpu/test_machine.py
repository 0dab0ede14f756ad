"""The warm processes themselves, on a CPU: cases share them, and a case that fails takes them along."""

from __future__ import annotations

import os
import time

import pytest

from tests.gpu.machine import on

seen: list[str] = []
"""In a warm process, what earlier cases have left there."""


def remember(what: str) -> tuple[int, list[str]]:
    seen.append(what)
    return os.getpid(), seen


def fail() -> None:
    raise ValueError("as asked")


def leave_a_process_group() -> bool:
    import torch.distributed as dist

    was_there = dist.is_initialized()
    dist.init_process_group("gloo")
    return was_there


def place() -> tuple[str, str, str]:
    import torch

    assert not torch.cuda.is_available()
    return os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]


@pytest.mark.slow
def test_cases_share_a_process_until_one_fails_or_takes_too_long():
    first, _ = on("cpu", remember, "one")
    second, found = on("cpu", remember, "two")
    assert (first, found) == (second, ["one", "two"])
    with pytest.raises(AssertionError, match=r"rank 0 on cpu:(.|\n)*ValueError: as asked"):
        on("cpu", fail)
    third, found = on("cpu", remember, "three")
    assert third != first and found == ["three"]
    with pytest.raises(AssertionError, match="rank 0 on cpu ended without an answer"):
        on("cpu", os._exit, 3)
    with pytest.raises(AssertionError, match="rank 0 on cpu gave no answer in time"):
        on("cpu", time.sleep, 100, timeout=0.5)


@pytest.mark.slow
def test_what_a_case_leaves_is_not_there_for_the_next_one():
    assert not on("cpu", leave_a_process_group)
    assert not on("cpu", leave_a_process_group)
    before, *ranks = on("cpu", remember, "here")[0], *(on("cpu", place) for _ in range(2))
    assert [(rank, size) for rank, size, _ in ranks] == [("0", "1")] * 2 and ranks[0][2] != ranks[1][2]
    alone, found = on("cpu", remember, "alone", in_new_processes=True)
    assert alone != before and found == ["alone"] and on("cpu", remember, "after")[1] == ["after"]
