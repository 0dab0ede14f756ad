"""Imports lead downwards: from floor to lower floor, never up, sideways or in a circle (tools/floors.py has the floors)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.floors import (
    FLOORS,
    PACKAGE,
    PICTURE,
    ROOT,
    Import,
    circles,
    imports,
    modules,
    render,
    two_way_folders,
    unnamed,
    wrong_arrows,
)

MOST_FILES_AT_THE_ROOT = 6


@pytest.fixture(scope="module")
def found() -> list[Import]:
    return imports(ROOT / PACKAGE)


def test_no_import_leads_upwards_or_sideways(found: list[Import]) -> None:
    assert wrong_arrows(found) == []


def test_no_two_folders_import_each_other(found: list[Import]) -> None:
    assert two_way_folders(found) == set()


def test_no_circle_of_files(found: list[Import]) -> None:
    assert circles(found) == []


def test_a_floor_names_every_room_once_and_the_root_is_no_lumber_room() -> None:
    rooms = [room for floor in FLOORS for room in floor.rooms]
    assert len(set(rooms)) == len(rooms)
    assert unnamed(modules(ROOT / PACKAGE)) == set(), "give it a floor in tools/floors.py, or a folder that has one"
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= MOST_FILES_AT_THE_ROOT


@pytest.mark.slow
def test_the_picture_is_current() -> None:
    assert PICTURE.read_text(encoding="utf-8") == render(), "run: python -m tools.floors --write"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in which nothing is wrong."""
    files = {
        "errors.py": "",
        "data/groups.py": "from megadpo.errors import UserError",
        "model/build.py": "from megadpo.data import groups",
        "model/moe/layer.py": "from megadpo.model.build import Stage",
        "metrics/collect.py": "import megadpo.data.groups",
    }
    package = tmp_path / PACKAGE
    for name, text in files.items():
        write(package, name, text)
    return package


def write(package: Path, name: str, text: str) -> None:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in (path.parent, *path.parent.parents):
        if package in (folder, *folder.parents):
            (folder / "__init__.py").touch()
    path.write_text(text + "\n", encoding="utf-8")


def test_nothing_is_wrong_with_the_made_up_package(package: Path) -> None:
    found = imports(package)
    assert Import("metrics.collect", "data.groups", 1) in found and len(found) == 4
    assert wrong_arrows(found) == [] and two_way_folders(found) == set() and circles(found) == []


@pytest.mark.parametrize(
    ("name", "text", "imported"),
    [
        ("data/store.py", "from megadpo.model.build import Stage", "model.build"),
        ("metrics/sinks.py", "from megadpo.model import build", "model.build"),  # the same floor
        ("data/store.py", "def late():\n    import megadpo.model.build", "model.build"),
        ("data/store.py", "if TYPE_CHECKING:\n    from megadpo.model.build import Stage", "model.build"),
        ("data/store.py", "from ..model.build import Stage", "model.build"),
        ("data/store.py", "from .. import model", "model.__init__"),
        ("data/store.py", "from megadpo import train", "__init__"),
        ("errors.py", "from megadpo.data.groups import Group", "data.groups"),
    ],
)
def test_a_new_arrow_up_or_sideways_is_found(package: Path, name: str, text: str, imported: str) -> None:
    write(package, name, text)
    (wrong,) = wrong_arrows(imports(package))
    assert (wrong.importer, wrong.imported) == (name.removesuffix(".py").replace("/", "."), imported)


def test_folders_that_import_each_other_are_found_also_inside_a_folder(package: Path) -> None:
    write(package, "data/store.py", "from megadpo.model.build import Stage")
    write(package, "model/attention/core.py", "from megadpo.model.moe.layer import Mixture")
    write(package, "model/moe/load.py", "from megadpo.model.attention.core import Attention")
    assert two_way_folders(imports(package)) == {("data", "model"), ("model.attention", "model.moe")}


def test_a_circle_of_files_is_found_but_an_import_inside_a_function_makes_none(package: Path) -> None:
    write(package, "data/one.py", "from megadpo.data.two import second")
    write(package, "data/two.py", "from megadpo.data.three import third")
    write(package, "data/three.py", "def late():\n    from megadpo.data.one import first")
    assert circles(imports(package)) == []
    write(package, "data/three.py", "from megadpo.data.one import first")
    (circle,) = circles(imports(package))
    assert sorted(circle) == ["data.one", "data.three", "data.two"]


def test_a_room_that_no_floor_names_is_found(package: Path) -> None:
    write(package, "utils.py", "")
    assert unnamed(modules(package)) == {"utils"}
