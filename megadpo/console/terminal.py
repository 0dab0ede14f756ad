"""Lines at the end of a terminal that are drawn anew now and then; what is printed meanwhile stands above them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


def can_draw(stream: TextIO) -> bool:
    """Whether lines on this stream can be drawn anew: it is a terminal, and not a dumb one."""
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except ValueError:  # it is closed
        return False


def start_live(
    stream: TextIO, render: Callable[[], RenderableType], refreshes_per_second: float, transient: bool = False
) -> Live:
    """Begin to draw what `render` gives, which a thread of rich's calls. One at a time.

    The cursor stays visible: a run that is killed could not bring it back. A terminal that says it has no rows or columns
    (a pseudo-terminal that nobody has told its size) is drawn on as one of 80 by 25.

    Args:
        transient: the lines go when it is stopped.
    """
    from rich.console import Console
    from rich.live import Live

    class VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

    console = VisibleCursor(file=stream, force_terminal=True)
    live = Live(
        console=console,
        get_renderable=render,
        refresh_per_second=refreshes_per_second,
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=stream is sys.stderr,
    )
    live.start(refresh=True)
    return live


def draw_once() -> None:
    """Have rich import what it imports as it draws, and draw nothing that is seen."""
    from rich.text import Text

    start_live(io.StringIO(), lambda: Text("megadpo …", style="dim"), 4, transient=True).stop()
