"""Margins, weights, scores and probabilities of rows reach the groups that are made of them, or the run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config import DataConfig
from megadpo.data import prepare
from megadpo.data.prepare import prepare_groups
from megadpo.errors import UserError

PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}


def margins_of(prepared: prepare.Prepared) -> list[float]:
    margins = prepared.groups.number("margin")
    assert margins is not None
    return list(margins)


def test_numbers_follow_their_rows_past_dropped_ones_and_through_the_cache(
    options: DataConfig, hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    rows = [row | {"margin": number / 7, "weight": 2312 - number} for number, row in enumerate(hh_rows)]
    file = write_jsonl(tmp_path / "hh.jsonl.gz", rows)
    for _ in range(2):
        groups = prepare_groups(options, file, bpe_dir).groups
        assert len(groups) == 2308 and groups.number_names == ("margin", "weight")
        margins, weights = groups.number("margin"), groups.number("weight")
        assert margins is not None and np.array_equal(margins, groups.rows / 7)
        assert weights is not None and np.array_equal(weights, 2312 - groups.rows)
        first = groups.first(100).number("margin")
        assert first is not None and np.array_equal(first, groups.rows[:100] / 7)


def test_the_second_time_numbers_come_from_the_cache_alone(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"margin": 0.1}])
    digest = prepare_groups(options, file, bpe_dir).groups.digest
    monkeypatch.setattr(prepare, "make_groups", None)
    again = prepare_groups(options, file, bpe_dir)
    assert margins_of(again) == [0.1] and again.groups.digest == digest
    assert isinstance(again.groups.number("margin"), np.memmap)


def test_rows_without_numbers_make_groups_without(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    none = prepare_groups(options, write_jsonl(tmp_path / "a.jsonl", [PAIR]), bpe_dir).groups
    null = prepare_groups(options, write_jsonl(tmp_path / "b.jsonl", [PAIR | {"margin": None}]), bpe_dir).groups
    assert none.number_names == null.number_names == () and none.digest == null.digest


@pytest.mark.parametrize(
    ("one", "other", "lacking", "having"),
    [
        ([{"margin": 1}, {}], [{"margin": 1}], "one.jsonl:2", "one.jsonl:1"),
        ([{"margin": 1}, {"margin": None}], [{"margin": 1}], "one.jsonl:2", "one.jsonl:1"),
        ([{"margin": 1}] * 2, [{"margin": 1}, {}, {}], "other.jsonl:2", "one.jsonl:1"),
        ([{}, {}], [{}, {"margin": 1}], "one.jsonl:1", "other.jsonl:2"),
        ([{"weight": 1}], [{"margin": 1, "weight": 1}], "one.jsonl:1", "other.jsonl:1"),
        ([{"margin": 1}, {"weight": 1}], [{}], "one.jsonl:2", "one.jsonl:1"),
    ],
)
def test_numbers_in_some_rows_only_name_the_first_row_that_lacks_them(
    one: list[dict[str, Any]],
    other: list[dict[str, Any]],
    lacking: str,
    having: str,
    options: DataConfig,
    bpe_dir: str,
    tmp_path: Path,
    write_jsonl: Any,
) -> None:
    files = [
        write_jsonl(tmp_path / name, [PAIR | numbers for numbers in rows])
        for name, rows in (("one.jsonl", one), ("other.jsonl", other))
    ]
    message = rf"{lacking}: the row lacks `margin` .*which \S*{having} has; .*data.columns \{{margin: \"\"\}}"
    with pytest.raises(UserError, match=message):
        prepare_groups(options, files, bpe_dir)
    left_out = prepare_groups(replace(options, columns={"margin": "", "weight": ""}), files, bpe_dir)
    assert left_out.groups.number_names == ()


def test_a_dropped_row_must_have_the_numbers_too(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"chosen_rating": 1}, PAIR | {"chosen": ""}])
    message = r"a.jsonl:2: the row lacks `chosen_score` or `score_chosen` or `chosen_rating`"
    with pytest.raises(UserError, match=message):
        prepare_groups(options, file, bpe_dir)


def test_sources_may_spell_the_same_numbers_differently(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    from datasets import Dataset

    trl = Dataset.from_list([PAIR | {"score_chosen": 8.5, "score_rejected": 3.0}] * 2)
    rated = write_jsonl(tmp_path / "rated.jsonl", [PAIR | {"chosen_rating": 5, "rejected_rating": 4}])
    own = write_jsonl(tmp_path / "own.jsonl", [PAIR | {"good": 0.5, "rejected_score": 0.25, "score_chosen": "n/a"}])
    renamed = {"path": own, "columns": {"chosen_score": "good"}}
    groups = prepare_groups(options, [trl, rated, renamed], bpe_dir).groups
    chosen, rejected = groups.number("chosen_score"), groups.number("rejected_score")
    assert chosen is not None and chosen.tolist() == [8.5, 8.5, 5.0, 0.5]
    assert rejected is not None and rejected.tolist() == [3.0, 3.0, 4.0, 0.25]


def test_parquet_numbers_of_any_width_are_read_and_its_nulls_are_lacking(
    options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    for kind in (pyarrow.int32(), pyarrow.float32(), pyarrow.float64()):
        for margins in ([2, -3], [2, None]):
            table = pyarrow.table(
                {
                    **{name: [value, value] for name, value in PAIR.items()},
                    "margin": pyarrow.array(margins, kind),
                }
            )
            file = tmp_path / f"{kind}.parquet"
            pyarrow.parquet.write_table(table, file)
            if None in margins:
                with pytest.raises(UserError, match=rf"{kind}.parquet: row 1: the row lacks `margin`"):
                    prepare_groups(options, str(file), bpe_dir)
            else:
                assert margins_of(prepare_groups(options, str(file), bpe_dir)) == [2.0, -3.0]


@pytest.mark.parametrize("text", ["NaN", "Infinity", '"1"', "true", "1e999"])
def test_json_that_is_no_finite_number_is_refused_with_its_line(
    text: str, options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    line = json.dumps(PAIR)[:-1] + ', "margin": '
    file.write_text(f"{line}1}}\n{line}{text}}}\n")
    with pytest.raises(UserError, match=r"a.jsonl:2: `margin` is .*; it must be a finite number"):
        prepare_groups(options, str(file), bpe_dir)


def test_naming_another_field_for_a_number_changes_the_key(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR | {"margin": 1, "gap": 2}])
    assert margins_of(prepare_groups(options, file, bpe_dir)) == [1.0]
    assert margins_of(prepare_groups(replace(options, columns={"margin": "gap"}), file, bpe_dir)) == [2.0]
