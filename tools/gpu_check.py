"""What `tools/gpu_check.sh` writes down while it runs, and the table that it prints last.

That is ``python -m tools.gpu_check table LOGS``. As a plugin of pytest (``-p tools.gpu_check``, MEGADPO_GPU_CHECK naming a
file) this writes a line of JSON when tests are collected and when one starts or ends, so that the table is right even where
pytest was ended before its own summary.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FILE_VARIABLE = "MEGADPO_GPU_CHECK"
ABOUT, TESTS, BENCHMARK = "about.json", "tests.jsonl", "benchmark.json"
"""In the folder of logs."""

LIBRARIES = ("torch", "triton", "megatron-core", "transformers", "flash-attn", "transformer-engine", "deepspeed", "trl")
MOST_NAMES = 40
"""Of a kind of tests that are listed."""


def _write(**record: Any) -> None:
    told = os.environ.get(FILE_VARIABLE)
    if told and "PYTEST_XDIST_WORKER" not in os.environ:  # there the process that hands out the tests hears of all
        with open(told, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 2), **record}) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    _write(event="collected", tests=[item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    _write(event="collected", tests=list(ids))


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(event="started", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _write(event=report.when, test=report.nodeid, outcome=report.outcome, seconds=report.duration, reason=_reason_of(report))


def _reason_of(report: pytest.TestReport) -> str:
    """Of a skipped or failed test, in one line."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else report.longreprtext.strip().rpartition("\n")[2]
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    # A case that failed in a process of its own says so first; its last line is the error.
    return " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300].removeprefix("Skipped: ")


def write_about(logs: Path) -> None:
    """The card, the versions of what is installed and the commit."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = ""
    card = _said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    commit = _said_by("git", "rev-parse", "--short", "HEAD")
    about = {"card": card, "versions": versions, "commit": commit, "started": time.time()}
    (logs / ABOUT).write_text(json.dumps(about, indent=1))


def _said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def table(logs: Path) -> tuple[str, bool]:
    """All of it as a table with two columns, and whether all is well."""
    rows = [("", ""), ("---", "---"), *_about_rows(logs)]
    tests, tests_are_well = _test_rows(logs)
    benchmark, benchmark_is_well = _benchmark_rows(logs)
    text = "\n".join(f"| {name} | {said.replace('|', '/')} |" for name, said in [*rows, *tests, *benchmark])
    return text, tests_are_well and benchmark_is_well


def _read(path: Path) -> list[dict[str, Any]]:
    """Its lines of JSON; what was cut off when the process ended is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _about_rows(logs: Path) -> list[tuple[str, str]]:
    if not (logs / ABOUT).exists():
        return [("card", "not written down")]
    about = json.loads((logs / ABOUT).read_text())
    there = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    missing = ", ".join(name for name, version in about["versions"].items() if not version)
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(about["started"]))
    return [
        ("card", about["card"] or "nvidia-smi did not say"),
        ("versions", there + (f"; not installed: {missing}" if missing else "")),
        ("megadpo", f"{about['commit'] or 'no git here'}, {date}"),
    ]


def _test_rows(logs: Path) -> tuple[list[tuple[str, str]], bool]:
    records = _read(logs / TESTS)
    collected = next((record["tests"] for record in records if record["event"] == "collected"), [])
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    seconds: Counter[str] = Counter()
    started = {record["test"] for record in records if record["event"] == "started"}
    for record in records:
        if record["event"] not in ("setup", "call", "teardown"):
            continue
        test, outcome = record["test"], record["outcome"]
        seconds[test] += record["seconds"]
        decided = record["event"] == "call" or outcome != "passed"
        if decided and outcomes.get(test) != "failed":
            outcomes[test] = outcome
            reasons[test] = record["reason"]
    counts = Counter(outcomes.values())
    open_ones = [test for test in collected if test not in outcomes]
    took = records[-1]["time"] - records[0]["time"] if records else 0.0
    said = f"{counts['passed']} passed, {counts['skipped']} skipped, {counts['failed']} failed, {len(open_ones)} not reached"
    rows = [("tests", f"{said}; {took:.0f} s from the first collection to the last end")]
    rows += [("failed", f"{_name(test)}: {reasons[test]}") for test in outcomes if outcomes[test] == "failed"]
    rows += [("not ended", _name(test)) for test in open_ones if test in started]
    waiting = [_name(test) for test in open_ones if test not in started]
    rows += [("not reached", test) for test in waiting[:MOST_NAMES]]
    if len(waiting) > MOST_NAMES:
        rows.append(("not reached", f"and {len(waiting) - MOST_NAMES} more"))
    skipped = Counter(reasons[test] for test, outcome in outcomes.items() if outcome == "skipped")
    rows += [("skipped", f"{number}: {reason}") for reason, number in skipped.most_common()]
    rows += [("slowest", f"{taken:.1f} s {_name(test)}") for test, taken in seconds.most_common(8)]
    return rows, bool(collected) and counts["failed"] == 0 and not open_ones


def _name(test: str) -> str:
    """Without the group that pytest-xdist adds."""
    return re.sub(r"@[^@\]]+$", "", test)


def _benchmark_rows(logs: Path) -> tuple[list[tuple[str, str]], bool]:
    path = logs / BENCHMARK
    if not path.exists():
        return [("benchmark", "none that came to its end")], False
    arms = json.loads(path.read_text())["arms"]
    rows = [(f"benchmark {arm['arm']}, {arm['size']}, {arm['mix']}", arm.get("failed") or _figures(arm)) for arm in arms]
    return rows, bool(arms) and not any("failed" in arm for arm in arms)


def _figures(arm: dict[str, Any]) -> str:
    return (
        f"{arm['median_seconds']:.3f} s a step, MFU {100 * arm['mfu']:.1f} %, {arm['peak_gib']:.1f} GiB at most, "
        f"first step {arm['first_seconds']:.1f} s"
    )


def main(arguments: list[str]) -> int:
    match arguments:
        case ["about", logs]:
            write_about(Path(logs))
            return 0
        case ["table", logs]:
            text, is_well = table(Path(logs))
            print(text)
            return 0 if is_well else 1
        case _:
            print("usage: python -m tools.gpu_check about|table LOGS", file=sys.stderr)
            return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
