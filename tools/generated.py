"""A part of a page that is made by a program: what stands between two marks, and how it is written there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """What stands in `page` between the lines `begin` and `end`, which end in a newline."""

    page: Path
    begin: str
    end: str

    def written(self) -> str:
        """As the page has it now."""
        return self.page.read_text(encoding="utf-8").partition(self.begin)[2].partition(self.end)[0]

    def main(self, render: Callable[[], str]) -> None:
        """With `--write` on the command line `render()` replaces it; without, that is printed."""
        if sys.argv[1:] != ["--write"]:
            print(render())
            return
        text = self.page.read_text(encoding="utf-8")
        old, new = (self.begin + inner + self.end for inner in (self.written(), render()))
        self.page.write_text(text.replace(old, new), encoding="utf-8")
