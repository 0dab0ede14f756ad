"""Measures each objective's largest relative error for docs/objectives.md: ``python -m tools.objective_errors [--write]``.

The comparisons are those of the tests: TRL 1.16's own code on random logits and on real rows
(`tests/unit/objectives/trl_cases.py`), and, for what TRL does not have, the papers' formulas with numeric derivatives
(`tests/unit/objectives/numeric.py`). An error is that of the loss or of the gradient, norm-wise, whichever is larger;
"fp32" is what was compared in single precision.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.objectives.specs import SPECS
from tests.unit.objectives.numeric import FORMULAS, against_formula
from tests.unit.objectives.trl_cases import CASES, on_a_real_batch, on_random_logits

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"
LARGEST = {"float64": 1e-7, "fp32": 1e-5}
"""What the tests tolerate."""
_ROW = re.compile(r"^\| `(\w+)` \|(.*\|) ([^|]*) \|$", re.MULTILINE)


def measure() -> dict[str, dict[str, float]]:
    """Loss -> precision -> its largest error."""
    worst: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def note(options: ObjectiveConfig, precision: str, error: float) -> None:
        for name in options.loss_types:
            worst[name][precision] = max(worst[name][precision], error)

    for case in CASES:
        note(case.options, "fp32" if case.single else "float64", on_random_logits(case).worst)
        if not case.only_random:
            note(case.options, "fp32", on_a_real_batch(case).worst)
    for options, formula in FORMULAS:
        note(ObjectiveConfig(**options), "float64", against_formula(options, formula).worst)
    return {name: dict(errors) for name, errors in worst.items()}


def figures(errors: dict[str, float]) -> str:
    """The text of the column: "2e-15, fp32 3e-06"."""
    parts = [f"{errors['float64']:.0e}"] if "float64" in errors else []
    return ", ".join(parts + ([f"fp32 {errors['fp32']:.0e}"] if "fp32" in errors else []))


def committed(page: str) -> dict[str, dict[str, float]]:
    """What the page says: loss -> precision -> error."""
    found = {}
    for name, _, text in _ROW.findall(page):
        if name not in SPECS:
            continue
        parts = [part.rpartition(" ") for part in text.split(", ")]
        found[name] = {precision or "float64": float(number) for precision, _, number in parts}
    return found


def written(page: str, worst: dict[str, dict[str, float]]) -> str:
    """The page with the last column of the rows of losses filled in."""
    return _ROW.sub(lambda row: f"| `{row[1]}` |{row[2]} {figures(worst[row[1]])} |" if row[1] in worst else row[0], page)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = measure()
    for name in SPECS:
        print(f"{name:20} {figures(measured[name])}")
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")
