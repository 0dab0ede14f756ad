"""The script of TRL's in docs/coming_from.md and the file that it becomes train the same model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.launched import finish_command
from tests.helpers.models import save_model
from tests.helpers.runs import weights_in
from tests.parity.trl_runs import pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.slow


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_script_and_the_file_give_the_same_losses_and_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    save_model(tmp_path / "models" / "start")
    settings = yaml.safe_load(block("yaml"))
    # A step has every row, so that both see the same ones, in whatever order.
    rows = pairs()[: settings["train"]["pairs_per_step"]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(block("yaml"))
    dump = "import json; json.dump(trainer.state.log_history, open('theirs.json', 'w'))"
    script = [sys.executable, "-c", f"{block('python')}\n{dump}"]
    done = subprocess.run(script, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, output = finish_command(["train", "run.yaml"], tmp_path, MEGADPO_CACHE=str(tmp_path / "cache"))
    assert status == 0, output
    theirs = [record for record in json.loads((tmp_path / "theirs.json").read_text()) if "loss" in record]
    lines = (tmp_path / "runs" / "ours" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in lines]
    assert len(ours) == len(theirs) == settings["train"]["epochs"]
    for name in ("loss", "grad_norm", "rewards/margins", "learning_rate"):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[name] == pytest.approx(float(other[name]), rel=2e-4, abs=2e-6), (name, mine["step"])
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.01, "it has learned something"
    start = weights_in(tmp_path / "models" / "start")
    moved = {name: weight - start[name] for name, weight in weights_in(tmp_path / "runs" / "ours" / "hf").items()}
    other = {name: weight - start[name] for name, weight in weights_in(tmp_path / "runs" / "trl" / "final").items()}
    error = sum(float((moved[name] - other[name]).square().sum()) for name in moved) ** 0.5
    size = sum(float(difference.square().sum()) for difference in other.values()) ** 0.5
    assert size > 0 and error < 1e-2 * size, (error, size)  # Adam's first steps enlarge the rounding of small gradients
    assert all(torch.isfinite(weight).all() for weight in moved.values())
