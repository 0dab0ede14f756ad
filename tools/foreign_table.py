"""Makes the tables of docs/coming_from.md: ``python -m tools.foreign_table --write`` (a test compares)."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.foreign import TRAINERS
from tools.generated import Part

PART = Part(
    Path(__file__).parents[1] / "docs" / "coming_from.md",
    "<!-- The tables below are made by tools/foreign_table.py from megadpo/config/foreign.py. -->\n",
    "<!-- Their end. -->\n",
)
HEADS = {
    "TRL": "TRL: the fields of its trainers' configurations",
    "transformers": "transformers: TrainingArguments, which TRL inherits",
}


def render() -> str:
    """One table of names for each trainer."""
    lines: list[str] = []
    for trainer, table in TRAINERS.items():
        lines += [f"\n## {HEADS.get(trainer, trainer)}\n", "| there | here | |", "|---|---|---|"]
        lines += [f"| `{name}` | {f'`{key}`' if key else 'none'} | {words} |" for name, (key, words) in table.items()]
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    PART.main(render)
