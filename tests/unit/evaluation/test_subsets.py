"""Which subset a pair belongs to, and which text is a message."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megadpo.data.groups import Group
from megadpo.data.store import GroupColumns, GroupStore
from megadpo.errors import UserError
from megadpo.evaluation.request import open_run
from megadpo.evaluation.subsets import EvaluationData, LabelledRows, first_of_each, named_data, read_subsets, sources_of
from tests.helpers.evaluations import write_rows

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def read(directory: Path, files: dict[str, list[dict[str, Any]]], column: str | None = None) -> LabelledRows:
    """The subsets of files; a name with "=" is NAME=FILE."""
    words = []
    for name, rows in files.items():
        label, _, file = name.rpartition("=")
        path = write_rows(directory / file, rows)
        words.append(f"{label}={path}" if label else str(path))
    return read_subsets(named_data(words), {}, column)


def test_a_run_s_held_out_sets_are_subsets_by_their_names_and_eval_pairs_is_for_each(tmp_path: Path) -> None:
    held_out = {"easy": ["a.jsonl", {"path": "b.jsonl"}], "hard": "c.jsonl"}
    options = {"data": {"eval": held_out}, "output_dir": str(tmp_path), "model": {"path": "m"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    data = open_run(str(tmp_path / "run.yaml"), []).data
    assert [(one.name, one.value) for one in data] == [
        *[("easy", "a.jsonl"), ("easy", {"path": "b.jsonl"}), ("hard", "c.jsonl")]
    ]
    groups = [Group((np.array([row], np.int32),), (np.array([9], np.int32),), row) for row in range(6)]
    store = GroupStore(GroupColumns.of(groups, [0, 0, 1, 1, 2, 2]), ["a", "b", "c"])
    assert first_of_each(store, [one.name for one in data], 3).rows.tolist() == [0, 1, 2, 4, 5]
    assert first_of_each(store, [one.name for one in data], 1).sources.tolist() == [0, 2]
    assert first_of_each(store, [None] * 3, 3).rows.tolist() == [0, 1, 2]


def test_data_may_have_a_name_and_a_path_an_equals_sign() -> None:
    assert named_data(["a.jsonl", "hard=b.jsonl", "runs/lr=1/c.jsonl"]) == [
        EvaluationData("a.jsonl"),
        EvaluationData("b.jsonl", "hard"),
        EvaluationData("runs/lr=1/c.jsonl"),
    ]


def test_rows_without_the_column_are_one_subset_with_the_file_s_name_or_its_own(tmp_path: Path) -> None:
    rows = read(tmp_path, {"easy.jsonl": [PAIR, PAIR], "hard=more.jsonl": [PAIR]})
    assert rows.subsets == ["easy", "easy", "hard"]


def test_rows_with_the_column_are_of_its_subsets_and_those_that_lack_it_of_none(tmp_path: Path) -> None:
    files = {"a.jsonl": [PAIR | {"subset": "x"}, PAIR | {"subset": 3}, PAIR], "mine=b.jsonl": [PAIR | {"subset": "x"}]}
    rows = read(tmp_path, files)
    assert rows.subsets == ["x", "3", "(no subset)", "mine/x"]
    assert rows.has_text_prompts == [True, True]


def test_another_column_may_name_the_subset(tmp_path: Path) -> None:
    assert read(tmp_path, {"a.jsonl": [PAIR | {"category": "x", "subset": "y"}]}, "category").subsets == ["x"]


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    rows = read(tmp_path, {"one/eval.jsonl": [PAIR], "two/eval.jsonl": [PAIR]})
    assert rows.subsets == [str(tmp_path / folder / "eval.jsonl") for folder in ("one", "two")]


@pytest.mark.parametrize(
    ("rows", "column", "sentence"),
    [
        ([PAIR], "kind", "--subset-column kind: no row has it; the rows have prompt, chosen, rejected"),
        ([PAIR | {"subset": ["x"]}], None, "a.jsonl:1: `subset` is \\['x'\\]; a subset is a name"),
    ],
)
def test_what_is_no_subset_is_said(tmp_path: Path, rows: list[dict[str, Any]], column: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, {"a.jsonl": rows}, column)


def test_a_name_without_a_file_is_refused() -> None:
    for word in ("x=", "=x"):
        with pytest.raises(UserError, match="must be FILE or NAME=FILE"):
            named_data([word])


def test_prompts_that_are_messages_are_read_as_questions() -> None:
    data = [EvaluationData("a.jsonl"), EvaluationData({"path": "b.jsonl", "columns": {"prompt": "ask"}}, "b")]
    first, second = sources_of(data, {"chosen": "good"}, [False, True])
    assert first == {"path": "a.jsonl", "weight": 1.0, "columns": {"chosen": "good"}}
    assert second["columns"] == {"chosen": "good", "question": "ask"}
