"""What the schedule tests hold of every rank."""

from __future__ import annotations

from tests.parity.schedule_worker import Case


def check(found: list, cases: list[Case]) -> None:
    """No difference on any rank, and margins of exactly zero where policy and reference are one."""
    for ranks, case in zip(zip(*found, strict=True), cases, strict=True):
        assert [rank.different for rank in ranks] == [[]] * len(ranks), str(case)
        margins = [rank.first_margins for rank in ranks if len(rank.first_margins)]
        assert margins and not any(margin.any() for margin in margins), str(case)
        assert max(rank.num_micro_batches[0] for rank in ranks) > (1 if case.tokens_per_micro_batch < 1000 else 0)
