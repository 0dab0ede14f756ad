"""Held-out sets in the step loop: each on its own, the best checkpoint kept and exported, the run ended by what they say."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.checkpoint.convert import export_checkpoint
from megadpo.checkpoint.sharded import open_checkpoint, step_checkpoints
from megadpo.errors import UserError
from tests.helpers.runs import exported_weights, read_metrics, resumed_and_whole, run_settings, save_files, weights_in
from tests.helpers.worlds import run_world

METRIC = "eval_noisy_loss"
PATIENCE = 3
EXAMPLE = "examples/custom_objective.py:squared_hinge"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Four pairs, and the same with one of their labels wrong: who becomes too sure of the four is punished there."""
    directory = save_files(
        *(tmp_path_factory.mktemp("files"), "qwen3", 24), num_hidden_layers=2, hidden_size=32, intermediate_size=48
    )
    rows = (directory / "train.jsonl").read_text().splitlines(keepends=True)
    (directory / "few.jsonl").write_text("".join(rows[:4]))
    last = json.loads(rows[3])
    flipped = json.dumps({"chosen": last["rejected"], "rejected": last["chosen"]})
    (directory / "noisy.jsonl").write_text("".join(rows[:3]) + flipped + "\n" + "".join(rows[3:]))
    return directory


def overfitting(files: Path, output_dir: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run that learns four pairs by heart: on the noisy ones it becomes better for some steps, then worse."""
    sets = {"noisy": str(files / "noisy.jsonl"), "seen": [{"path": str(files / "few.jsonl")}]}
    given: dict[str, dict[str, Any]] = {
        "data": {"train": str(files / "few.jsonl"), "eval": sets, "max_length": 96},
        "train": {
            "steps": 20,
            "pairs_per_step": 4,
            "tokens_per_micro_batch": 512,
            "warmup_steps": 0,
            "learning_rate": 5e-4,
            "schedule": "constant",
        },
        "eval": {"every": 1, "pairs": 4, "best_metric": METRIC, "patience": PATIENCE},
        "checkpoint": {"keep": 1},
    }
    given["train"] |= {"learning_rate": 5e-4, "schedule": "constant"}
    for section, values in changes.items():
        given[section] = given.get(section, {}) | values
    return run_settings(files, output_dir, **given)


def best_of(records: list[dict[str, float]]) -> int:
    """The step of the least METRIC."""
    return int(
        min((record for record in records if METRIC in record and record["step"]), key=lambda one: one[METRIC])["step"]
    )


def steps_in(output_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in step_checkpoints(output_dir / "checkpoints")]


def assert_is_export_of(output_dir: Path, step: int, scratch: Path) -> None:
    """`hf/` has the tensors of a checkpoint, bit for bit."""
    export_checkpoint(output_dir / "checkpoints" / f"step_{step:08d}", scratch / "converted")
    ours, theirs = exported_weights(output_dir), weights_in(scratch / "converted")
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _train(settings: dict[str, Any], times: int = 1) -> tuple[list[Any], str]:
    """The results, and what the runs have said."""
    import megadpo

    with contextlib.redirect_stderr(io.StringIO()) as said:
        results = [megadpo.train(settings) for _ in range(times)]
    return results, said.getvalue()


@pytest.mark.slow
def test_a_run_that_overfits_ends_early_and_exports_its_best_checkpoint_and_is_finished_when_started_again(files, tmp_path):
    run = tmp_path / "run"
    settings = overfitting(files, run, eval={"at_start": True}, logging={"tensorboard": True})
    (result, again), said = run_world(1, _train, settings, 2)[0]
    records = read_metrics(run)
    best = best_of(records)
    assert best > 1 and result.steps == best + PATIENCE < 20, "it became better, then worse"
    assert (result.best_step, result.ended is not None) == (best, True)
    assert result.best_value == next(record[METRIC] for record in records if record["step"] == best)
    assert steps_in(run) == [best, result.steps], "the best one stays beyond checkpoint.keep"
    assert_is_export_of(run, best, tmp_path)

    assert [record["step"] for record in records] == list(range(result.steps + 1)), "from the start to the end, each once"
    assert records[0].keys() & {"loss", METRIC, "eval_seen_loss"} == {METRIC, "eval_seen_loss"}
    assert records[0][METRIC] == pytest.approx(math.log(2)) == records[0]["eval_seen_loss"]
    assert records[-1]["eval_seen_loss"] < 0.1 < 0.5 < records[-1][METRIC] and "eval_loss" not in records[-1]
    assert "step 0: held-out noisy: loss 0.6931" in said and f"step {best}: held-out seen: loss" in said
    assert f"the run ends after step {result.steps} of 20: {METRIC}" in said and f"model of step {best}, the best by" in said

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in (METRIC, "eval_seen_rewards/accuracies"):
        assert [event.step for event in events.Scalars(name)] == list(range(result.steps + 1))

    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert sessions[0]["status"] == "finished" and sessions[0]["best_step"] == best and METRIC in sessions[0]["reason"]
    assert f"nothing is left to train: the run has ended after step {result.steps} of 20" in said
    assert (again.steps, again.best_step, again.ended) == (result.steps, best, result.ended)
    assert_is_export_of(run, best, tmp_path / "again")
    assert "eval_noisy_loss" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [({"tensor": 2}, "fp32"), pytest.param({}, "bf16", marks=pytest.mark.exhaustive)],
    ids=["tensor 2", "data 2 in bf16"],
)
def test_a_run_that_is_broken_off_goes_on_with_its_best_and_its_patience(parallel, dtype, files, tmp_path):
    def settings(name: str) -> dict[str, Any]:
        changes: dict[str, Any] = {"parallel": parallel, "model": {"dtype": dtype}}
        return overfitting(files, tmp_path / name, checkpoint={"every": 1, "keep": 1}, **changes)

    resumed, whole = resumed_and_whole(2, settings, 6)
    best, last = best_of(whole), int(whole[-1]["step"])
    assert resumed == whole and best < last - 1 == best + PATIENCE - 1
    for name in ("broken", "whole"):
        assert steps_in(tmp_path / name) == [best, last]
        assert_is_export_of(tmp_path / name, best, tmp_path / "of" / name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZeRO-2", "adapters"])
def test_the_best_checkpoint_is_exported_by_deepspeed_and_of_adapters(kind, files, tmp_path):
    changes: dict[str, dict[str, Any]] = {
        "adapters": {"adapter": {"kind": "lora", "rank": 4}, "reference": {"mode": "adapter"}}
    }
    if kind == "ZeRO-2":
        pytest.importorskip("deepspeed")
        changes[kind] = {"parallel": {"engine": "deepspeed", "zero_stage": 2}, "model": {"dtype": "bf16"}}
    settings = overfitting(files, tmp_path / "run", **changes[kind])
    settings["eval"] |= {"best_metric": "seen_loss", "best_direction": "max"}  # what is learned is worst at the first step
    (result,), _ = run_world(1, _train, settings)[0]
    assert (result.best_step, result.steps, steps_in(tmp_path / "run")) == (1, 1 + PATIENCE, [1, 1 + PATIENCE])
    assert_is_export_of(tmp_path / "run", 1, tmp_path)


def _with_callbacks(settings: dict[str, Any], ends_in: str) -> tuple[Any, list[Any]]:
    import megadpo

    heard: list[Any] = []

    def on_begin(info: Any) -> None:
        heard.append((info.num_steps, info.first_step, info.output_dir.name, len(info.engine.stage.parameters) > 0))

    def on_step_end(step: int, metrics: dict[str, float]) -> bool | None:
        heard.append(("step", step))
        return np.False_ if ends_in == "step" and step == 2 else None

    def on_evaluation(step: int, metrics: dict[str, float]) -> bool:
        heard.append(("evaluation", step))
        return not (ends_in == "evaluation" and step == 2)

    def compute_metrics(of: Any) -> dict[str, Any]:
        margins = 0.1 * (of.chosen(of.logps - of.reference_logps) - of.rejected(of.logps - of.reference_logps))
        heard.append((of.name, of.kind, of.rows.tolist(), of.lengths.min() > 0, len(of.labels)))
        assert np.allclose(margins, of.chosen(of.rewards) - of.rejected(of.rewards))
        return {"own_loss": np.logaddexp(0, -margins).mean(), f"eval_{of.name}_own/pairs": len(margins)}

    functions = {"on_begin": on_begin, "on_step_end": on_step_end, "on_evaluation": on_evaluation}
    return megadpo.train(settings, megadpo.Callbacks(**functions, compute_metrics=compute_metrics)), heard


@pytest.mark.slow
@pytest.mark.parametrize(("ends_in", "parallel"), [("step", {"pipeline": 2}), ("evaluation", {})])
def test_a_callback_ends_the_run_on_all_ranks_and_own_metrics_see_every_pair(ends_in, parallel, files, tmp_path):
    settings = overfitting(files, tmp_path / "run", parallel=parallel, eval={"every": 2, "best_metric": "noisy_own_loss"})
    results = run_world(2, _with_callbacks, settings, ends_in)
    (result, heard), (other, silent) = results
    assert silent == [] and heard[0] == (20, 0, "run", True)
    assert (result.steps, result.best_step, result.best_value) == (other.steps, other.best_step, other.best_value)
    assert (result.steps, result.best_step, result.ended) == (
        2,
        2,
        f"on_{ends_in}{'_end' * (ends_in == 'step')} returned False",
    )
    seen = [one for one in heard if one[0] in ("noisy", "seen")]
    assert seen == [("noisy", "pairs", list(range(4)), True, 8), ("seen", "pairs", list(range(4)), True, 8)]
    (last,) = [record for record in read_metrics(tmp_path / "run") if METRIC in record]
    assert last["eval_noisy_own_loss"] == pytest.approx(last[METRIC], rel=1e-9)
    assert (last["eval_noisy_own/pairs"], last["eval_seen_own/pairs"]) == (4, 4)
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002").state["ended"]["by"] == "callback"


def _own_objectives(named: dict[str, Any], given: dict[str, Any]) -> None:
    import megadpo
    from examples.custom_objective import squared_hinge

    megadpo.train(named)
    megadpo.train(given, objective=squared_hinge)


@pytest.mark.slow
def test_a_function_is_the_objective_as_the_same_one_in_a_file_is(files, tmp_path):
    changes = {
        "train": {"steps": 2},
        "data": {"eval": str(files / "few.jsonl")},
        "eval": {"every": 0, "best_metric": None, "patience": None},
    }
    custom: dict[str, Any] = {"loss_type": "custom"}
    named = overfitting(files, tmp_path / "named", objective=custom | {"module": EXAMPLE}, **changes)
    run_world(1, _own_objectives, named, overfitting(files, tmp_path / "given", objective=custom, **changes))
    first, second = read_metrics(tmp_path / "named"), read_metrics(tmp_path / "given")
    assert first == second and first[0]["loss"] == pytest.approx(1.0) and first[-1]["eval_loss"] < 1
    assert "module: examples.custom_objective.squared_hinge" in (tmp_path / "given" / "config.yaml").read_text()


def _as_the_manual_says(workplace: str, page: str) -> Any:
    import megadpo.cli

    os.chdir(workplace)
    os.environ["MEGADPO_CACHE"] = f"{workplace}/cache"
    assert megadpo.cli.main(["train", "run.yaml"]) == 0
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"__name__": "script"}
    exec(script, names)
    return names["result"]


@pytest.mark.slow
def test_what_the_manual_shows_runs(files, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "held_out.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "run.yaml").write_text(text)
    shutil.copytree(files / "model", tmp_path / "models" / "start")
    rows = (files / "train.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("pairs", rows[:16]), ("helpful", rows[16:20]), ("harmless", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    result = run_world(1, _as_the_manual_says, str(tmp_path), page)[0]
    records = read_metrics(tmp_path / "runs" / "best")
    assert [record["step"] for record in records if "eval_helpful_loss" in record] == [0, 2, 4]
    assert "eval_harmless_worst_margin" in read_metrics(tmp_path / "runs" / "own")[-1]
    assert result.ended is None and result.best_step in (2, 4) and result.model_path == Path("runs/own/hf")


@pytest.mark.parametrize(
    ("options", "function", "words"),
    [
        ({}, len, "objective=builtins.len was given, but objective.loss_type is sigmoid"),
        (
            {"loss_type": "custom", "module": EXAMPLE},
            len,
            "and objective.module is examples/custom_objective.py:squared_hinge",
        ),
        ({"loss_type": "custom"}, 3, "objective is a int, not a function"),
    ],
)
def test_a_function_that_cannot_be_the_objective_is_refused(options, function, words):
    import megadpo

    with pytest.raises(UserError, match=re.escape(words)):
        megadpo.train({"objective": options}, objective=function)
