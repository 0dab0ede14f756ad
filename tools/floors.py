"""The floors of the package, lowest first, and docs/floors.svg, the picture of them: ``python -m tools.floors --write``.

A file may import from its own folder and from lower floors: never upwards, and never sideways between the folders of one
floor. tests/unit/test_floors.py holds the package to it. Counted is every import statement of the package's own modules, at
the head of a file, inside a function or under TYPE_CHECKING: a type borrowed from above ties files together as well. Only
circles of files are asked of those imports alone that run when a file is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "megadpo"
PICTURE = ROOT / "docs" / "floors.svg"


@dataclass(frozen=True)
class Floor:
    """One line of the package.

    Attributes:
        rooms: folders and files of the package's root, by name.
        words: what they are for.
    """

    rooms: tuple[str, ...]
    words: str


FLOORS = (
    Floor(("secrets",), "what is never shown: passwords, tokens, keys"),
    Floor(("console",), "what is going on, said before anyone wonders"),
    Floor(("errors",), "what a user can put right: UserError"),
    Floor(("files",), "directories and files, written whole or not at all"),
    Floor(("pages",), "self-contained HTML pages: sections, tables, charts"),
    Floor(("config",), "the options: one dataclass tree, read strictly"),
    Floor(("platform",), "CPU or CUDA, native code, where processes meet"),
    Floor(("launch",), "processes are started, watched and ended together"),
    Floor(("data",), "rows become groups, groups become micro-batches"),
    Floor(("objectives", "parallel"), "the losses, as pure functions; layouts and process groups"),
    Floor(("model", "metrics"), "a pipeline stage of the model; figures that add up over ranks"),
    Floor(("validation",), "every refusal that needs more than one option"),
    Floor(("report",), "a run's curves and findings, as a page and pictures"),
    Floor(("checkpoint", "pipeline"), "states on disk; micro-batches through the stages"),
    Floor(("planning",), "memory and time of a step, reckoned"),
    Floor(("engine",), "gradients and optimizer: Megatron's or DeepSpeed's"),
    Floor(("training",), "the story: from a plan to the last step"),
    Floor(("inspect",), "what the trainer sees of the data"),
    Floor(("doctor",), "what a machine and a run need, tried out"),
    Floor(("evaluation",), "a trained model judged: pairs, answers, tasks"),
    Floor(("__init__",), "import megadpo: train, Config, Callbacks, Result, UserError"),
    Floor(("commands",), "a file a command"),
    Floor(("cli",), "the table of commands"),
    Floor(("__main__",), "python -m megadpo"),
)
"""Lowest first."""


@dataclass(frozen=True)
class Import:
    """An import statement: `importer` and `imported` are dotted names of modules inside the package ("data.rows.encode"; the
    package itself and a folder are their "__init__").

    Attributes:
        at_start: it runs when the file is imported: at module level and not under TYPE_CHECKING.
    """

    importer: str
    imported: str
    line: int
    at_start: bool = True


def room_of(module: str) -> str:
    """The folder or file of the package's root that a module is in."""
    return module.partition(".")[0]


def folder_of(module: str) -> str:
    """The folder that a module lies in, dotted; "" for the package's root."""
    return module.rpartition(".")[0]


def floor_of(room: str) -> int:
    """The number of its floor, lowest 0. Raises KeyError where no floor names it."""
    return {room: number for number, floor in enumerate(FLOORS) for room in floor.rooms}[room]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}


