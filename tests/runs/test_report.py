"""The report that every run leaves: of a healthy run on real rows it is silent, of a spike it names the pairs, of a run that
failed it says why, and a resumed run goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from megadpo.report.findings.every import findings_of
from megadpo.report.run_files import read_run
from tests.helpers.runs import run_settings, save_files, train_run
from tests.helpers.worlds import run_world

SPIKED, STEPS = 22, 24


def status_at_close(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Sessions in run.json when a run that fails begins to close what it has open."""
    from megadpo.training import trainer

    original, seen = trainer.Run.close, []

    def closing(run: Any, *arguments: Any, **named: Any) -> None:
        seen.extend(json.loads((run.setup.output_dir / "run.json").read_bytes())["sessions"])
        original(run, *arguments, **named)

    def fail(run: Any) -> Any:
        raise UserError("the reason")

    trainer.Run.close, loop, trainer.training_loop = closing, trainer.training_loop, fail  # type: ignore[method-assign]
    try:
        train_run(settings)
    except UserError:
        return seen
    finally:
        trainer.Run.close, trainer.training_loop = original, loop  # type: ignore[method-assign]
    raise AssertionError("the run has not failed")


def test_how_a_run_failed_is_written_before_anything_is_waited_for(tmp_path: Path) -> None:
    settings = run_settings(save_files(tmp_path / "files", "llama", 20), tmp_path / "run", train={"steps": 2})
    (session,) = run_world(1, status_at_close, settings)[0]
    assert (session["status"], session["reason"]) == ("failed", "the reason")
    assert "the reason" in (tmp_path / "run" / "report.html").read_text()


def with_a_spike(settings: dict[str, Any], at: int | None) -> tuple[str | None, list[int]]:
    """Train, with gradients that are 10,000 times too large at one step; how the run fails, and the rows of that step."""
    from megadpo.training import step as step_module
    from megadpo.training import trainer

    original, original_step, current, rows = step_module.optimizer_step, trainer.training_step, [0], []

    def stepping(run: Any, number: int) -> Any:
        current[0] = number + 1
        if current[0] == at:
            rows.extend(run.setup.train.groups.rows[run.setup.sampler.group_ids(number)].tolist())
        return original_step(run, number)

    def spiking(engine: Any, *arguments: Any, **named: Any) -> Any:
        def enlarge() -> None:
            for _, _, _, values in engine.own_gradients() if current[0] == at else ():
                values.mul_(1e4)

        return original(engine, *arguments, on_gradients=enlarge, **named)

    step_module.optimizer_step, trainer.training_step = spiking, stepping
    try:
        train_run(settings)
    except UserError as error:
        return str(error), rows
    finally:
        step_module.optimizer_step, trainer.training_step = original, original_step
    return None, rows


def stopped_and_going_on(settings: dict[str, Any], copy: str) -> tuple[str | None, list[int]]:
    """A run that a spike stops, what it has left being copied, and that then goes on; how it failed, and the step's rows."""
    failed = with_a_spike(settings, SPIKED)
    shutil.copytree(settings["output_dir"], copy)
    assert with_a_spike(settings, None) == (None, [])
    return failed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that failed at a spike, and the same run gone on to its end, on real rows."""
    directory = tmp_path_factory.mktemp("report")
    files = save_files(directory / "files", "qwen3", 120, num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    settings = run_settings(
        files,
        directory / "run",
        data={"eval": str(files / "eval.jsonl")},
        train={"steps": STEPS, "tokens_per_micro_batch": 2048, "on_spike": "stop"},
        eval={"every": 8},
        checkpoint={"every": 10, "at_end": False},
    )
    (sentence, rows) = run_world(1, stopped_and_going_on, settings, str(directory / "failed"))[0]
    return {"run": directory / "run", "failed": directory / "failed", "sentence": sentence, "rows": rows}


def findings(directory: Path) -> dict[str, Any]:
    return {finding.name: finding for finding in findings_of(read_run(directory))}


@pytest.mark.slow
def test_a_healthy_run_on_real_rows_leaves_a_page_and_is_silent(made: dict[str, Any]) -> None:
    run = read_run(made["run"])
    assert findings(made["run"]) == {} and run.damaged == () and run.spikes == []
    assert (run.status, run.last_step, run.num_steps) == ("finished", STEPS, STEPS)
    page = (made["run"] / "report.html").read_text()
    for text in (f"finished: {STEPS} of {STEPS} steps", "Nothing stands out", "tensor 1 x pipeline 1 x data 1", "qwen3"):
        assert text in page


def test_lengths_of_answers_and_margins_by_length_are_written(made: dict[str, Any]) -> None:
    run = read_run(made["run"])
    assert len(run.curve("lengths/chosen")) == len(run.curve("lengths/rejected")) == STEPS
    mean = sum(run.curve("lengths/chosen").values) / STEPS
    assert run.fact("data", "train", "lengths/chosen") == pytest.approx(mean, rel=0.3)
    assert len(run.curve("rewards/margins_chosen_longer")) > 10 and len(run.curve("eval_rewards/margins_chosen_longer")) == 3


def test_a_spike_names_the_pairs_of_its_step(made: dict[str, Any]) -> None:
    finding = findings(made["failed"])["gradient_spikes"]
    assert finding.step == SPIKED and "gradient norm" in finding.what and "updated nothing" in finding.what
    assert (
        len(made["rows"]) == 8 and len(finding.pairs) == 5 and {pair["row"] for pair in finding.pairs} <= set(made["rows"])
    )
    shares = [pair["share"] for pair in finding.pairs]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert all(pair["chosen_logp"] < 0 and pair["chosen_tokens"] > 0 and pair["chosen"] for pair in finding.pairs)


def test_a_run_that_failed_says_why_and_the_one_that_goes_on_has_both_ends(made: dict[str, Any]) -> None:
    failed = findings(made["failed"])
    assert made["sentence"] is not None and made["sentence"].startswith(f"step {SPIKED}: the gradient norm")
    assert failed["did_not_finish"].level == "problem" and f"step {SPIKED}" in failed["did_not_finish"].what
    assert "The run failed" in (made["failed"] / "report.html").read_text()
    went_on = read_run(made["run"])
    assert [one["status"] for one in went_on.sessions] == ["failed", "finished"]
    assert went_on.sessions[1]["first_step"] == 20


def test_a_disk_that_refuses_the_record_and_the_page_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from types import SimpleNamespace
    from unittest import mock

    from megadpo.training import run_record

    logging = SimpleNamespace(report=True)
    setup: Any = SimpleNamespace(output_dir=tmp_path / "gone", resume=None, config=SimpleNamespace(logging=logging))
    with mock.patch.object(run_record, "facts_of", lambda setup: {}), run_record.recorded() as record:
        record.begin(setup)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2][:8] for line in said] == ["warning:"] * 3 and "run.json cannot be written" in said[0]
    assert json.dumps(said).count("gone") == 3


@pytest.mark.slow
def test_a_spike_is_written_down_where_a_rank_has_a_micro_batch_without_pairs(tmp_path: Path) -> None:
    files = save_files(tmp_path / "files", "llama", 30, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    settings = run_settings(
        files,
        tmp_path / "run",
        train={"steps": 26, "pairs_per_step": 3, "tokens_per_micro_batch": 256, "spike_deviations": 1e-3},
    )
    metrics = run_world(2, train_run, settings)[0]
    spikes = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    assert len(metrics) == 26 and spikes and all(len(spike["pairs"]) == 3 for spike in spikes)
