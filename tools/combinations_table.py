"""Makes the table of docs/parallelism.md from megadpo/validation/combinations.py: ``python -m tools.combinations_table
--write`` (a test compares)."""

from __future__ import annotations

from pathlib import Path

from megadpo.validation.combinations import EXCLUDED, FEATURES, NEEDS, are_of_one_option, rule_between
from tools.generated import Part

PART = Part(
    Path(__file__).parents[1] / "docs" / "parallelism.md",
    "<!-- Between these marks: made by tools/combinations_table.py from megadpo/validation/combinations.py. -->\n",
    "<!-- end of the table -->\n",
)


def render() -> str:
    """A matrix of the features, then the reasons of its numbers, then what needs what."""
    names = [feature.name for feature in FEATURES]
    lines = ["| | " + " | ".join(names[:-1]) + " |", "|---" * len(names) + "|"]
    for row, name in enumerate(names[1:], 1):
        cells = [_cell(name, other) for other in names[:row]] + [""] * (len(names) - 1 - row)
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    lines += ["", "Numbers are combinations that are refused:", ""]
    lines += [f"{number}. {rule.first} and {rule.second}: {rule.why}." for number, rule in enumerate(EXCLUDED, 1)]
    lines += ["", "And these are refused alone:", ""]
    lines += [f"* {rule.first} without {rule.second}: {rule.why}." for rule in NEEDS]
    return "\n".join(lines) + "\n"


def _cell(name: str, other: str) -> str:
    if are_of_one_option(name, other):
        return "–"
    rule = rule_between(name, other)
    return "yes" if rule is None else str(EXCLUDED.index(rule) + 1)


if __name__ == "__main__":
    PART.main(render)