def imports(package: Path) -> list[Import]:
    """Every import of the package's own modules by each other, in the order of files and lines."""
    known = modules(package)
    found = []
    for importer, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        later = _lines_that_run_later(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for imported in sorted(_imported(node, importer, package.name, known)):
                    found.append(Import(importer, imported, node.lineno, node.lineno not in later))
    return sorted(set(found), key=lambda one: (one.importer, one.line, one.imported))


def _imported(node: ast.Import | ast.ImportFrom, importer: str, package: str, known: Mapping[str, Path]) -> set[str]:
    """The modules of the package that a statement names: of ``from a import b``, a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    else:
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            base = [package, *importer.split(".")][: -node.level] + base
        names = [[*base, alias.name] for alias in node.names]
    return {_module(name[1:], known) for name in names if name[0] == package}


def _module(parts: list[str], known: Mapping[str, Path]) -> str:
    for end in range(len(parts), -1, -1):
        for name in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if name in known:
                return name
    raise AssertionError(f"no module of the package: {'.'.join(parts)}")


def _lines_that_run_later(tree: ast.Module) -> set[int]:
    """Lines inside functions and under TYPE_CHECKING."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def wrong_arrows(found: Iterable[Import]) -> list[Import]:
    """Imports that lead upwards, or sideways to another folder of the same floor."""
    return [
        one
        for one in found
        if room_of(one.importer) != room_of(one.imported)
        and floor_of(room_of(one.imported)) >= floor_of(room_of(one.importer))
    ]


def two_way_folders(found: Iterable[Import]) -> set[tuple[str, str]]:
    """Folders next to each other (of the package, or of one of its folders) that import each other both ways."""
    arrows = {pair for one in found if (pair := _siblings(folder_of(one.importer), folder_of(one.imported))) is not None}
    return {(one, other) for one, other in arrows if one < other and (other, one) in arrows}


def _siblings(folder: str, other: str) -> tuple[str, str] | None:
    """The two folders in which both lie, where their ways part; None where one is inside the other."""
    one, two = folder.split("."), other.split(".")
    for depth, (a, b) in enumerate(zip(one, two, strict=False), 1):
        if a != b:
            return (".".join(one[:depth]), ".".join(two[:depth])) if a and b else None
    return None


def circles(found: Iterable[Import]) -> list[list[str]]:
    """Circles of files that import each other when they are imported: of each, the files in order; at most one a file."""
    follows: dict[str, list[str]] = {}
    for one in found:
        if one.at_start and one.importer != one.imported:
            follows.setdefault(one.importer, []).append(one.imported)
    done: set[str] = set()
    circles: list[list[str]] = []

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            circles.append(way[way.index(module) :])
        elif module not in done:
            for after in follows.get(module, []):
                walk(after, [*way, module])
            done.add(module)

    for module in sorted(follows):
        walk(module, [])
    return circles


def unnamed(found: Iterable[str]) -> set[str]:
    """Folders and files of the package's root that no floor names, of these modules."""
    return {room_of(module) for module in found} - {room for floor in FLOORS for room in floor.rooms}


WIDTH, BAND, BOX, GAP, TOP = 960, 40, 92, 18, 46
"""Of the picture, of a floor's band, of a room's box, between two floors, above the first."""
COLUMNS = {"__init__": 2, "commands": 0, "checkpoint": 0, "validation": 2, "metrics": 0, "objectives": 0, "parallel": 2}
COLUMNS |= {"launch": 3, "config": 0, "platform": 2}
"""Where a room stands, from the left; 1 where nothing is said, and next to each other where two would stand in one place."""
COLOURS = ("#1b6ca8", "#d1495b", "#3c8d53", "#8d5a97", "#c98a1b", "#00798c", "#7a5c3e", "#555555")


def arrows_to_draw(found: Iterable[Import]) -> list[tuple[str, str]]:
    """(room, room it imports), without those that follow from a way over other rooms; the picture's upper rooms first."""
    arrows = {(room_of(one.importer), room_of(one.imported)) for one in found}
    arrows = {(room, other) for room, other in arrows if room != other}

    def follows(room: str, other: str) -> bool:
        middle = [after for before, after in arrows if before == room and after != other]
        return any((after, other) in arrows or follows(after, other) for after in middle)

    kept = [arrow for arrow in arrows if not follows(*arrow)]
    return sorted(kept, key=lambda arrow: (-floor_of(arrow[0]), COLUMNS.get(arrow[0], 1), -floor_of(arrow[1]), arrow))


def render(package: Path = ROOT / PACKAGE) -> str:
    """The floors that have rooms, highest first, as the text of an SVG."""
    rooms = {room_of(module) for module in modules(package)}
    floors = [
        (floor.words, [room for room in floor.rooms if room in rooms])
        for floor in reversed(FLOORS)
        if rooms & set(floor.rooms)
    ]
    height = TOP + len(floors) * (BAND + GAP) + 4
    places: dict[str, tuple[float, float]] = {}  # the middle of a box's upper edge
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect x="0" y="0" width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-size="15">The floors of {PACKAGE}</text>',
        '<text x="12" y="37" fill="#555555">An arrow is an import. Imports lead downwards; those that '
        "follow from the arrows drawn, over a room between, are left out.</text>",
    ]
    for number, (words, names) in enumerate(floors):
        y = TOP + number * (BAND + GAP)
        parts.append(f'<rect x="0" y="{y}" width="{WIDTH}" height="{BAND}" fill="#eef2f6"/>')
        parts.append(f'<text x="{WIDTH - 12}" y="{y + 24}" text-anchor="end" fill="#333333">{escape(words)}</text>')
        for name in names:
            x = 70 + 130 * COLUMNS.get(name, 1)
            while any(place == (x, y) for place in places.values()):
                x += 130
            places[name] = (x, y)
    lanes: list[tuple[float, float, float]] = []
    for number, (room, other) in enumerate(arrows_to_draw(imports(package))):
        parts.append(_arrow(places[room], places[other], places, lanes, COLOURS[number % len(COLOURS)]))
    for name, (x, y) in places.items():
        label = {"__init__": PACKAGE, "__main__": "-m " + PACKAGE}.get(name, name)
        is_folder = (package / name).is_dir()
        parts.append(
            f'<rect x="{x - BOX / 2}" y="{y + 6}" width="{BOX}" height="{BAND - 12}" '
            f'fill="{"#ffffff" if is_folder else "#fff7e0"}" stroke="#33475b"/>'
        )
        parts.append(f'<text x="{x}" y="{y + 24}" text-anchor="middle">{label}{"/" if is_folder else ""}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(
    start: tuple[float, float],
    end: tuple[float, float],
    places: Mapping[str, tuple[float, float]],
    lanes: list[tuple[float, float, float]],
    colour: str,
) -> str:
    """From a box's lower edge to another's upper edge, in a lane of its own past the floors between them."""
    (x1, top), (x2, bottom) = start, end
    y1, y2 = top + BAND - 6, bottom + 6
    between = [place for place in places.values() if top < place[1] < bottom]

    def is_free(x: float) -> bool:
        in_a_box = any(abs(x - place[0]) < BOX / 2 + 7 for place in between)
        return not in_a_box and not any(abs(x - lane) < 9 and low < y2 and high > y1 for lane, low, high in lanes)

    wanted = [x for step in range(60) for x in (x2 + 9 * step, x2 - 9 * step) if x > 6]
    x = next(x for x in sorted(wanted, key=lambda x: abs(x - x1) + abs(x - x2)) if is_free(x)) if between else x2
    if not between:
        way = f"M {x1:g} {y1:g} L {x2:g} {y2:g}"
    else:
        lanes.append((x, y1, y2))
        after, before = top + BAND + GAP, bottom - GAP
        way = (
            f"M {x1:g} {y1:g} C {x1:g} {after:g} {x:g} {y1:g} {x:g} {after:g} "
            f"L {x:g} {before:g} C {x:g} {y2:g} {x2:g} {before:g} {x2:g} {y2:g}"
        )
    head = f"M {x2 - 4:g} {y2 - 8:g} L {x2:g} {y2:g} L {x2 + 4:g} {y2 - 8:g}"
    return f'<path d="{way} {head}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PICTURE.write_text(render(), encoding="utf-8")
    else:
        print(render(), end="")
