"""Makes docs/configuration.md from megadpo/config/schema.py: ``python -m tools.config_table --write`` (a test compares)."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from pathlib import Path

from megadpo.config import schema as config
from megadpo.config import strict

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MARK = "<!-- The table below is made by tools/config_table.py from megadpo/config/schema.py. -->\n"


def field_docs(cls: type) -> dict[str, str]:
    """The docstring that follows each field of a dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return docs


def render() -> str:
    """One table of keys, defaults and meanings for each section."""
    lines: list[str] = []
    plain = config.Config().to_dict()
    hints = typing.get_type_hints(config.Config)
    for section in dataclasses.fields(config.Config):
        hint = hints[section.name]
        is_section = dataclasses.is_dataclass(hint)
        docs = field_docs(hint if is_section else config.Config)
        values = plain[section.name] if is_section else {section.name: plain[section.name]}
        lines += [f"\n## {section.name}\n", "| key | default | meaning |", "|---|---|---|"]
        for name, value in values.items():
            dotted = f"{section.name}.{name}" if is_section else name
            meaning = docs[name].replace("|", "\\|")
            default = strict.yaml_text(value) if value != "" else "(none)"
            lines.append(f"| `{dotted}` | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        PAGE.write_text(head + MARK + render(), encoding="utf-8")
    else:
        print(render())
