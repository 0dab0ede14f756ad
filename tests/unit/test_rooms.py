"""docs/architecture.md names every file of the package, by what the file says of itself (tools/rooms.py)."""

from tools.floors import PACKAGE, ROOT, modules
from tools.rooms import PART, first_sentence, render


def test_the_page_lists_every_file() -> None:
    assert PART.written() == render(), "run: python -m tools.rooms --write"


def test_every_file_says_what_it_is() -> None:
    silent = {
        module
        for module, path in modules(ROOT / PACKAGE).items()
        if not first_sentence(path) and path.read_text(encoding="utf-8").strip()
    }
    assert silent == set(), "begin each file with a sentence that says what it is"
