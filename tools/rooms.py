"""Lists every file of the package, floor by floor, with what its docstring says first, in docs/architecture.md:
``python -m tools.rooms --write`` (a test compares)."""

from __future__ import annotations

import ast
from pathlib import Path

from tools.floors import FLOORS, PACKAGE, ROOT, modules, room_of
from tools.generated import Part

PART = Part(
    ROOT / "docs" / "architecture.md",
    "<!-- Between these marks: made by tools/rooms.py from the docstrings of the package. -->\n",
    "<!-- end of the rooms -->\n",
)


def render() -> str:
    """A line a file, in the order of the floors from the top."""
    by_room: dict[str, list[tuple[str, Path]]] = {}
    for module, path in modules(ROOT / PACKAGE).items():
        by_room.setdefault(room_of(module), []).append((module, path))
    lines = []
    for floor in reversed(FLOORS):
        for room in (room for room in floor.rooms if room in by_room):
            folder = ROOT / PACKAGE / room
            if not folder.is_dir():
                lines += ["", f"**`{PACKAGE}/{room}.py`**: {first_sentence(by_room[room][0][1])}"]
                continue
            lines += ["", f"**`{PACKAGE}/{room}/`**", ""]
            for _, path in by_room[room]:
                if text := first_sentence(path):
                    lines.append(f"* `{path.relative_to(folder)}`: {text}")
    return "\n".join(lines).lstrip("\n") + "\n"


def first_sentence(path: Path) -> str:
    """Of a module's docstring; "" where it has none."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0].split())
    return text.partition(". ")[0].removesuffix(".") + "." if text else ""


if __name__ == "__main__":
    PART.main(render)
