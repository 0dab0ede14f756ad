"""The checks on a terminal: a line each, what is wrong with its fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from megadpo.doctor.check import Check

STYLES = {"ok": ("ok     ", "green"), "warning": ("warning", "bold yellow"), "failed": ("FAILED ", "bold red")}
WIDTH_WITHOUT_TERMINAL = 110


def show(checks: Sequence[Check], stream: IO[str]) -> None:
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL)
    for check in checks:
        word, style = STYLES[check.status]
        console.print(Text(f"{word} ", style).append(f"{check.name}: ", "bold").append(check.found, "not bold default"))
        if check.status != "ok":
            console.print(Padding(Text(check.fix), (0, 0, 0, 8)))
    counts = Counter(check.status for check in checks)
    words = [f"{counts['ok']} ok", f"{counts['warning']} warnings", f"{counts['failed']} failed"]
    console.print(Text(", ".join(words), "bold"))
