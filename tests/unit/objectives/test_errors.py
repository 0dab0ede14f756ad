"""Gradients equal the numeric derivatives of the papers' formulas; the errors that docs/objectives.md states are small."""

from __future__ import annotations

import pytest

from megadpo.objectives.specs import SPECS
from tests.unit.objectives.numeric import FORMULAS, against_formula
from tools import objective_errors


@pytest.mark.parametrize(("options", "formula"), FORMULAS, ids=[str(options) for options, _ in FORMULAS])
def test_loss_and_gradient_equal_the_formula_and_its_derivative(options, formula):
    found = against_formula(options, formula)
    assert found.gradient_norm > 1e-3
    assert found.loss <= 1e-12 and found.gradient <= 1e-9


def test_the_page_states_a_tolerable_error_of_every_loss():
    stated = objective_errors.committed(objective_errors.PAGE.read_text(encoding="utf-8"))
    assert stated.keys() == SPECS.keys()
    for name, errors in stated.items():
        assert errors, name
        for precision, error in errors.items():
            assert error <= objective_errors.LARGEST[precision], f"{name}: {error} in {precision}"


def test_only_the_last_column_is_written():
    page = "| loss | of | error |\n|---|---|---|\n| `ipo` | (a - 1)^2 | – |\n| `no_loss` | b | – |\nEnd\n"
    written = objective_errors.written(page, {"ipo": {"float64": 2.3e-16, "fp32": 4e-6}})
    assert written == page.replace("(a - 1)^2 | – |", "(a - 1)^2 | 2e-16, fp32 4e-06 |")
    assert objective_errors.committed(written) == {"ipo": {"float64": 2e-16, "fp32": 4e-6}}
