"""Options of `logging` that cannot be honoured are refused in a sentence; the pages' own examples are taken."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from megadpo.config.schema import LoggingConfig
from megadpo.errors import UserError
from megadpo.metrics import trackers
from megadpo.training.profile import ProfileWindow
from megadpo.validation.load import load_config
from megadpo.validation.logging import check_logging

PAGE = Path(__file__).parents[3] / "docs" / "watching.md"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("logging.trackers=[wanbd]", "logging.trackers: 'wanbd' is not known; did you mean 'wandb'?"),
        ("logging.trackers=[tensorboard]", "choose from wandb, mlflow, trackio, swanlab (metrics.jsonl is always written"),
        ("logging.trackers=[mlflow, mlflow]", "name each tracker once"),
        ("logging.project=' '", "logging.project is empty; give a name"),
        ("logging.tags=['a,b']", "logging.tags: 'a,b' is not a tag that every tracker takes; give 1 to 64 letters"),
        ("logging.peak_tflops=0", "logging.peak_tflops must be"),
        ("logging.profile_steps=[3]", "logging.profile_steps is [3]; give [first, last]"),
        ("logging.profile_steps=[0, 3]", "steps from 1 on"),
        ("logging.profile_steps=[5, 4]", "logging.profile_steps is [5, 4]"),
        ("logging.profile_steps=[1, 101]", "are 101 steps, whose trace nothing could open; give at most 100"),
    ],
)
def test_what_cannot_be_is_refused_when_the_configuration_is_read(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_config({}, [override])


def test_ranks_that_are_none_are_refused() -> None:
    for ranks in ("[]", "[-1]"):
        with pytest.raises(UserError, match=r"logging\.profile_ranks is .*; give ranks from 0 on"):
            load_config({}, ["logging.profile_steps=[1, 2]", f"logging.profile_ranks={ranks}"])


def test_what_this_run_does_not_have_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoggingConfig(profile_steps=[10, 12], profile_ranks=[0, 3])
    with pytest.raises(UserError, match="begins with step 10, but the run has 9; lower it"):
        check_logging(options, 4, 9)
    with pytest.raises(UserError, match="has rank 3, but the run has 2, from 0 on"):
        check_logging(options, 2, 12)
    check_logging(options, 4, 11)  # the window's rest is left out
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlflow is not installed; run `pip install mlflow-skinny`, or take it out"):
        check_logging(LoggingConfig(trackers=["mlflow"]), 1, 9)


@pytest.mark.parametrize("where", ["__init__", "start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_is_told_once_and_ends_no_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, *arguments: object, **named: object) -> None:
        raise RuntimeError("no counters here")

    monkeypatch.setattr(torch.profiler.profile, where, fail)
    window = ProfileWindow(LoggingConfig(profile_steps=[1, 2], profile_ranks=[0]), tmp_path)
    for step in (1, 2, 3):
        window.before(step)
        window.after(step)
    window.close()
    said = capsys.readouterr().err
    assert said.count("no counters here") == said.count("warning") == 1 and "going on without the profile" in said


def test_the_examples_of_the_page_are_taken() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert load_config(yaml.safe_load(block)).logging.trackers == ["wandb", "mlflow"]
    (command,) = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    loaded = load_config({}, shlex.split(command)[3:])
    assert (loaded.logging.profile_steps, loaded.logging.profile_ranks) == ([10, 12], [0, 1])
