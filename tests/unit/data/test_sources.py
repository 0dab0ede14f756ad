"""Files, directories and Hugging Face datasets as sources, and what is said about broken ones."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.sources import Source, parse_sources
from megadpo.data.rows.sources import iter_rows, split_taken
from megadpo.errors import UserError

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n} – é", "rejected": f"r{n}"} for n in range(5)]


def read(path: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return [row for _, row in iter_rows(Source(str(path) if isinstance(path, Path) else path, **kwargs))]


def write(path: Path) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "parquet.gz", "csv", "csv.gz"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / f"rows.{suffix}")) == ROWS


def test_json_may_also_hold_one_object_a_line_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "rows.json").write_text("\ufeff" + lines, encoding="utf-8")
    assert read(tmp_path / "rows.json") == ROWS
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(ROWS), encoding="utf-8")
    assert read(tmp_path / "list.json") == ROWS


def test_a_directory_gives_its_files_in_sorted_order_and_leaves_others_out(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0]), (".hidden.jsonl", ROWS[3])):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.json").write_text(json.dumps([ROWS[2]]))
    (tmp_path / "README.md").write_text("no rows")
    assert read(tmp_path) == ROWS[:3]


def test_saved_in_memory_and_split_datasets_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=dataset.select([0]), test=dataset.select([3, 4])).save_to_disk(str(tmp_path / "many"))
    assert read(tmp_path / "one") == ROWS
    assert read(dataset) == ROWS
    assert read(tmp_path / "many") == ROWS[:1]
    assert read(tmp_path / "many", split="test") == ROWS[3:]
    assert read(DatasetDict(test=dataset), split="test") == ROWS
    with pytest.raises(UserError, match="has no split 'dev'; it has train, test"):
        read(tmp_path / "many", split="dev")


def test_columns_are_renamed_and_a_source_wins_over_the_common_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "better": "b", "worse": "w", "chosen": "old"}')
    entry = {"path": str(tmp_path / "rows.jsonl"), "columns": {"rejected": "worse", "prompt": "question"}}
    (source,) = parse_sources(entry, {"chosen": "better", "rejected": "nothing"})
    assert read(source.path, columns=source.columns) == [{"prompt": "q", "chosen": "b", "rejected": "w"}]


def test_locations_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(iter_rows(Source(str(file)))) == [(f"{file}:1", {"a": 1}), (f"{file}:3", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', r"a.jsonl:2: invalid JSON"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', r"a.jsonl:3: invalid UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl:2: a row must be a JSON object, this one is a list"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', r"a.json:3: invalid JSON"),
        ("a.json", b'[\n{"a": 1},\n{"a": "\xff"}]', r"a.json:3: invalid UTF-8"),
        ("a.json", b'[{"a": 1}, "b"]', r"a.json: row 1: a row must be a JSON object, this one is a string"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: invalid JSON"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-12], r"a.jsonl.gz cannot be read"),
        ("a.parquet", b"no parquet", r"a.parquet is no readable parquet file"),
        ("a.tsv", b"a,b", r"unknown suffix; understood: .jsonl, .jsonl.gz"),
        ("a.jsonl", b'{"a": 1}\n{"b": 1, "a": 1, "b": 2}\n', r"a.jsonl:2: invalid JSON: the key 'b' is there twice in one"),
        ("a.json", b'[{"a": {"role": 1, "role": 1}}]', r"a.json: invalid JSON: the key 'role' is there twice"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"a.jsonl:1: invalid JSON: a whole number has more than 4,300 digits"),
        ("a.json", b"[" + b"9" * 5000 + b"]", r"a.json: invalid JSON: a whole number has more than 4,300 digits"),
        ("a.json", b'{\n "a": 1}', r"a.json:1: invalid JSON: .*; a .json file is a list or a row a line"),
        ("a.csv", b"a,b\n1,2\n\n3\n", r"a.csv:4: 1 cells for 2 columns; correct or drop the row"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: the first line must name every column, each once"),
        ("a.csv", b'a,b\n1,"x"y\n', r"a.csv:2: invalid csv"),
        ("a.csv", b"a,b\n1,\xff\n", r"a.csv:.* invalid UTF-8"),
    ],
)
def test_broken_files_are_named_with_the_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_missing_files_and_directories_without_rows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing.jsonl does not exist"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"does not exist"):
        read("data/pairs.jsonl")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data: empty/pairs does not exist"):
        read("empty/pairs")
    with pytest.raises(UserError, match=r"has no usable file; understood suffixes: .jsonl"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="data: no file fits "):
        read(tmp_path / "empty" / "*.jsonl")
    with pytest.raises(UserError, match="remove its `split`"):
        read(write(tmp_path / "rows.jsonl"), split="train")


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing is no file here and could not be loaded from the Hub: ") as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "data is an empty list; name at least one source"),
        (None, "data is empty; give a file, a directory or a Hugging Face dataset id"),
        (" ", "data is empty; give a file"),
        ({"path": " "}, "data.path is empty; give a file"),
        (7, "data must be text or null, got the number 7"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "rows are given as a list with a dict a row"),
        ({"weight": 1}, "data has no path; a source is a path or {path, weight, split, subset, columns}"),
        (["a", {"path": "a", "wieght": 1}], "unknown key data[1].wieght; did you mean data[1].weight?"),
        ({"path": "a", "weight": 0}, "data.weight must be greater than 0, got 0.0"),
        ({"path": "a", "weight": True}, "data.weight must be a number, got true"),
        ({"path": "a", "split": 1}, "data.split must be text or null, got the number 1"),
        ({"path": "a", "columns": {"chosen": 1}}, "data.columns must be a mapping from text to text, got a mapping"),
    ],
)
def test_wrong_source_values_are_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_sources(value)


def test_lists_may_mix_paths_mappings_and_datasets() -> None:
    from datasets import Dataset

    dataset = Dataset.from_list(ROWS)
    sources = parse_sources(["a.jsonl", Path("b.jsonl"), {"path": dataset, "weight": 2}, dataset], {"prompt": "q"})
    assert [source.name for source in sources] == ["a.jsonl", "b.jsonl", "datasets.Dataset", "datasets.Dataset"]
    assert [source.weight for source in sources] == [1.0, 1.0, 2.0, 1.0]
    assert all(source.columns == {"prompt": "q"} for source in sources)


@pytest.mark.parametrize(
    ("columns", "left"),
    [
        ({"chosen_score": "good"}, {"chosen_score": 1, "margin": 4, "scores": [1], "ranks": [2]}),
        ({"chosen_score": "missing"}, {"good": 1, "margin": 4, "scores": [1], "ranks": [2]}),
        ({"margin": "good"}, {"margin": 1, "score_chosen": 2, "chosen_rating": 3, "scores": [1], "ranks": [2]}),
        ({"scores": "scores"}, {"good": 1, "score_chosen": 2, "chosen_rating": 3, "margin": 4, "scores": [1]}),
    ],
)
def test_a_field_of_several_spellings_that_is_renamed_is_read_from_that_one_and_no_other(
    columns: dict[str, str], left: dict[str, Any], tmp_path: Path
) -> None:
    row = {"prompt": "p", "good": 1, "score_chosen": 2, "chosen_rating": 3, "margin": 4, "scores": [1], "ranks": [2]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    ((_, renamed),) = iter_rows(Source(str(tmp_path / "a.jsonl"), columns=columns))
    assert renamed == {"prompt": "p"} | left


CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Rome"}}}]},
    {"role": "tool", "name": "look", "content": "warm"},
]
ADDED = [
    {"role": "user", "content": "Sum?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}]},
    {"role": "tool", "name": "add", "content": "3"},
]


def parquet_of(rows: list[dict[str, Any]], file: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return Source(str(file))


def test_what_arrow_fills_in_for_the_keys_of_other_rows_is_taken_out_again(tmp_path: Path) -> None:
    from datasets import Dataset

    rows: list[dict[str, Any]] = [
        {"messages": CALLED, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": ADDED, "chat_template_kwargs": {"effort": "low"}},
    ]
    stored = Dataset.from_list(rows)
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "a": None, "b": None}
    for source in (parquet_of(rows, tmp_path / "a.parquet"), Source(stored)):
        for (_, row), given in zip(iter_rows(source), rows, strict=True):
            assert row["chat_template_kwargs"] == given["chat_template_kwargs"]
            for message, expected in zip(row["messages"], given["messages"], strict=True):
                assert message == expected


def test_json_columns_of_arrow_come_as_they_were_written_nulls_included(tmp_path: Path) -> None:
    from datasets import Dataset

    called = [dict(message) for message in CALLED]
    called[1]["tool_calls"] = [{"function": {"name": "look", "arguments": {"city": "Rome", "unit": None}}}]
    rows = [{"messages": called, "n": 1}, {"messages": ADDED, "n": 2}]
    stored = Dataset.from_list(rows, on_mixed_types="use_json")
    stored.to_parquet(str(tmp_path / "a.parquet"))
    for source in (Source(str(tmp_path / "a.parquet")), Source(stored), Source(stored.select([1, 0]).select([1, 0]))):
        assert [row for _, row in iter_rows(source)] == rows


def test_maps_and_lists_of_any_arrow_type_come_as_objects_and_lists(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "arguments": pyarrow.map_(pyarrow.string(), pyarrow.struct({"a": pyarrow.int8(), "b": pyarrow.int8()})),
        "scores": pyarrow.large_list(pyarrow.float32()),
    }
    table = pyarrow.Table.from_pylist(
        [{"arguments": [("x", {"a": 1})], "scores": [0.5, None]}, {"arguments": None}], pyarrow.schema(kinds)
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in iter_rows(Source(str(tmp_path / "a.parquet")))]
    assert rows == [{"arguments": {"x": {"a": 1}}, "scores": [0.5, None]}, {"arguments": None, "scores": None}]


def test_nulls_of_json_files_are_the_users_own(tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"city": None}}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert [row for _, row in iter_rows(Source(str(tmp_path / "a.jsonl")))] == [row]


# Tables of text, patterns, splits


def test_a_table_has_numbers_labels_and_lists_where_they_are_meant_and_text_elsewhere(tmp_path: Path) -> None:
    lines = [
        "prompt,completion,label,weight,responses,scores,id",
        'p,4,True,1.5,"[""a"", ""b""]","[1, 2.5]",007',
        "p,,0,x,,,",
    ]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines))
    first, second = read(tmp_path / "a.csv")
    assert first == {"prompt": "p", "completion": "4", "label": True, "weight": 1.5} | {
        "responses": ["a", "b"],
        "scores": [1, 2.5],
        "id": "007",
    }
    empty = dict.fromkeys(("completion", "responses", "scores", "id"))
    assert second == empty | {"prompt": "p", "label": 0, "weight": "x"}


def test_a_pattern_gives_the_files_that_fit_it_in_sorted_order(tmp_path: Path) -> None:
    for name, row in (("b1.jsonl", ROWS[1]), ("a1.jsonl", ROWS[0]), ("a2.jsonl", ROWS[2]), ("train.jsonl", ROWS[3])):
        (tmp_path / name).write_text(json.dumps(row))
    assert read(f"{tmp_path}/*1.jsonl") == ROWS[:2]
    assert read(f"{tmp_path}/[at]*.jsonl") == [ROWS[0], ROWS[2], ROWS[3]]


def test_home_and_variables_in_paths_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl")
    write(tmp_path / "$ROWS.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    assert read("~/rows.jsonl") == read("$WHERE/rows.jsonl") == read("${WHERE}/rows.jsonl") == ROWS
    assert read(f"{tmp_path}/$ROWS.jsonl") == ROWS
    with pytest.raises(
        UserError, match=r"^data: \$NOWHERE/a.jsonl names \$NOWHERE, which is not set here; set it or write it"
    ):
        read("$NOWHERE/a.jsonl")


def split_directory(directory: Path, names: str) -> Path:
    for name in names.split():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"from": name}))
    return directory


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("train.jsonl test.jsonl valid.jsonl", "train.jsonl", "valid.jsonl"),
        ("Training-1.jsonl dev_2.json", "Training-1.jsonl", "dev_2.json"),
        (
            "d/train-00000-of-00002.jsonl d/train-00001-of-00002.jsonl d/eval-00000-of-00001.jsonl",
            "d/train-00000-of-00002.jsonl d/train-00001-of-00002.jsonl",
            "d/eval-00000-of-00001.jsonl",
        ),
        ("train/0.jsonl train/1.jsonl validation/0.jsonl", "train/0.jsonl train/1.jsonl", "validation/0.jsonl"),
        ("train.jsonl other.jsonl test.jsonl", "train.jsonl", "test.jsonl"),
        ("pairs.jsonl pairs-test.jsonl", "pairs.jsonl", "pairs-test.jsonl"),
        (
            "a.jsonl contest.jsonl trainer.jsonl",
            "a.jsonl contest.jsonl trainer.jsonl",
            "a.jsonl contest.jsonl trainer.jsonl",
        ),
    ],
)
def test_a_directory_is_read_by_split(names: str, train: str, held_out: str, tmp_path: Path) -> None:
    directory = str(split_directory(tmp_path / "data", names))
    assert [row["from"] for row in read(directory)] == train.split()
    assert [row["from"] for row in read(directory, held_out=True)] == held_out.split()
    assert [row["from"] for row in read(directory, split="all")] == sorted(names.split())
    line = split_taken(Source(directory))
    assert (line is None) == (train == held_out)
    assert line is None or line.startswith(f"of {directory} the train split: {Path(train.split()[0]).name}")


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    directory = str(split_directory(tmp_path, "test.jsonl"))
    with pytest.raises(
        UserError, match=r"has no train split; it has test; name one as {path: …, split: test}, or `split: all`"
    ):
        read(directory)
    assert len(read(directory, split="test")) == 1
    directory = str(split_directory(tmp_path / "more", "train.jsonl"))
    with pytest.raises(
        UserError, match=r"has no held-out split to evaluate on; it has train; name one as {path: …, split: tr"
    ):
        read(directory, held_out=True)
    with pytest.raises(UserError, match=r"has no test split; it has train"):
        read(directory, split="test")
    assert len(read(directory, split="train", held_out=True)) == 1


def test_of_a_dataset_with_splits_the_held_out_one_is_evaluated_on(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    DatasetDict(train=dataset.select([0]), test=dataset.select([3])).save_to_disk(str(tmp_path / "both"))
    assert (read(tmp_path / "both"), read(tmp_path / "both", held_out=True)) == (ROWS[:1], ROWS[3:4])
    with pytest.raises(UserError, match="has no held-out split to evaluate on; it has train"):
        read(DatasetDict(train=dataset), held_out=True)


def test_ignored_columns_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "system": "s", "images": [1]}')
    assert read(tmp_path / "a.jsonl", ignored=("system", "images")) == [{"prompt": "p"}]
