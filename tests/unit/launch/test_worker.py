"""What a worker makes of its own end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.launch.worker import blames_peer, claim_failure, run_as_one


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:27"), True),
        (RuntimeError("Timed out waiting 1800000ms for send operation to complete"), True),
        (ConnectionResetError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("connection closed"), False),
    ],
)
def test_only_the_news_that_a_peer_is_gone_counts_as_a_consequence(error: Exception, expected: bool) -> None:
    assert blames_peer(error) is expected


def test_only_the_first_to_claim_a_failure_speaks(tmp_path: Path) -> None:
    assert claim_failure(tmp_path / "failure", rank=1, status=7) is None
    assert claim_failure(tmp_path / "failure", rank=0, status=1) == {"rank": 1, "status": 7}
    assert claim_failure(tmp_path / "nowhere" / "failure", rank=0, status=1) is None, "it cannot be claimed, so it is said"


def test_memory_that_is_not_there_is_one_sentence_without_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    def ask_for_too_much() -> int:
        return len(torch.empty(1 << 55, dtype=torch.uint8))

    assert run_as_one(ask_for_too_much) == 1
    said = capfd.readouterr().err
    assert said.startswith("megadpo: failed: out of memory (36028797018963968 bytes more were asked for): lower ")
    assert said.count("\n") == 1 and "train.recompute=full" in said


def test_a_gpu_s_memory_that_is_not_there_is_told_in_the_units_of_torch(capfd: pytest.CaptureFixture[str]) -> None:
    def run_out() -> int:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB"
        )

    assert run_as_one(run_out) == 1
    assert "out of memory (2.50 GiB more were asked for)" in capfd.readouterr().err


def test_any_other_failure_keeps_its_trace(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_as_one(lambda: int("seven")) == 1
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and "megadpo: failed: ValueError: invalid literal" in said
