"""What a worker makes of its own end."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.launch.worker import blames_peer, claim_failure


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
