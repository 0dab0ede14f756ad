"""The pictures of docs/screenshots/, by what they show: ``python -m tools.screenshots --write`` (or names of some of them).

A small model is trained on the rows of the tests for a minute or two; pages are opened in headless Chromium. One more
picture is one more function and a line of `PICTURES`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.models import save_model, write_hh

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screenshots"
NUM_ROWS, NUM_HELD_OUT = 360, 40
HEIGHT = 1500
"""Of a page, in pixels, from its top."""
KEPT = contextlib.ExitStack()
atexit.register(KEPT.close)


@cache
def workplace() -> Path:
    """A directory, for as long as this process runs, with a small model, pairs, and a configuration of a run."""
    directory = Path(KEPT.enter_context(tempfile.TemporaryDirectory(prefix="megadpo-screenshots-")))
    save_model(directory / "models" / "small", "qwen3", num_hidden_layers=2)
    rows = write_hh(directory / "pairs.jsonl", NUM_ROWS).read_text().splitlines(keepends=True)
    (directory / "pairs.jsonl").write_text("".join(rows[:-NUM_HELD_OUT]))
    (directory / "held-out.jsonl").write_text("".join(rows[-NUM_HELD_OUT:]))
    return directory


@cache
def trained() -> Path:
    """The run whose pictures are shown: in the workplace, so that no other path is in them."""
    import megadpo

    options: dict[str, object] = {
        "model": {"path": "models/small", "dtype": "fp32"},
        "data": {
            "train": "pairs.jsonl",
            "eval": "held-out.jsonl",
            "max_length": 256,
            "cache_dir": str(workplace() / "cache"),
        },
        "train": {
            "epochs": 1,
            "pairs_per_step": 8,
            "learning_rate": 5e-4,
            "warmup_steps": 5,
            "tokens_per_micro_batch": 4096,
        },
        "eval": {"every": 8},
        "logging": {"tensorboard": False},
        "output_dir": "runs/first",
    }
    before = os.getcwd()
    os.chdir(workplace())  # so that the page names no path of this machine
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            megadpo.train(options)
    finally:
        os.chdir(before)
    return workplace() / "runs" / "first"


def report_page() -> dict[str, bytes]:
    """The page of a run, wide and narrow."""
    return {
        "report": page_as_png(trained() / "report.html", 1280),
        "report-narrow": page_as_png(trained() / "report.html", 390),
    }


def page_as_png(page: Path, width: int, height: int = HEIGHT) -> bytes:
    """A page from its top, as a PNG."""
    with tempfile.TemporaryDirectory() as directory, Browser() as browser:
        picture = Path(directory) / "page.png"
        shown = browser.show(page, width, picture, most_height=height)
        assert shown.console == [], shown.console
        return picture.read_bytes()


PICTURES: dict[str, Callable[[], dict[str, bytes]]] = {"report": report_page}
"""What can be shown -> makes its pictures, by file name without suffix."""


def main(arguments: list[str]) -> int:
    if CHROMIUM is None:
        print("Chromium is not installed: no pictures", file=sys.stderr)
        return 1
    names = [argument for argument in arguments if argument != "--write"] or list(PICTURES)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        for file, picture in PICTURES[name]().items():
            (FOLDER / f"{file}.png").write_bytes(picture)
            print(FOLDER / f"{file}.png")
    return 0


if __name__ == "__main__":
    if "--write" not in sys.argv:
        sys.exit("python -m tools.screenshots --write [NAME …]")
    sys.exit(main(sys.argv[1:]))
