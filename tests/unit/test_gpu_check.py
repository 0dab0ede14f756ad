"""`tools/gpu_check.sh`: one sentence where there is no card, an end in time whatever hangs, a table that says what was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_check import ABOUT, BENCHMARK, FILE_VARIABLE, TESTS, main, table

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"

ARM = {
    "arm": "varlen+triton",
    "size": "1.7B",
    "mix": "hh-rlhf-like",
    "median_seconds": 1.351,
    "mfu": 0.4404,
    "peak_gib": 67.61,
    "first_seconds": 5.2,
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


def test_without_a_card_it_says_so_in_one_sentence(tmp_path):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a card here")
    done = run("--logs", str(tmp_path / "logs"))
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "logs").exists()
    assert done.stderr.startswith("gpu_check: there is no CUDA card here; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fast"], "there is no option --fast; see --help"),
        (["--seconds", "soon"], "soon is no number of seconds"),
        (["--logs"], "--logs needs a value"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(arguments, told):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (2, f"gpu_check: {told}\n")


@pytest.fixture
def card(tmp_path) -> str:
    """PATH with an nvidia-smi that knows a card and a python whose tests and benchmarks never end."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 'A card, 580, 81559 MiB'\n")
    (programs / "python").write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '*"-m pytest"*) echo \'{"time": 1, "event": "collected", "tests": ["a", "b"]}\' '
        f'>"${FILE_VARIABLE}"; sleep 100;;\n'
        f'*benchmarks*) sleep 100;; -c*) exit 1;; *) exec {sys.executable} "$@";;\n'
        "esac\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    return f"{programs}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
def test_it_ends_in_time_though_tests_and_benchmark_hang(tmp_path, card):
    started = time.monotonic()
    done = run("--logs", str(tmp_path / "logs"), "--seconds", "22", "--benchmark", "4", PATH=card)
    assert time.monotonic() - started < 80  # 22, and what a busy machine takes to start two pythons
    assert done.returncode == 1, done.stderr
    *_, tests, one, other, benchmark = done.stdout.strip().splitlines()
    assert "| card | A card, 580, 81559 MiB |" in done.stdout
    assert tests.startswith("| tests | 0 passed, 0 skipped, 0 failed, 2 not reached; ")
    assert (one, other) == ("| not reached | a |", "| not reached | b |")
    assert benchmark == "| benchmark | none that came to its end |"
    assert (tmp_path / "logs" / "table.md").read_text().strip().endswith(benchmark)


def test_wheels_are_looked_for_before_anything_runs(tmp_path, card):
    done = run("--logs", str(tmp_path / "logs"), str(tmp_path), PATH=card)
    assert done.returncode == 2 and done.stderr.startswith(f"gpu_check: there is no wheel in {tmp_path}; ")


def write_logs(logs: Path, *records: dict[str, object]) -> None:
    about = {
        "card": "A card",
        "versions": {"python": "3.12", "torch": "2.11.0", "deepspeed": ""},
        "commit": "abc",
        "started": 0,
    }
    (logs / ABOUT).write_text(json.dumps(about))
    lines = [json.dumps({"time": 10.0 + number, **record}) for number, record in enumerate(records)]
    (logs / TESTS).write_text("\n".join(lines) + '\n{"time": 99, "event": "cal')  # the last line was cut off


def ended(test: str, outcome: str, reason: str = "", phase: str = "call") -> dict[str, object]:
    return {"event": phase, "test": test, "outcome": outcome, "seconds": 2.0, "reason": reason}


def test_the_table_counts_and_names_what_was_and_what_was_not(tmp_path, capsys):
    tests = ["t.py::one@fp32", "t.py::two[a@b]", "t.py::three", "t.py::four", "t.py::five", "t.py::six"]
    write_logs(
        tmp_path,
        {"event": "collected", "tests": tests},
        {"event": "collected", "tests": tests},  # every process says it
        *({"event": "started", "test": test} for test in tests[:5]),
        ended(tests[0], "passed", phase="setup"),
        ended(tests[0], "passed"),
        ended(tests[1], "failed", "assert 1 | 2"),
        ended(tests[1], "passed", phase="teardown"),
        ended(tests[2], "skipped", "no such thing", phase="setup"),
        ended(tests[3], "passed"),
        ended(tests[3], "failed", "left a mess", phase="teardown"),
    )
    (tmp_path / BENCHMARK).write_text(json.dumps({"arms": [ARM]}))
    text, is_well = table(tmp_path)
    assert not is_well and main(["table", str(tmp_path)]) == 1 and capsys.readouterr().out == text + "\n"
    for line in (
        "| card | A card |",
        "| versions | python 3.12, torch 2.11.0; not installed: deepspeed |",
        "| megadpo | abc, 1970-01-01 00:00 UTC |",
        "| tests | 1 passed, 1 skipped, 2 failed, 2 not reached; 13 s from the first collection to the last end |",
        "| failed | t.py::two[a@b]: assert 1 / 2 |",
        "| failed | t.py::four: left a mess |",
        "| not ended | t.py::five |",
        "| not reached | t.py::six |",
        "| skipped | 1: no such thing |",
        "| slowest | 4.0 s t.py::one |",
        "| benchmark varlen+triton, 1.7B, hh-rlhf-like | 1.351 s a step, MFU 44.0 %, 67.6 GiB at most, first step 5.2 s |",
    ):
        assert line in text.splitlines(), line


def test_all_is_well_only_where_every_test_was_reached_and_the_benchmark_ended(tmp_path):
    write_logs(tmp_path, {"event": "collected", "tests": ["a"]}, ended("a", "passed"))
    assert table(tmp_path)[1] is False
    (tmp_path / BENCHMARK).write_text(json.dumps({"arms": [ARM]}))
    assert table(tmp_path)[1] is True
    failed = {"arm": "trl+2", "size": "1.7B", "mix": "hh-rlhf-like", "failed": "out of memory"}
    (tmp_path / BENCHMARK).write_text(json.dumps({"arms": [ARM, failed]}))
    text, is_well = table(tmp_path)
    assert not is_well and text.endswith("| benchmark trl+2, 1.7B, hh-rlhf-like | out of memory |")
    write_logs(tmp_path, {"event": "collected", "tests": ["a", "b"]}, ended("a", "passed"))
    assert table(tmp_path)[1] is False


@pytest.mark.parametrize("options", [[], ["-n", "1", "--dist", "loadgroup"]], ids=["one process", "xdist"])
@pytest.mark.slow
def test_pytest_writes_down_what_the_table_needs(tmp_path, options):
    if options:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.xdist_group('group')\ndef test_good():\n    pass\n\n"
        "def test_bad():\n    raise ValueError('first\\nlast')\n\n"
        "def test_left_out():\n    pytest.skip('for a reason')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "-p",
        "tools.gpu_check",
        *options,
    ]
    told = {**os.environ, FILE_VARIABLE: str(tmp_path / TESTS), "PYTHONPATH": str(ROOT)}
    for name in [name for name in told if name.startswith("PYTEST_")]:
        del told[name]
    subprocess.run([*command, str(tmp_path)], env=told, capture_output=True, cwd=tmp_path)
    lines = table(tmp_path)[0].splitlines()
    assert next(line for line in lines if "tests |" in line).startswith(
        "| tests | 1 passed, 1 skipped, 1 failed, 0 not reached;"
    )
    assert "| failed | test_some.py::test_bad: ValueError: first … last |" in lines
    assert "| skipped | 1: for a reason |" in lines
