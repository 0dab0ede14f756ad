"""The pictures of docs/screenshots/, by what they show: ``python -m tools.screenshots --write`` (or names of some of them).

A small model is trained on the rows of the tests for a minute or two; pages are opened in headless Chromium. One more
picture is one more function and a line of `PICTURES`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.models import save_model, write_hh

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "screenshots"
NUM_ROWS, NUM_HELD_OUT = 360, 40
HEIGHT = 1500
"""Of a page, in pixels, from its top."""
OPTIONS: dict[str, Any] = {
    "model": {"path": "models/small", "dtype": "fp32"},
    "data": {"train": "pairs.jsonl", "eval": "held-out.jsonl", "max_length": 256, "cache_dir": "cache"},
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
"""Of the run that is shown; paths from the workplace, so that no others are in the pictures."""
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
    import megadpo as package

    before = os.getcwd()
    os.chdir(workplace())  # so that the page names no path of this machine
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            package.train(OPTIONS)
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


def inspect_page() -> dict[str, bytes]:
    """The page of what the trainer will see of the data."""
    page = workplace() / "inspect.html"
    megadpo("inspect", "run.yaml", "--html", page.name)
    return {"inspect": page_as_png(page, 1280), "inspect-narrow": page_as_png(page, 390)}


def terminal() -> dict[str, bytes]:
    """What a run shows on a terminal while it trains."""
    page = workplace() / "terminal.html"
    page.write_text(screen_of("train", "run.yaml", "output_dir=runs/watched", until=r"step 2\d/"), encoding="utf-8")
    return {"terminal": page_as_png(page, 1280, height=420)}


def megadpo(*arguments: str) -> None:
    """A command, run in the workplace."""
    (workplace() / "run.yaml").write_text(yaml.safe_dump(OPTIONS), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "megadpo", *arguments], cwd=workplace(), env=environment, check=False)


def screen_of(*arguments: str, until: str, columns: int = 118, lines: int = 18) -> str:
    """The screen of a terminal in which a command runs, when it first shows what `until` matches, as an HTML page."""
    import pyte

    (workplace() / "run.yaml").write_text(yaml.safe_dump(OPTIONS), encoding="utf-8")
    screen = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(workplace())
        os.environ.update(PYTHONPATH=str(ROOT), TERM="xterm-256color", COLUMNS=str(columns), LINES=str(lines))
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "megadpo", *arguments])
    while not re.search(until, "\n".join(screen.display)):
        stream.feed(os.read(terminal, 4096))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return _as_html(screen)


def _as_html(screen: Any) -> str:
    """A terminal's screen with its colours, dark."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    console = Console(record=True, width=screen.columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for row in range(screen.lines):
        text = Text(no_wrap=True)
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            named = "default" if cell.fg == "default" else cell.fg if not _is_hex(cell.fg) else f"#{cell.fg}"
            text.append(cell.data, style=("bold " if cell.bold else "") + named.replace("brown", "yellow"))
        console.print(text)
    return console.export_html(theme=MONOKAI, inline_styles=True)


def _is_hex(colour: str) -> bool:
    return len(colour) == 6 and all(digit in "0123456789abcdef" for digit in colour)


PICTURES: dict[str, Callable[[], dict[str, bytes]]] = {"report": report_page, "inspect": inspect_page, "terminal": terminal}
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
