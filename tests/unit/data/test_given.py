"""Rows from Python: each kind that is taken gives the rows that a file of them gives; others are answered in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config.schema import DataConfig
from megadpo.config.sources import parse_sources
from megadpo.data.rows.dataset import prepare_groups
from megadpo.data.rows.formats import Reading
from megadpo.data.rows.sources import iter_rows, split_taken
from megadpo.errors import UserError
from megadpo.validation.load import load_config

ROWS: list[dict[str, Any]] = [
    {"prompt": f"question {n}", "chosen": f" yes {n}", "rejected": f" no {n}", "margin": float(n)} for n in range(3)
]


def rows_of(value: Any, held_out: bool = False) -> list[Any]:
    return [row for source in parse_sources(value, held_out=held_out) for _, row in iter_rows(source)]


def test_every_kind_gives_the_same_rows(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict
    from pandas import DataFrame

    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    with_numpy = [{**row, "margin": np.float32(row["margin"])} for row in ROWS]
    dataset = Dataset.from_list(ROWS)
    for value in (
        str(tmp_path / "rows.jsonl"),
        ROWS,
        tuple(ROWS),
        with_numpy,
        {"path": ROWS},
        DataFrame(ROWS),
        {"path": DataFrame(ROWS), "weight": 1},
        dataset,
        DatasetDict(train=dataset, test=dataset.select([0])),
        [ROWS[:1], DataFrame(ROWS[1:2]), dataset.select([2])],
    ):
        found = rows_of(value)
        assert found == ROWS and all(type(row["margin"]) is float for row in found), type(value)


def test_numpy_in_rows_is_read_as_numbers_and_lists(options: DataConfig, bpe_dir: str) -> None:
    row = {"prompt": "p", "responses": np.array([" a", " b", " c"]), "scores": np.array([1, 3, 2])}
    plain = {"prompt": "p", "responses": [" a", " b", " c"], "scores": [1, 3, 2]}
    assert rows_of([row]) == [plain]
    labelled = [{"prompt": "p", "completion": f" {n}", "label": np.bool_(n % 2)} for n in range(4)]
    groups = prepare_groups(options, labelled, bpe_dir, Reading("labels")).groups
    assert groups.row_values["label"].tolist() == [0.0, 1.0, 0.0, 1.0]
    lists = prepare_groups(options, [row], bpe_dir, Reading("lists")).groups
    assert lists.row_values["score"].tolist() == [3.0, 2.0, 1.0]


def test_what_is_missing_in_a_table_is_null() -> None:
    from pandas import NA, DataFrame

    frame = DataFrame({"prompt": ["a", None, NA], "chosen": ["x", float("nan"), "z"]})
    assert rows_of(frame) == [
        {"prompt": "a", "chosen": "x"},
        {"prompt": None, "chosen": None},
        {"prompt": None, "chosen": "z"},
    ]


def test_rows_are_cached_by_their_content(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    from pandas import DataFrame

    for value in (ROWS, DataFrame(ROWS), [dict(row) for row in ROWS]):
        assert len(prepare_groups(options, value, bpe_dir).groups) == 3
    folder = Path(options.cache_dir or "") / "groups"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    prepare_groups(options, ROWS[:2], bpe_dir)
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2


def test_a_bad_row_is_named_by_its_number(options: DataConfig, bpe_dir: str) -> None:
    with pytest.raises(UserError, match=r"^list of dicts: row 1: the row lacks `chosen` and `rejected`; it has prompt"):
        prepare_groups(options, [ROWS[0], {"prompt": "p"}], bpe_dir)


def test_the_splits_of_a_dict_of_datasets_are_chosen_as_those_of_a_directory() -> None:
    from datasets import Dataset, DatasetDict

    parts = DatasetDict(train=Dataset.from_list(ROWS[:2]), test=Dataset.from_list(ROWS[2:]))
    assert rows_of(parts) == ROWS[:2] and rows_of(parts, held_out=True) == ROWS[2:]
    assert rows_of({"path": parts, "split": "test"}) == ROWS[2:]
    (source,) = parse_sources(parts)
    assert split_taken(source) == "of datasets.DatasetDict the train split"
    with pytest.raises(UserError, match=r"datasets\.DatasetDict has no split 'train'; it has test"):
        rows_of(DatasetDict(test=parts["test"]))


def test_the_configuration_says_what_was_given_and_its_copy_has_the_same_rows() -> None:
    from datasets import Dataset, DatasetDict
    from pandas import DataFrame

    dataset = Dataset.from_list(ROWS)
    for value, text in (
        (ROWS, "<list of dicts, 3 rows>"),
        (DataFrame(ROWS), "<pandas.DataFrame, 3 rows>"),
        (DatasetDict(train=dataset), "<datasets.DatasetDict, train>"),
    ):
        config = load_config({"data": {"train": value}})
        assert config.to_dict()["data"]["train"] == text and f"train: {text}" in config.to_yaml()
        assert config.resolved().data.train is config.data.train
        kind = text[1:].partition(",")[0].rstrip(">")
        with pytest.raises(
            UserError, match=f"this run was given a {kind} from Python; name a file or pass the {kind} again"
        ):
            rows_of(text)


def rows_once() -> Any:
    yield from ROWS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (rows_once(), "data is a generator, which can be read only once; give a list of its rows, or"),
        (iter(ROWS), "data is a list_iterator, which can be read only once"),
        (object(), "data is a builtins.object; give a path, a Hub id, a list of dicts, a pandas.DataFrame, or a Dataset"),
        ({"prompt": ["a", "b"], "chosen": ["x", "y"]}, "data is a dict of columns; give datasets.Dataset.from_dict"),
        ([{"pth": "a.jsonl"}], "data[0] has no path"),
        ({"prompt": "a", "chosen": "x"}, "rows are given as a list with a dict a row"),
    ],
    ids=["generator", "iterator", "object", "columns", "no path", "one row"],
)
def test_other_objects_are_answered_with_what_to_give(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_sources(value)
    assert str(caught.value).startswith(message) or message in str(caught.value)


def test_a_table_needs_rows_and_names() -> None:
    from pandas import DataFrame

    with pytest.raises(UserError, match=r"^data is a pandas\.DataFrame without a row"):
        parse_sources(DataFrame({"prompt": []}))
    with pytest.raises(UserError, match=r"whose columns are not all named by a text of their own"):
        parse_sources(DataFrame([[1, 2]]))


def test_an_iterable_dataset_needs_streaming_and_is_never_held_out() -> None:
    from datasets import IterableDataset

    dataset = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(UserError, match=r"^data\.train is a datasets\.IterableDataset, .* set data\.streaming to true and"):
        load_config({"data": {"train": dataset}})
    with pytest.raises(UserError, match=r"^data\.eval is a datasets\.IterableDataset, but held-out rows are scored whole"):
        load_config({"data": {"train": "a.jsonl", "eval": dataset}})
    streamed = load_config({"data": {"train": dataset, "streaming": True}, "train": {"steps": 3}})
    assert streamed.data.train is dataset
    assert load_config(streamed).data.train is dataset
    assert load_config({"data": {"streaming": True}, "train": {"steps": 3}}, (), {"train": dataset}).data.train is dataset
