"""Runs with `data.streaming`: the numbers of a stored data set in the same order, in any layout, and after any stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from tests.helpers.runs import (
    assert_same_weights,
    read_metrics,
    resumed_and_whole,
    run_settings,
    save_files,
    train_each,
    train_run,
)
from tests.helpers.worlds import run_world

STREAMED = {"streaming": True, "shuffle": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 60 rows of which three are of no use."""
    directory = save_files(tmp_path_factory.mktemp("files"), "qwen3", 60, tie_word_embeddings=True, num_hidden_layers=2)
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    for number in (3, 17, 41):
        rows[number]["rejected"] = rows[number]["chosen"]
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def settings(files: Path, output_dir: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = run_settings(files, output_dir, **changes)
    made["data"] |= data
    return made


def without_epoch(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "epoch"} for record in records]


def test_processes_that_draw_other_rows_end_with_a_sentence(files: Path, tmp_path: Path) -> None:
    for said in run_world(2, _train_on_own_rows, files, tmp_path):
        assert said.startswith("data.train gave other rows to some processes than to others"), said


def _train_on_own_rows(files: Path, output_dir: Path) -> str:
    """Every process reads a file of its own under the same name."""
    rank = int(os.environ["RANK"])
    own = output_dir / str(rank)
    own.mkdir()
    rows = (files / "train.jsonl").read_text().splitlines()
    (own / "train.jsonl").write_text("\n".join(rows[: len(rows) - rank][::-1]))
    os.chdir(own)
    made = settings(files, output_dir / "out", {**STREAMED, "train": "train.jsonl"}, train={"steps": 2, "pairs_per_step": 4})
    try:
        train_run(made)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_stream_in_the_file_s_order_is_bit_for_bit_the_stored_run_over_two_passes(files: Path, tmp_path: Path) -> None:
    changes = {"train": {"steps": 4, "pairs_per_step": 24}}
    stored, streamed = run_world(
        1,
        train_each,
        [
            settings(files, tmp_path / "stored", {"shuffle": False}, **changes),
            settings(files, tmp_path / "streamed", STREAMED, **changes),
        ],
    )[0]
    assert len(streamed) == 4 and without_epoch(streamed) == without_epoch(stored)
    assert [record["epoch"] for record in streamed] == [0.0, 0.0, 1.0, 1.0]
    assert_same_weights(tmp_path / "streamed", tmp_path / "stored")
    facts = json.loads((tmp_path / "streamed" / "run.json").read_text())
    assert facts["data"]["train"]["sentence"].startswith("96 of 101 pairs kept, 5 dropped (identical chosen and rejected), ")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_a_shuffled_stream_goes_on_with_the_pairs_of_the_unbroken_one(files: Path, tmp_path: Path, stop: int) -> None:
    def of(name: str) -> dict[str, Any]:
        data = {"streaming": True, "streaming_buffer": 16}
        return settings(files, tmp_path / name, data, train={"steps": 9}, checkpoint={"every": stop, "keep": 1})

    resumed, whole = resumed_and_whole(1, of, 2 * stop - 1)
    assert resumed == whole and len(whole) == 9
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "context": {"context": 2},
    "data": {},
    "deepspeed": {"engine": "deepspeed", "zero_stage": 2},
}


@pytest.mark.slow
def test_every_layout_streams_the_same_pairs(files: Path, tmp_path: Path) -> None:
    data, train = {"streaming": True, "streaming_buffer": 16}, {"steps": 3, "pairs_per_step": 24}
    single = run_world(1, train_run, settings(files, tmp_path / "single", data, train=train))[0]
    runs = [settings(files, tmp_path / name, data, train=train, parallel=parallel) for name, parallel in LAYOUTS.items()]
    for name, records in zip(LAYOUTS, run_world(2, train_each, runs)[0], strict=True):
        for found, expected in zip(records, single, strict=True):
            names = ("loss", "grad_norm", "lengths/chosen", "lengths/rejected", "num_tokens", "epoch", "rewards/margins")
            assert [found[key] for key in names] == pytest.approx([expected[key] for key in names], rel=1e-4, abs=1e-5), name


def _train_again(made: dict[str, Any], changes: dict[str, Any]) -> tuple[str, int]:
    """What a changed stream is answered with, and the steps of the run that accepts the change."""
    import megadpo

    megadpo.train(made)
    made["train"]["steps"] = 3
    made["data"] |= changes
    with pytest.raises(megadpo.UserError) as caught:
        megadpo.train(made)
    made["checkpoint"]["changed_inputs"] = "accept"
    megadpo.train(made)
    return str(caught.value), len(read_metrics(Path(made["output_dir"])))


def test_a_stream_that_is_drawn_otherwise_is_another_one(files: Path, tmp_path: Path) -> None:
    data = {"streaming": True, "streaming_buffer": 16}
    made = settings(files, tmp_path / "run", data, train={"steps": 2}, checkpoint={"every": 1})
    words, num_steps = run_world(1, _train_again, made, {"streaming_buffer": 8})[0]
    assert "data.shuffle, data.streaming_buffer or train.seed, by which data.train is streamed; put back" in words
    assert num_steps == 3


def _rows_from_python(made: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """The same rows as a list of dicts, as a table and as datasets, stored and streamed."""
    from datasets import DatasetDict, IterableDataset
    from pandas import DataFrame

    import megadpo

    dataset = IterableDataset.from_generator(lambda: iter(rows))
    records = []
    for number, (train, streaming) in enumerate(((rows, False), (DataFrame(rows), True), (dataset, True))):
        settings = {**made, "data": made["data"] | {"streaming": streaming}, "output_dir": f"{made['output_dir']}-{number}"}
        del settings["data"]["train"]
        held_out = DatasetDict(validation=__import__("datasets").Dataset.from_list(rows[:4]))
        megadpo.train(settings, train=train, eval=held_out)
        records.append(read_metrics(Path(settings["output_dir"])))
    return records


@pytest.mark.slow
def test_rows_from_python_of_every_kind_train_alike_on_every_rank(files: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    made = settings(files, tmp_path / "run", {"shuffle": False}, train={"steps": 2})
    for records in run_world(2, _rows_from_python, made, rows):
        listed, table, iterable = map(without_epoch, records)
        assert len(listed) == 2 and listed == table == iterable and "eval_validation_loss" in listed[-1]


@pytest.mark.slow
def test_the_page_s_commands_run(files: Path, tmp_path: Path) -> None:
    import re
    import shlex

    import yaml

    from tests.helpers.launched import finish_command

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (command,) = re.findall(r"^megadpo (train .*data\.streaming.*)$", page, re.MULTILINE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes((files / "train.jsonl").read_bytes())
    made = settings(files, Path("run"), {})
    del made["data"]["train"], made["train"]["steps"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made))
    status, output = finish_command(shlex.split(command.replace("train.steps=1000", "train.steps=2")), tmp_path)
    assert status == 0, output
    assert "train: read as the run goes on, drawn from a buffer of 10,000 rows" in output
    assert "train: 16 of 1" in output
    (script,) = re.findall(r"```python\n(import megadpo\n+rows = .*?)```", page, re.DOTALL)
    script = script.replace("MODEL_DIR", str(files / "model")).replace("runs/rows", str(tmp_path / "rows"))
    run_world(1, exec, script)
    assert len(read_metrics(tmp_path / "rows")) == 1
