"""`model.kernels` in a whole run: it says what is used, and the numbers do not depend on it."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

from tests.helpers.models import save_model, write_hh
from tests.helpers.worlds import run_world


def _train_with_each(settings: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    import megadpo

    runs = []
    for kernels in ("auto", "torch"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            result = megadpo.train(
                settings, overrides=[f"model.kernels={kernels}", f"output_dir={settings['output_dir']}/{kernels}"]
            )
        (line,) = (line for line in said.getvalue().splitlines() if "log-prob head" in line)
        runs.append((line.partition("log-prob head ")[2], result.metrics))
    return runs


def test_the_kernels_are_named_at_the_start_and_give_the_same_metrics(tmp_path: Path) -> None:
    settings = {
        "model": {"path": str(save_model(tmp_path / "model", num_hidden_layers=2)), "dtype": "fp32"},
        "data": {"train": str(write_hh(tmp_path / "train.jsonl", 16)), "max_length": 96, "cache_dir": str(tmp_path)},
        "objective": {"wpo": True},  # reads every statistic of the head
        "train": {"steps": 2, "pairs_per_step": 4, "learning_rate": 1e-3},
        "logging": {"tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }
    (native, metrics), (twin, twin_metrics) = run_world(1, _train_with_each, settings)[0]
    assert twin == "torch"
    assert native.startswith(("C++ (", "torch (there is no C++ compiler")), native
    for name in ("loss", "grad_norm", "entropy", "logps/chosen", "logits/chosen", "mean_token_accuracy", "rewards/margins"):
        assert math.isclose(metrics[name], twin_metrics[name], rel_tol=1e-4, abs_tol=1e-6), name
