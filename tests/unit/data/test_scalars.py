"""Margins, weights, scores and probabilities: read where they are asked for, for every row, in their range, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config.schema import DataConfig
from megadpo.config.sources import parse_sources
from megadpo.data.rows import dataset as prepare
from megadpo.data.rows.cache_key import cache_key
from megadpo.data.rows.dataset import make_groups, prepare_groups
from megadpo.data.rows.formats import Reading, recognise
from megadpo.errors import UserError

PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}
TALK = {"prompt": [{"role": "user", "content": "Sky?"}], "chosen": "Blue.", "rejected": "Green."}
ALL = frozenset({"margin", "weight", "label_probability", "score"})
FIELD = {"score": "chosen_score"}


def asking(*names: str, kind: str = "pairs") -> Reading:
    return Reading(kind, frozenset(names))


def refusal(row: dict[str, Any], reading: Reading) -> str:
    with pytest.raises(UserError) as caught:
        recognise(row, "f:9", reading)
    return str(caught.value)


@pytest.mark.parametrize("pair", [PAIR, TALK], ids=["text", "conversation"])
def test_numbers_are_read_beside_any_format_once_for_each_response(pair: dict[str, Any]) -> None:
    fields = {"margin": 0, "weight": 2, "chosen_score": -8.5, "rejected_score": 1e-3, "label_probability": Decimal("0.75")}
    row = recognise(pair | fields, "f:1", Reading("pairs", ALL))
    assert row.row_values == {
        "margin": (0.0, 0.0),
        "weight": (2.0, 2.0),
        "score": (-8.5, 1e-3),
        "label_probability": (0.75, 0.75),
    }
    assert all(type(value) is float for values in row.row_values.values() for value in values)


@pytest.mark.parametrize("value", ["heavy", None, float("nan"), -3, [1]])
@pytest.mark.parametrize("kind", ["pairs", "labels", "lists", "examples"])
def test_numbers_that_were_not_asked_for_are_not_looked_at(value: object, kind: str) -> None:
    stray = {"weight": value, "margin": value, "label_probability": value}
    assert recognise(PAIR | stray, "f:1", Reading(kind)) == recognise(PAIR, "f:1", Reading(kind))


@pytest.mark.parametrize(
    ("kind", "row", "num_responses"),
    [
        ("labels", {"prompt": "a", "completion": "b", "label": True}, 1),
        ("labels", PAIR, 2),
        ("lists", {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [3, 1, 2]}, 3),
        ("examples", {"text": "a"}, 1),
        ("examples", PAIR, 1),
    ],
)
def test_a_weight_stands_beside_rows_of_every_kind(kind: str, row: dict[str, Any], num_responses: int) -> None:
    assert (
        recognise(row | {"weight": 0.5}, "f:1", asking("weight", kind=kind)).row_values["weight"] == (0.5,) * num_responses
    )


@pytest.mark.parametrize(
    "spelled",
    [
        {"chosen_score": 3, "rejected_score": 1},
        {"score_chosen": 3, "score_rejected": 1},
        {"chosen_rating": 3, "rejected_rating": 1},
        {"score_chosen": 3, "chosen_rating": 3.0, "chosen_score": None, "rejected_rating": 1},
    ],
)
def test_scores_have_three_spellings(spelled: dict[str, Any]) -> None:
    assert recognise(PAIR | spelled, "f:1", asking("score")).row_values == {"score": (3.0, 1.0)}


def test_spellings_that_disagree_are_refused() -> None:
    message = refusal(PAIR | {"chosen_rating": 4, "score_chosen": 3, "rejected_score": 1}, asking("score"))
    assert message.startswith(
        "f:9: `score_chosen` is 3 but `chosen_rating` is 4; name the one that is meant in data.columns"
    )


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("missing", [{}, None])
def test_a_number_that_was_asked_for_must_be_in_every_row(name: str, missing: object) -> None:
    row = PAIR | {"rejected_score": 1} | ({} if missing == {} else {FIELD.get(name, name): None})
    message = refusal(row, asking(name))
    assert message.startswith(f"f:9: the row lacks `{FIELD.get(name, name)}`") and "null counts as lacking" in message
    assert message.endswith("add it, rename a field to it with data.columns, or drop the row")


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("value", ["0.5", "", True, False, float("nan"), float("inf"), 10**400, [0.5], {"value": 1}])
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    message = refusal(PAIR | {"rejected_score": 1, FIELD.get(name, name): value}, asking(name))
    assert message.startswith(f"f:9: `{FIELD.get(name, name)}` is {value!r:.40}; it must be a ")
    assert message.endswith("; correct or drop the row")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("weight", -1e-9, "it must be a finite number of at least 0"),
        ("label_probability", -0.1, "it must be a number from 0 to 1"),
        ("label_probability", 1.0000001, "it must be a number from 0 to 1"),
        ("margin", -2, "a margin says by how much the chosen answer is better and cannot be negative; swap or drop the row"),
    ],
)
def test_numbers_out_of_their_range_are_refused(name: str, value: float, what: str) -> None:
    assert refusal(PAIR | {name: value}, asking(name)).startswith(f"f:9: `{name}` is {value}; {what}")


@pytest.mark.parametrize("text", ["NaN", "Infinity", '"1"', "true", "1e999", "null"])
def test_json_that_is_no_finite_number_is_refused_with_its_line(
    text: str, options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    line = json.dumps(PAIR)[:-1] + ', "margin": '
    file.write_text(f"{line}1}}\n{line}{text}}}\n")
    with pytest.raises(UserError, match=r"a.jsonl:2: .*`margin`"):
        prepare_groups(options, str(file), bpe_dir, asking("margin"))
    assert len(prepare_groups(options, str(file), bpe_dir).groups) == 2


def test_numbers_follow_their_rows_past_dropped_ones_and_through_the_cache(
    options: DataConfig, hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path: Path, write_jsonl: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = [row | {"margin": n / 7, "score_chosen": -n, "score_rejected": n} for n, row in enumerate(hh_rows[:300])]
    file = write_jsonl(tmp_path / "hh.jsonl.gz", rows)
    for _ in range(2):
        groups = prepare_groups(options, file, bpe_dir, asking("margin", "score")).groups
        assert len(groups) == 299 and sorted(groups.row_values) == ["margin", "score"]
        assert np.array_equal(groups.row_values["margin"], np.repeat(groups.rows / 7, 2))
        assert np.array_equal(groups.row_values["score"], np.stack([-groups.rows, groups.rows], axis=1).ravel())
        assert groups[200].row_values["score"] == (-groups.rows[200], groups.rows[200])
        monkeypatch.setattr(prepare, "make_groups", None)


@pytest.mark.exhaustive
def test_processes_give_the_numbers_that_one_process_gives(
    hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    rows = [{**row, "weight": number} for number, row in enumerate(hh_rows)]
    sources = parse_sources(write_jsonl(tmp_path / "hh.jsonl", rows))
    job = prepare.TokeniseJob(bpe_dir, None, 64, "keep_end", asking("weight", kind="labels"))
    alone, alone_report = make_groups(sources, job, num_workers=1)
    many, many_report = make_groups(sources, job, num_workers=2)
    assert many.digest == alone.digest and many_report == alone_report
    assert np.array_equal(many.row_values["weight"], np.repeat(many.rows, np.diff(many.response_offsets_G)))


def test_the_cache_is_of_one_reading(options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"margin": 1, "weight": 2}])
    readings = [Reading(), asking("margin"), asking("weight"), asking("margin", "weight")]
    readings += [Reading("labels"), Reading("lists"), Reading("examples"), asking("weight", kind="examples")]
    keys = set()
    for reading in readings:
        job = prepare.TokeniseJob(bpe_dir, None, 64, "prompt_left", reading)
        keys.add(cache_key(parse_sources(file), job))
        names = set(prepare_groups(options, file, bpe_dir, reading).groups.row_values)
        assert names - {"label", "score"} == reading.row_values
    assert len(keys) == len(readings)


def test_a_dropped_row_must_have_the_numbers_too(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"weight": 1}, PAIR | {"chosen": ""}])
    with pytest.raises(UserError, match=r"a.jsonl:2: the row lacks `weight`"):
        prepare_groups(options, file, bpe_dir, asking("weight"))


def test_sources_may_spell_the_same_numbers_differently(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    from datasets import Dataset

    trl = Dataset.from_list([PAIR | {"score_chosen": 8.5, "score_rejected": 3.0}] * 2)
    rated = write_jsonl(tmp_path / "rated.jsonl", [PAIR | {"chosen_rating": 5, "rejected_rating": 4}])
    own = write_jsonl(tmp_path / "own.jsonl", [PAIR | {"good": 0.5, "rejected_score": 0.25, "score_chosen": "n/a"}])
    renamed = {"path": own, "columns": {"chosen_score": "good"}}
    groups = prepare_groups(options, [trl, rated, renamed], bpe_dir, asking("score")).groups
    assert groups.row_values["score"].tolist() == [8.5, 3.0, 8.5, 3.0, 5.0, 4.0, 0.5, 0.25]


def test_naming_another_field_for_a_number_reads_that_one(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"margin": 1, "gap": 2}])
    for columns, margin in (({}, 1.0), ({"margin": "gap"}, 2.0)):
        groups = prepare_groups(replace(options, columns=columns), file, bpe_dir, asking("margin")).groups
        assert groups.row_values["margin"].tolist() == [margin, margin]


def test_parquet_numbers_of_any_width_are_read_and_its_nulls_are_lacking(
    options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = (pyarrow.int32(), pyarrow.float32(), pyarrow.float64(), pyarrow.decimal128(5, 2))
    for kind in kinds:
        for margins in ([2, 3], [2, None]):
            columns = {**{name: [value, value] for name, value in PAIR.items()}, "margin": pyarrow.array(margins, kind)}
            file = tmp_path / f"{kind.id}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(columns), file)
            if None in margins:
                with pytest.raises(UserError, match=rf"{kind.id}.parquet: row 1: the row lacks `margin`"):
                    prepare_groups(options, str(file), bpe_dir, asking("margin"))
            else:
                row_values = prepare_groups(options, str(file), bpe_dir, asking("margin")).groups.row_values
                assert row_values["margin"].tolist() == [2.0, 2.0, 3.0, 3.0]
