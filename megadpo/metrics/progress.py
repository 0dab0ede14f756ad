"""What rank 0 shows while it trains: a bar where someone watches, a plain line now and then where it is a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

# What is shown, as, in which format; metrics that a record lacks are left out.
SHOWN: tuple[tuple[str, str, str], ...] = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", ".3f"),
    ("rewards/accuracies", "accuracy", ".2f"),
)
MOST_PLAIN_LINES = 50  # a log of a long run stays readable


def describe(record: Mapping[str, float | int], prefix: str = "") -> str:
    """The record in a few words, e.g. "loss 0.6931, margin 0.000, accuracy 0.50, 1234 tokens/s"."""
    shown = [(record[prefix + name], label, form) for name, label, form in SHOWN if prefix + name in record]
    # A step of labelled answers that are all of one kind has no margin; a loss that is no number must be seen.
    words = [f"{label} {value:{form}}" for value, label, form in shown if label == "loss" or not math.isnan(value)]
    if not prefix and "tokens_per_second" in record:
        words.append(f"{record['tokens_per_second']:.0f} tokens/s")
    return ", ".join(words)


def clock_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class ProgressSink:
    """Shows training records as they are written: loss, margin, accuracy, tokens/s and the time left.

    Args:
        total_steps: steps of the whole run.
        resume_step: the last step already done; the time left counts from there.
        every: how many steps lie between two records (`logging.every`).
        stream: where to; a bar if it is a terminal, else plain lines, at most about `MOST_PLAIN_LINES` of them.
        clock: seconds, for the time left in plain lines.
    """

    def __init__(
        self,
        total_steps: int,
        resume_step: int | None = None,
        every: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._total_steps = total_steps
        self._first_step = resume_step or 0
        self._next_plain_step = self._first_step
        self._steps_between_lines = max(every, -(-total_steps // MOST_PLAIN_LINES))
        self._started = clock()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=self._first_step, unit="step", file=self._stream, dynamic_ncols=True)

    def write(self, record: Mapping[str, float | int]) -> None:
        """Shows a step's record, and in full every record of held-out pairs (names that begin with "eval_")."""
        if "eval_loss" in record:
            self._say(f"step {record['step']}: held-out {describe(record, 'eval_')}")
        if "loss" not in record:
            return
        step = int(record["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(describe(record), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= min(self._next_plain_step, self._total_steps):
            self._next_plain_step = step + self._steps_between_lines
            self._say(f"step {step}/{self._total_steps}: {describe(record)}, ETA {self._time_left(step)}")

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        seconds_per_step = (self._clock() - self._started) / max(1, step - self._first_step)
        return clock_time(seconds_per_step * (self._total_steps - step))

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)
