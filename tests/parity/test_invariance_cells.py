"""The page lists the layouts that are held to a single process: forty at least, and each two features that combine."""

from __future__ import annotations

import itertools

import pytest

from megadpo.validation.combinations import rule_between
from tests.helpers.marks import skip_without

skip_without("deepspeed")

FEATURES = {
    "tensor": "tensor",
    "sequence": "sequence",
    "pipeline": "pipeline",
    "virtual": "virtual pipeline",
    "layers of stages": "uneven stages",
    "context": "context",
    "data": "data",
    "expert": "experts",
    "engine": "DeepSpeed",
}
"""A column of the cells -> a feature of the table of combinations (data is in none of its rules)."""


def features_of(cell: tuple[str, ...]) -> set[str]:
    from tools.invariance_cells import COLUMNS

    return {FEATURES[c] for c, text in zip(COLUMNS, cell, strict=True) if c in FEATURES and text not in ("", "Megatron")}


def test_at_least_forty_cells_are_held_over_three_steps() -> None:
    from tools.invariance_cells import cells

    assert sum(any(models.values()) for models in cells().values()) >= 40


@pytest.mark.parametrize(("first", "second"), itertools.combinations(FEATURES.values(), 2))
def test_two_features_are_in_a_cell_together_unless_they_are_refused(first: str, second: str) -> None:
    from tools.invariance_cells import cells

    together = any({first, second} <= features_of(cell) for cell in cells())
    assert together == (rule_between(first, second) is None)


def test_every_zero_stage_and_offload_and_both_context_methods_are_in_the_list() -> None:
    from tools.invariance_cells import cells

    assert {cell[-3:] for cell in cells()} == {
        ("Megatron", "1", ""),
        *(("DeepSpeed", str(stage), "") for stage in range(4)),
        *(("DeepSpeed", str(stage), "cpu") for stage in (1, 2, 3)),
        ("DeepSpeed", "3", "nvme"),
    }
    assert {"2 ulysses", "2 allgather"} <= {cell[6] for cell in cells()}


def test_the_page_shows_the_cells() -> None:
    from tools.invariance_cells import PART, render

    assert PART.written() == render(), "run: python -m tools.invariance_cells --write"
