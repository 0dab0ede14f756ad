"""Training as a whole: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import oracle
from tests.helpers.models import groups_of_file, hh_rows, save_model, write_hh
from tests.helpers.runs import (
    assert_same_weights,
    log_probs,
    read_metrics,
    resumed_and_whole,
    run_settings,
    train_each,
    train_run,
)
from tests.helpers.worlds import run_world


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A tied model with a tokenizer, training pairs and held-out pairs."""
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "qwen3", tie_word_embeddings=True, num_hidden_layers=2)
    rows = write_hh(directory / "train.jsonl", 60).read_text().splitlines(keepends=True)
    (directory / "eval.jsonl").write_text("".join(rows[-12:]))
    return directory


@pytest.mark.parametrize(
    ("num_processes", "parallel", "dtype", "moments"),
    [
        pytest.param(2, {"tensor": 2}, "fp32", "fp32", marks=pytest.mark.exhaustive),
        pytest.param(2, {"pipeline": 2}, "bf16", "fp32", marks=pytest.mark.exhaustive),
        pytest.param(2, {}, "bf16", "bf16", marks=pytest.mark.slow),
    ],
    ids=["tensor 2", "pipeline 2 in bf16", "data 2 in bf16, moments too"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(files, tmp_path, num_processes, parallel, dtype, moments):
    def settings(name: str) -> dict[str, Any]:
        # 60 rows and 8 pairs a step: step 8 crosses into the second epoch
        return run_settings(
            files,
            tmp_path / name,
            model={"dtype": dtype},
            parallel=parallel,
            train={"steps": 9, "moments_dtype": moments},
            checkpoint={"every": 3, "keep": 1},
        )

    resumed, whole = resumed_and_whole(num_processes, settings, 5)
    assert resumed == whole and [record["step"] for record in resumed] == list(range(1, 10))
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_goes_on_in_another(files, tmp_path):
    def settings(name: str, parallel: dict[str, int]) -> dict[str, Any]:
        return run_settings(files, tmp_path / name, parallel=parallel, train={"steps": 4}, checkpoint={"every": 2})

    whole = run_world(1, train_run, settings("whole", {}))[0]
    run_world(2, train_run, settings("moved", {"tensor": 2}), 3)
    moved = run_world(2, train_run, settings("moved", {"pipeline": 2}))[0]
    for a, b in zip(moved, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def _train_with_datasets(settings: dict[str, Any], rows: list[dict[str, str]]) -> tuple[Any, list[str]]:
    import threading

    import torch.distributed as dist
    from datasets import Dataset

    import megadpo
    from megadpo.training.run import Callbacks

    heard: list[str] = []
    settings["data"]["train"] = Dataset.from_list(rows)
    result = megadpo.train(
        settings,
        Callbacks(
            on_step_end=lambda step, metrics: heard.append(f"step {step}"),
            on_evaluation=lambda step, metrics: heard.append(f"evaluation {step} {'eval_loss' in metrics}"),
            on_save=lambda step, directory: heard.append(f"save {step} {directory.name}"),
        ),
    )
    assert not dist.is_initialized(), "a guest leaves no process group behind"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megadpo")], "and no thread"
    return result, heard


def test_the_python_interface_takes_datasets_and_callbacks_and_returns_metrics_and_path(files, tmp_path):
    settings = run_settings(files, tmp_path / "run", train={"steps": 2}, eval={"every": 1}, checkpoint={"every": 2})
    settings["data"]["eval"] = str(files / "eval.jsonl")
    result, heard = run_world(1, _train_with_datasets, settings, hh_rows(30))[0]
    assert heard == ["evaluation 1 True", "step 1", "evaluation 2 True", "step 2", "save 2 step_00000002"]
    assert result.steps == 2 and result.metrics["step"] == 2 and "eval_rewards/accuracies" in result.metrics
    assert result.metrics["num_tokens"] > 0 and 0 <= result.metrics["data_wait_seconds"] < result.metrics["step_seconds"]
    assert result.model_path == tmp_path / "run" / "hf"
    oracle.load(result.model_path)


@pytest.mark.slow
def test_the_export_is_the_trained_model_and_transformers_loads_it(files, tmp_path):
    from transformers import AutoTokenizer

    changes = {"train": {"steps": 2}, "parallel": {"tensor": 2, "pipeline": 2}, "checkpoint": {"every": 2}}
    run_world(4, train_run, run_settings(files, tmp_path / "run", **changes))
    run_world(1, train_run, run_settings(files, tmp_path / "single", train={"steps": 2}))
    model, start = oracle.load(tmp_path / "run" / "hf"), oracle.load(files / "model")
    single = dict(oracle.load(tmp_path / "single" / "hf").named_parameters())
    for (name, trained), (_, before) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        assert not torch.equal(trained, before), name
        assert torch.allclose(trained, single[name], rtol=1e-4, atol=1e-5), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    assert tokenizer("Human")["input_ids"] == AutoTokenizer.from_pretrained(files / "model")("Human")["input_ids"]
    from megadpo.checkpoint.convert import export_checkpoint

    export_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "converted")
    converted = dict(oracle.load(tmp_path / "converted").named_parameters())
    assert all(torch.equal(converted[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_a_precomputed_reference_gives_the_resident_one_s_run_and_is_computed_once(files, tmp_path):
    capacity = {"mode": "precomputed", "tokens_per_micro_batch": 1024}
    resident = run_world(1, train_run, run_settings(files, tmp_path / "resident"))[0]
    first = run_world(2, train_run, run_settings(files, tmp_path / "first", reference=capacity, parallel={"tensor": 2}))[0]
    cached = list((files / "cache" / "reference").glob("*.safetensors"))
    assert len(cached) == 1
    written = cached[0].stat().st_mtime_ns
    second = run_world(1, train_run, run_settings(files, tmp_path / "second", reference=capacity))[0]
    assert cached[0].stat().st_mtime_ns == written, "the second run reads what the first one wrote"
    for run in (first, second):
        assert abs(run[0]["rewards/margins"]) < 1e-4 and run[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        for a, b in zip(run, resident, strict=True):
            for name in ("loss", "grad_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.slow
def test_the_reference_cache_is_not_used_for_other_weights(files, tmp_path):
    mode = {"mode": "precomputed"}
    one_step = {"steps": 1, "warmup_steps": 0}
    first = run_settings(files, tmp_path / "first", reference=mode, train=one_step)
    save_model(tmp_path / "other", "qwen3", seed=7, tie_word_embeddings=True, num_hidden_layers=2)
    changed = run_settings(
        files, tmp_path / "second", reference=mode | {"path": str(tmp_path / "other")}, train={"steps": 1, "warmup_steps": 0}
    )
    assert abs(run_world(1, train_each, [first, changed])[0][1][0]["rewards/margins"]) > 1e-2


@pytest.mark.slow
def test_runs_of_the_same_seed_agree_and_of_another_do_not(files, tmp_path):
    def settings(name: str, seed: int) -> dict[str, Any]:
        return run_settings(files, tmp_path / name, train={"steps": 2, "seed": seed})

    (one,) = run_world(1, train_run, settings("one", 1))
    other, again = run_world(1, train_each, [settings("other", 2), settings("again", 1)])[0]
    assert one == again and one[0]["logps/chosen"] != other[0]["logps/chosen"]


@pytest.mark.parametrize(("num_processes", "parallel", "share"), [(1, {}, True), (2, {"pipeline": 2}, False), (2, {}, True)])
def test_logprobs_writes_a_line_a_pair_that_transformers_agrees_with(files, tmp_path, num_processes, parallel, share):
    arguments = (files / "model", files / "eval.jsonl", tmp_path / "out.jsonl", parallel, share, files / "cache")
    run_world(num_processes, log_probs, *arguments)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(list(line) == ["index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"] for line in lines)
    groups = {group.row: group for group in groups_of_file(files / "eval.jsonl", files / "model", max_length=128)}
    assert [line["index"] for line in lines] == list(groups) and len(lines) >= 10
    model = oracle.load(files / "model")
    for line in lines:
        group = groups[line["index"]]
        expected = oracle.all_logps(model, [group])[0]
        assert line["chosen_logp"] == pytest.approx(float(expected[0]), abs=1e-4)
        assert line["rejected_logp"] == pytest.approx(float(expected[1]), abs=1e-4)
        assert (line["chosen_tokens"], line["rejected_tokens"]) == tuple(len(r) for r in group.responses)


def test_logging_every_thins_the_records_but_never_the_last_one_or_an_evaluation(files, tmp_path):
    settings = run_settings(
        files, tmp_path / "run", logging={"every": 3}, eval={"every": 4}, data={"eval": str(files / "eval.jsonl")}
    )
    records = run_world(1, train_run, settings)[0]
    assert [record["step"] for record in records] == [3, 4, 5] and "eval_loss" in records[1]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(files, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: step 2: the gradient norm is .*, so nothing was updated"):
        run_world(1, train_run, run_settings(files, tmp_path / "run", train={"learning_rate": 1e30, "warmup_steps": 0}))


@pytest.mark.slow
def test_a_process_may_train_more_than_once(files, tmp_path):
    settings = [
        run_settings(files, tmp_path / name, train={"steps": 2}, parallel={"tensor": 2}) for name in ("first", "second")
    ]
    first, second = run_world(2, train_each, settings)[0]
    assert first == second


def _heard_twice(settings: dict[str, Any]) -> list[tuple[dict[str, float], str]]:
    """A run's metrics and what it says, and those of the same command again."""
    import megadpo

    heard = []
    for _ in range(2):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            heard.append((megadpo.train(settings).metrics, said.getvalue()))
    return heard


def test_asking_again_for_a_finished_run_gives_its_metrics_and_says_that_nothing_was_left_to_do(files, tmp_path):
    settings = run_settings(files, tmp_path / "run", train={"steps": 2}, checkpoint={"every": 2})
    (first, said), (again, said_again) = run_world(1, _heard_twice, settings)[0]
    assert again == first and again["step"] == 2
    assert "nothing is left to train" not in said
    assert said_again.count("nothing is left to train: all 2 steps are done; only the model is exported again") == 1


@pytest.mark.slow
def test_starting_over_sets_old_checkpoints_aside_and_keeps_the_new_ones(files, tmp_path):
    def settings(steps: int, resume: str) -> dict[str, Any]:
        checkpoint = {"every": 2, "keep": 1, "resume": resume}
        return run_settings(files, tmp_path / "run", train={"steps": steps}, checkpoint=checkpoint)

    run_world(1, train_run, settings(6, "auto"))
    run_world(1, train_run, settings(4, "never"))
    found = sorted(str(p.relative_to(tmp_path / "run" / "checkpoints")) for p in tmp_path.rglob("step_*"))
    assert found == ["aside-1/step_00000006", "step_00000004"]
    assert len(read_metrics(tmp_path / "run")) == 4 and (tmp_path / "run" / "metrics.1.jsonl").exists()


@pytest.mark.slow
def test_the_reference_cache_is_not_used_for_another_configuration_of_the_same_weights(files, tmp_path):
    import shutil

    mode, one_step = {"mode": "precomputed"}, {"steps": 1, "warmup_steps": 0}
    first = run_settings(files, tmp_path / "first", reference=mode, train=one_step)
    shutil.copytree(files / "model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    other = run_settings(files, tmp_path / "second", reference=mode, model={"path": str(tmp_path / "other")}, train=one_step)
    assert abs(run_world(1, train_each, [first, other])[0][1][0]["rewards/margins"]) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 1, "warmup_steps": 0}}, "is at step 2, beyond the 1 step of this run; raise train.steps"),
        (
            {"train": {"steps": 2, "warmup_steps": 0}, "data": {"max_length": 64}},
            "holds a different run .data.max_length was 128, now 64",
        ),
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_run_is_refused_at_once(files, tmp_path, changes, message):
    from megadpo.errors import UserError
    from megadpo.training.setup import prepare
    from megadpo.validation.load import load_config

    no_warm_up = {"steps": 2, "warmup_steps": 0}
    run_world(1, train_run, run_settings(files, tmp_path / "run", train=no_warm_up, checkpoint={"every": 2}))
    with pytest.raises(UserError, match=message):
        prepare(load_config(run_settings(files, tmp_path / "run", **changes)))


def _of_five_pairs(files: Path, directory: Path, parallel: dict[str, int]) -> list[dict[str, Any]]:
    """An epoch of five pairs, four a step, by two objectives."""
    (directory / "five.jsonl").write_text("".join((files / "train.jsonl").read_text().splitlines(keepends=True)[:5]))
    train = {"steps": None, "epochs": 1, "pairs_per_step": 4, "warmup_steps": 0}
    changes = {"data": {"train": str(directory / "five.jsonl")}, "parallel": parallel, "train": train}
    return [run_settings(files, directory / loss, objective={"loss_type": loss}, **changes) for loss in ("sigmoid", "aot")]


@pytest.fixture(scope="module")
def five_pairs_alone(files, tmp_path_factory) -> list[list[dict[str, float]]]:
    """Their records on one process."""
    return run_world(1, train_each, _of_five_pairs(files, tmp_path_factory.mktemp("alone"), {}))[0]


@pytest.mark.parametrize(
    "parallel",
    [{}, {"pipeline": 2}, pytest.param({"tensor": 2}, marks=pytest.mark.exhaustive)],
    ids=["data 4", "data 2 x pipeline 2", "data 2 x tensor 2"],
)
@pytest.mark.slow
def test_a_last_batch_of_fewer_pairs_than_replicas_is_trained_on_like_any_other(files, five_pairs_alone, tmp_path, parallel):
    found = run_world(4, train_each, _of_five_pairs(files, tmp_path, parallel))[0]
    for many, one in zip(found, five_pairs_alone, strict=True):
        assert len(one) == 2
        for a, b in zip(many, one, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
