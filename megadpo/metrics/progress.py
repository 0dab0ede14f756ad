"""What rank 0 shows while it trains: a few live lines where someone watches, a plain line now and then where it is a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from megadpo.config.sources import eval_prefix
from megadpo.console import heartbeat
from megadpo.console.activity import current
from megadpo.console.terminal import can_draw, start_live
from megadpo.platform.step_clock import PARTS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# What is shown, as, in which format; metrics that a record lacks are left out.
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
)
MOST_PLAIN_LINES = 50  # a log of a long run stays readable
REFRESHES_PER_SECOND = 2.0
SECONDS_BEFORE_SHOWN = 3.0
"""What takes longer, a step, an evaluation or a save, is shown with how far it is."""
SLOW_RATIO = 1.1
"""A rank that works for so much longer than the median is shown as the slowest."""


def describe(record: Mapping[str, float | int], prefix: str = "") -> str:
    """The record in a few words, e.g. "loss 0.6931, margin 0.000, accuracy 0.50, 1234 tokens/s, MFU 41.0%, 12.3 GiB"."""
    return ", ".join(words(record, prefix))


def words(record: Mapping[str, float | int], prefix: str = "") -> list[str]:
    """The parts of `describe`."""
    shown = [(record[prefix + name], label, form) for name, label, form in SHOWN if prefix + name in record]
    # A step of labelled answers that are all of one kind has no margin; a loss that is no number must be seen.
    found = [f"{label} {value:{form}}" for value, label, form in shown if label == "loss" or not math.isnan(value)]
    if not prefix and "tokens_per_second" in record:
        found.append(f"{record['tokens_per_second']:.0f} tokens/s")
    if not prefix and "mfu" in record:
        found.append(f"MFU {record['mfu']:.1%}")
    if not prefix and "peak_memory_gib" in record:
        found.append(f"{record['peak_memory_gib']:.1f} GiB")
    return found


def time_by_part(record: Mapping[str, float | int]) -> list[str]:
    """Where the step's time went, e.g. ["reference 20%", "forward 25%", …], and a rank that the others wait for."""
    seconds = {part: record.get(f"seconds/{part}", 0.0) for part in PARTS}
    total = sum(seconds.values())
    found = [f"{part} {value / total:.0%}" for part, value in seconds.items() if total and value / total >= 0.005]
    if record.get("slowest_rank_ratio", 1.0) >= SLOW_RATIO:
        found.append(f"rank {record['slowest_rank']:.0f} works {record['slowest_rank_ratio']:.2f} x the median")
    return found


def clock_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class ProgressSink:
    """Shows training records as they are written: loss, margin, accuracy, tokens/s, MFU, memory and the time left.

    Args:
        total_steps: steps of the whole run.
        resume_step: the last step already done; the time left counts from there.
        every: how many steps lie between two records (`logging.every`).
        stream: where to; live lines if it is a terminal, else plain ones, at most about `MOST_PLAIN_LINES` of them.
        clock: seconds, for the time left.
        held_out: the names of the sets that are evaluated.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int | None = None,
        every: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        held_out: Sequence[str] = ("",),
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._held_out = held_out
        self._total_steps = total_steps
        self._first_step = self._step = resume_step or 0
        self._next_plain_step = self._first_step
        self._steps_between_lines = max(every, -(-total_steps // MOST_PLAIN_LINES))
        self._started = self._last = clock()
        self._record: Mapping[str, float | int] = {}
        self._live: Live | None = None
        if can_draw(self._stream):
            heartbeat.lend()
            self._live = start_live(self._stream, self._render, REFRESHES_PER_SECOND)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Shows a step's record, and in full every record of held-out pairs (names that begin with "eval_")."""
        for name in self._held_out:
            if f"{eval_prefix(name)}loss" in record:
                what = f"held-out {name}:" if name else "held-out"
                self._say(f"step {record['step']}: {what} {describe(record, eval_prefix(name))}")
        if "loss" not in record:
            return
        step = int(record["step"])
        self._step, self._record, self._last = step, record, self._clock()
        if self._live is None and step >= min(self._next_plain_step, self._total_steps):
            self._next_plain_step = step + self._steps_between_lines
            self._say(f"step {step}/{self._total_steps}: {describe(record)}, ETA {clock_time(self._seconds_left())}")

    def close(self, has_failed: bool = False) -> None:
        """Leaves the last lines where they are."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            heartbeat.take_back()

    def _seconds_left(self) -> float:
        """By the mean of the steps so far, counted from the last record."""
        seconds_per_step = (self._last - self._started) / max(1, self._step - self._first_step)
        return max(0.0, seconds_per_step * (self._total_steps - self._step))

    def _render(self) -> RenderableType:
        """The live lines; called by a thread of rich's."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, step = self._clock(), self._step
        left = max(0.0, self._seconds_left() - (now - self._last))
        eta = clock_time(left) if step > self._first_step else "-:--:--"
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            Text(f"step {step}/{self._total_steps}", style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=step),
            Text(f"{step / max(1, self._total_steps):.0%}  {clock_time(now - self._started)}  ETA {eta}"),
        )
        lines: list[RenderableType] = [head]
        for found, style in ((words(self._record), ""), (time_by_part(self._record), "dim")):
            if found:
                lines.append(Text("  ".join(found), style=style, no_wrap=True, overflow="ellipsis"))
        if current().seconds() >= SECONDS_BEFORE_SHOWN:
            lines.append(Text(current().words(), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(f"{line}\n", end="", file=self._stream, flush=True)
            heartbeat.said()
