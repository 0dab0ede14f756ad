"""`megadpo completion`: the scripts, run by the shells that they are for."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadpo import cli
from megadpo.commands.completion import keys, script, values
from megadpo.validation.load import load_config

ROOT = Path(__file__).parents[3]
CASES = [
    ("megadpo tra", ["train"]),
    ("megadpo convert me", ["merge"]),
    ("megadpo train run.yaml --np", ["--nproc"]),
    ("megadpo train run.yaml --launcher t", ["torchrun"]),
    ("megadpo train run.yaml train.warmup_s", ["train.warmup_steps="]),
    ("megadpo eval --har", ["--harness", "--harness-chat", "--harness-fewshot", "--harness-limit", "--harness-tasks"]),
    ("megadpo completion z", ["zsh"]),
]
"""A line up to the cursor, and what may stand there."""


def written(shell: str, directory: Path) -> Path:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    path = directory / f"megadpo.{shell}"
    path.write_text(script(shell, cli.parser()))
    return path


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash", cli.parser())


def test_every_key_is_one_that_is_read_and_every_value_one_of_its_values() -> None:
    assert len(keys()) > 100 and "output_dir" in keys() and "hub.push" in keys()
    plain = load_config({}).to_dict()
    for key in keys():
        section, _, name = key.partition(".")
        assert name in plain[section] if name else key in plain
    assert values()["train.schedule"][0] == "cosine" and values()["data.shuffle"] == ("true", "false")
    assert {"sigmoid", "kto", "sft"} <= set(values()["objective.loss_type"])


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    assert sorted(complete_in_bash(written("bash", tmp_path), line.split(" "))) == expected


def test_bash_completes_values_after_the_sign_that_it_takes_for_a_word(tmp_path: Path) -> None:
    path = written("bash", tmp_path)
    assert complete_in_bash(path, ["megadpo", "train", "run.yaml", "train.recompute", "=", "se"]) == ["selective"]
    assert complete_in_bash(path, ["megadpo", "train", "run.yaml", "logging.report", "="]) == ["true", "false"]
    assert complete_in_bash(path, ["megadpo", "train", "run.yaml", "output_dir", "=", ""]) == [], "bash itself: files"


def complete_in_bash(path: Path, words: list[str]) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    text = (
        f"source {path}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _megadpo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [word for word in done.stdout.splitlines() if word]


FISH = [*CASES, ("megadpo train r.yaml train.recompute=se", ["train.recompute=selective"])]


@pytest.mark.parametrize(("line", "expected"), FISH)
def test_fish_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    path = written("fish", tmp_path)
    command = ["fish", "--no-config", "-c", f"source {path}; complete -C '{line}'"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    found = [found.split("\t")[0] for found in done.stdout.splitlines()]
    assert done.returncode == 0 and not done.stderr and sorted(set(found)) == expected, (found, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megadpo tra", "train end"),
        ("megadpo train run.yaml --np", "train run.yaml --nproc end"),
        ("megadpo train run.yaml --launcher t", "train run.yaml --launcher torchrun end"),
        ("megadpo train run.yaml train.warmup_s", "train run.yaml train.warmup_steps=end"),
        ("megadpo train run.yaml train.recompute=se", "train run.yaml train.recompute=selective end"),
    ],
)
def test_zsh_completes(line: str, expected: str, tmp_path: Path) -> None:
    path = written("zsh", tmp_path)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}
    process = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path
    )
    os.close(theirs)
    try:
        ready = f'autoload -Uz compinit; compinit -u -D; source {path}; megadpo() {{ print -r -- "<$*>" }}; megadpo ready\n'
        os.write(ours, ready.encode())
        read_until(ours, "<ready>")
        os.write(ours, f"{line}\tend\n".encode())  # a space after what is complete, none after a key
        read_until(ours, f"<{expected}>")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, expected: str, seconds: float = 60) -> None:
    printed, deadline = "", time.monotonic() + seconds
    while expected not in printed:
        assert time.monotonic() < deadline, printed
        if select.select([terminal], [], [], 0.2)[0]:
            printed += os.read(terminal, 65536).decode(errors="replace")


def test_the_help_of_a_command_loads_nothing_large(tmp_path: Path) -> None:
    """What `--help` takes is what it imports: no torch, no transformers, no rich."""
    code = "import sys; sys.argv = ['megadpo', 'train', '--help']\nfrom megadpo import cli\n"
    code += "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\nprint(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    loaded = set(eval(done.stderr.splitlines()[-1]))
    assert "--nproc" in done.stdout and "megadpo.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "rich", "datasets", "huggingface_hub", "safetensors"}
