"""Trains the reference curve: 20 steps on hh-rlhf under both engines (``python -m tools.reference_curve [--write]``).

``--write`` renews tests/parity/reference_curve.json with Megatron's run; without it every run is compared with that file.
A change of the curve is a change of the training: say in the commit message which.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.models import DATA, save_model, write_hh
from tests.helpers.runs import read_metrics
from tests.helpers.worlds import run_world

CURVE = Path(__file__).parents[1] / "tests" / "parity" / "reference_curve.json"
ROWS = DATA / "hh-rlhf-harmless-test.jsonl.gz"
METRICS = ("loss", "grad_norm", "rewards/margins")
NUM_PROCESSES = 4
RUNS: dict[str, dict[str, Any]] = {
    "TP2 x PP2, Megatron ZeRO-1": {"tensor": 2, "pipeline": 2},
    "TP2 x PP2, DeepSpeed ZeRO-3": {"tensor": 2, "pipeline": 2, "engine": "deepspeed", "zero_stage": 3},
    # Four processes leave TP2 x PP2 one replica; here ZeRO-3 has two to shard over.
    "PP2 x DP2, DeepSpeed ZeRO-3": {"pipeline": 2, "engine": "deepspeed", "zero_stage": 3},
    "TP2 x DP2, DeepSpeed ZeRO-3": {"tensor": 2, "engine": "deepspeed", "zero_stage": 3},
}
TRAIN = {
    "steps": 20,
    "pairs_per_step": 8,
    "tokens_per_micro_batch": 1024,
    "learning_rate": 1e-3,
    "warmup_steps": 3,
}
RELATIVE, FLOOR = 1e-4, 1e-6
"""Two values agree within RELATIVE of the reference, or FLOOR where that is less (margins pass through 0)."""


def train(directory: Path, parallel: dict[str, Any], num_steps: int = TRAIN["steps"]) -> dict[str, list[float]]:
    """METRICS of each of the first steps of a 2-layer random Llama in fp32 on 48 rows of hh-rlhf; makes the model where it
    is missing."""
    model, rows = directory / "model", directory / "rows.jsonl"
    if not model.exists():
        save_model(model, "llama", num_hidden_layers=2)
        write_hh(rows, 48)
    settings = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(directory / "cache")},
        "train": TRAIN,
        "logging": {"tensorboard": False},
        "parallel": parallel,
        "output_dir": tempfile.mkdtemp(dir=directory),
    }
    steps = run_world(NUM_PROCESSES, _train_first, settings, num_steps)[0]
    return {name: [step[name] for step in steps] for name in METRICS}


def _train_first(settings: dict[str, Any], num_steps: int) -> list[dict[str, float]]:
    """The metrics of a run that ends after so many of its steps."""
    import megadpo

    def goes_on(step: int, metrics: dict[str, float]) -> bool:
        return step < num_steps

    megadpo.train(settings, megadpo.Callbacks(on_step_end=goes_on))
    return read_metrics(Path(settings["output_dir"]))


def committed() -> dict[str, list[float]]:
    """The curve in the repository."""
    return dict(json.loads(CURVE.read_text(encoding="utf-8"))["curve"])


def worst_error(curve: dict[str, list[float]], reference: dict[str, list[float]]) -> float:
    """Largest |difference| over what is allowed (see RELATIVE): at most 1 where the curves agree."""
    pairs = [pair for name in METRICS for pair in zip(curve[name], reference[name], strict=True)]
    return max(abs(ours - theirs) / max(RELATIVE * abs(theirs), FLOOR) for ours, theirs in pairs)


def _write(curve: dict[str, list[float]]) -> None:
    packages = ("torch", "megatron-core", "deepspeed", "transformers", "tokenizers")
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "run": next(iter(RUNS)),
        "train": TRAIN,
        "curve": curve,
    }
    CURVE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew the committed curve")
    write = parser.parse_args().write
    if not ROWS.exists():
        raise SystemExit(f"{ROWS} is missing: the curve is of real hh-rlhf rows; set MEGADPO_TEST_DATA to their directory")
    with tempfile.TemporaryDirectory() as directory:
        curves = {name: train(Path(directory), parallel) for name, parallel in RUNS.items()}
    if write:
        _write(next(iter(curves.values())))
    reference = committed()
    for name, curve in curves.items():
        fall = f"loss {curve['loss'][0]:.4f} to {curve['loss'][-1]:.4f}"
        print(f"{name}: {fall}; largest difference {worst_error(curve, reference):.2g} of what is allowed")


if __name__ == "__main__":
    _main()
