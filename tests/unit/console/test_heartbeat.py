"""What is going on is said: the words of an activity, lines where nothing was said, a line on a terminal that goes again."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megadpo.console import heartbeat
from megadpo.console.activity import Activity, activity, counted_through, current, is_under_way

ROOT = Path(__file__).parents[3]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def began(seconds_ago: float, **fields: Any) -> Activity:
    return Activity("reading", began=time.monotonic() - seconds_ago, **fields)


@pytest.mark.parametrize(
    ("seconds", "fields", "words"),
    [
        (0, {}, "reading"),
        (8, {}, "reading, 8 s"),
        (3723, {}, "reading, 1:02:03"),
        (2, {"total": 30_000, "unit": "rows", "done": 12_000}, "reading: 12,000 of 30,000 rows, 2 s"),
        (2, {"unit": "rows", "done": 1_234}, "reading: 1,234 rows, 2 s"),
        (2, {"total": 3 << 30, "unit": "bytes", "done": 1 << 29}, "reading: 0.50 of 3.00 GiB, 2 s"),
    ],
)
def test_an_activity_in_words(seconds: float, fields: dict[str, Any], words: str) -> None:
    assert began(seconds, **fields).words() == words


def test_the_time_left_counts_from_the_first_of_it_that_was_done() -> None:
    one = began(100, total=1000, unit="rows")
    one.advance(100)
    assert "left" not in one.words(), "one lot says nothing about the next"
    one._first = (time.monotonic() - 10, 100)
    one.advance(100)
    assert one.words() == "reading: 200 of 1,000 rows, 100 s, about 80 s left"


def test_the_innermost_activity_is_the_current_one_and_another_thread_tells_nothing() -> None:
    with activity("outer"):
        with activity("inner"):
            other = threading.Thread(target=lambda: list(counted_through(range(3), "of a thread")))
            other.start()
            other.join()
            assert current().what == "inner"
        assert current().what == "outer"
        for _ in counted_through(range(3), "counting", 3, "things"):
            assert current().what == "counting"
            break  # what is not gone through to its end is over, too
    assert not is_under_way()


def test_lines_come_where_nothing_was_said_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS_OF_SILENCE", 0.3)
    monkeypatch.setattr(heartbeat, "SECONDS_OF_SILENCE_IN_STEPS", 1.0)
    monkeypatch.setenv("HUB_TOKEN", "canary-0123456789")
    stream = io.StringIO()
    with heartbeat.speaking(stream), activity("reading canary-0123456789", 10, "rows"):
        wait_for(lambda: stream.getvalue().count("\n") >= 2)
        assert stream.getvalue().startswith("megadpo: reading ***: 0 of 10 rows")
        heartbeat.steady()
        before = stream.getvalue()
        for _ in range(5):
            time.sleep(0.1)
            heartbeat.said()
        assert stream.getvalue() == before, "others speak"
        wait_for(lambda: stream.getvalue() != before)
    before = stream.getvalue()
    time.sleep(0.5)
    assert stream.getvalue() == before


def test_ranks_above_0_and_a_launcher_whose_workers_speak_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS_OF_SILENCE", 0.1)
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    with heartbeat.speaking(stream):
        time.sleep(0.5)
        heartbeat.lend()
        monkeypatch.setenv("RANK", "0")
        time.sleep(0.5)
        assert not stream.getvalue()
        heartbeat.take_back()
        wait_for(lambda: "at work" in stream.getvalue())


ON_A_TERMINAL = """
import sys, time
from megadpo.console.activity import activity
from megadpo.console.heartbeat import speaking, write_line
from megadpo.metrics.progress import ProgressSink
with speaking():
    with activity("tokenising", 30, "rows") as one:
        for _ in range(12):
            time.sleep(0.1)
            one.advance()
        write_line("a line above")
        time.sleep(0.5)
    print("a result")
    sink = ProgressSink(3)
    sink.write({"step": 1, "loss": 0.5})
    time.sleep(1)
    sink.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_of_size_0_is_drawn_on_and_a_dumb_one_gets_lines(terminal: str) -> None:
    ours, theirs = pty.openpty()  # nobody sets its size: 0 rows, 0 columns
    assert os.get_terminal_size(theirs) == (0, 0)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "RANK")}
    environment |= {"TERM": terminal, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        printed += block
    os.close(ours)
    assert process.wait(30) == 0, printed.decode()
    lines = printed.decode().splitlines()
    assert any("tokenising" in line and "of 30 rows" in line for line in lines), lines
    assert any(line.endswith("a line above") for line in lines) and any(line.endswith("a result") for line in lines), lines
    assert any("step 1/3" in line for line in lines)
    assert ("\x1b[" in printed.decode()) == (terminal == "xterm")


def test_a_run_speaks_before_torch_is_loaded(tmp_path: Path) -> None:
    """torch that cannot be imported: what is said before is said."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    settings = ["model.path=model", "data.train=pairs.jsonl", "output_dir=out"]
    (tmp_path / "run.yaml").write_text("{}")
    command = [sys.executable, "-m", "megadpo", "train", "run.yaml", *settings]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    said = [line for line in done.stderr.splitlines() if "at work" not in line]
    assert said[0] == "megadpo: training model on pairs.jsonl, into out" and "no torch here" in said[-1], done.stderr


def test_what_draws_is_imported_before_the_thread_draws() -> None:
    """Of two threads that import at once, one may wait for the other for ever."""
    code = (
        "import sys; from megadpo.console.terminal import draw_once; draw_once(); before = set(sys.modules); draw_once();"
        "print(sorted(set(sys.modules) - before), 'rich.live' in before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[] True\n" and done.stderr == ""
