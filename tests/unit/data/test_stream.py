"""Streamed rows: their order is a function of seed and rows, any step is gone on from, and memory holds a buffer of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.data.groups import Group
from megadpo.data.rows.buffer import Place, ShuffleBuffer
from megadpo.data.rows.dataset import prepare_groups, tokenise_job
from megadpo.data.rows.formats import PAIRS, Reading
from megadpo.data.rows.row_files import Skip
from megadpo.data.rows.sources import iter_rows
from megadpo.data.rows.stream import GroupStream, Position, StreamOptions, check_streamable
from megadpo.data.store import GroupStore
from megadpo.errors import UserError


def numbers_from(count: int) -> Any:
    return lambda first: ((number, f"row {number}") for number in range(first, count))


def drawn(count: int, size: int, seed: int = 0, number: int = 0, place: Place | None = None) -> list[str]:
    return list(ShuffleBuffer(numbers_from(count), size, seed, number, place or Place()))


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (3, 4), (4, 4), (5, 4), (100, 7), (100, 100), (30, 1)])
def test_a_pass_draws_each_row_once_and_goes_on_from_any_place(count: int, size: int) -> None:
    whole = drawn(count, size)
    assert sorted(whole) == sorted(f"row {number}" for number in range(count))
    buffer = ShuffleBuffer(numbers_from(count), size, 0, 0)
    for done in range(1, count + 1):
        next(buffer)
        assert buffer.place == Place(done, min(done + size, count))
        assert drawn(count, size, place=buffer.place) == whole[done:]


def test_a_row_comes_no_earlier_than_the_buffer_lets_it_and_a_buffer_of_one_keeps_the_order() -> None:
    places = {row: place for place, row in enumerate(drawn(1000, 50))}
    assert all(places[f"row {number}"] >= number - 49 for number in range(1000))
    assert drawn(1000, 50) != drawn(1000, 50, seed=1) != drawn(1000, 50, number=1) != drawn(1000, 1)
    assert drawn(1000, 1) == [f"row {number}" for number in range(1000)]


def test_a_buffer_as_large_as_the_data_is_a_uniform_shuffle() -> None:
    first = Counter(drawn(6, 10, seed=seed)[0] for seed in range(1200))
    assert set(first) == {f"row {number}" for number in range(6)}
    expected = 200
    # chi-squared with 5 degrees of freedom: above 20.5 once in a thousand
    assert sum((count - expected) ** 2 / expected for count in first.values()) < 20.5


def test_only_rows_from_the_oldest_in_the_buffer_on_are_read_again() -> None:
    asked: list[int] = []

    def read(first: int) -> Any:
        asked.append(first)
        return numbers_from(100_000)(first)

    ShuffleBuffer(read, 100, 0, 0, Place(90_000, 90_100))
    assert 88_000 < asked[0] < 90_000


def test_a_source_that_has_become_shorter_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"data\.train has fewer rows than the 54 that this run has read of it"):
        ShuffleBuffer(numbers_from(20), 4, 0, 0, Place(50, 54))


def rows(count: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"question {number}", "chosen": f" yes {number}", "rejected": f" no {number}"} for number in range(count)
    ]


def write(path: Path, count: int) -> Path:
    """Rows in the format of the path's suffix, with a blank line in a file of lines."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(count)), path, row_group_size=7)
    elif path.suffix == ".csv":
        lines = [f"{row['prompt']},{row['chosen']},{row['rejected']}" for row in rows(count)]
        path.write_text("\n".join(["prompt,chosen,rejected", *lines]))
    else:
        lines = [json.dumps(row) for row in rows(count)]
        content = "\n".join([*lines[:3], " ", *lines[3:]]).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else b"\xef\xbb\xbf" + content)
    return path


def options_of(data: DataConfig, sources: Any, tokenizer: str, buffer_size: int = 8, seed: int = 3) -> StreamOptions:
    found, job = tokenise_job(data, sources, tokenizer, PAIRS)
    return StreamOptions(found, job, buffer_size, seed)


def as_tuples(groups: GroupStore) -> list[Any]:
    def one(group: Group) -> Any:
        return tuple(tuple(ids.tolist()) for ids in (*group.prompts, *group.responses))

    return [one(group) for group in groups]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv", "list", "DataFrame", "Dataset", "Iterable"]
)
def test_rows_are_skipped_in_every_kind_of_source(name: str, tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset
    from pandas import DataFrame

    from megadpo.config.sources import parse_sources

    made: dict[str, Any] = {
        "list": lambda: rows(30),
        "DataFrame": lambda: DataFrame(rows(30)),
        "Dataset": lambda: Dataset.from_list(rows(30)),
        "Iterable": lambda: IterableDataset.from_generator(lambda: iter(rows(30))),
    }
    (source,) = parse_sources(made[name]() if name in made else str(write(tmp_path / name, 30)))
    whole = list(iter_rows(source, streamed=True))
    assert len(whole) == 30 and whole[0][1] == rows(1)[0]
    for count in (7, 31) if name == "Iterable" else (0, 1, 2, 3, 7, 15, 29, 30, 31):
        skip = Skip(count)
        assert list(iter_rows(source, skip, streamed=True)) == whole[count:], count
        assert skip.left == max(count - 30, 0)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_in_order_is_the_stored_data_set_over_files_weights_and_passes(
    suffix: str, options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    write(tmp_path / f"a.{suffix}", 11)
    write(tmp_path / f"b.{suffix}", 5)
    sources = [{"path": str(tmp_path / f"a.{suffix}"), "weight": 2}, str(tmp_path / f"b.{suffix}")]
    stored = as_tuples(prepare_groups(options, sources, bpe_dir).groups)
    an_epoch = [*stored[:11], *stored[:11], *stored[11:]]
    stream = GroupStream(options_of(options, sources, bpe_dir, buffer_size=1))
    found = [group for _ in range(9) for group in as_tuples(stream.next_groups(8))]
    assert found == (an_epoch * 3)[:72]
    assert stream.position.num_passes == 2 and stream.position.report.num_kept == 72


def test_every_step_is_gone_on_from_with_the_same_groups(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    content = rows(23)
    content[4]["chosen"] = content[9]["chosen"] = ""  # left out
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, content)))
    given = options_of(options, str(tmp_path / "a.jsonl"), bpe_dir)
    stream, steps, positions = GroupStream(given), [], []
    for _ in range(15):
        steps.append(as_tuples(stream.next_groups(4)))
        positions.append(json.loads(json.dumps(stream.position.to_dict())))
    assert stream.position.num_passes == 2 and stream.position.report.dropped == {"empty completion": 6}
    for done, position in enumerate(positions[:-1], 1):
        again = GroupStream(given, Position.of(position))
        assert [as_tuples(again.next_groups(4)) for _ in steps[done:]] == steps[done:]
        assert again.position == stream.position
    first_pass = [group for step in steps for group in step][:21]
    assert len(set(first_pass)) == 21, "each pair once a pass"


def test_a_bad_row_is_told_with_its_file_and_line_when_it_comes(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(20)]
    lines[12] = '{"prompt": "x"'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    stream = GroupStream(options_of(options, str(tmp_path / "a.jsonl"), bpe_dir, buffer_size=1))
    assert len(stream.next_groups(11)) == 11
    with pytest.raises(UserError, match=r"a\.jsonl:13: invalid JSON"):
        stream.next_groups(4)


def test_a_pass_of_which_nothing_is_left_ends_the_run(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"}) + "\n")
    with pytest.raises(UserError, match=r"data: no pair is left of .*a\.jsonl: 1 rows read, dropped: 1 identical"):
        GroupStream(options_of(options, str(tmp_path / "a.jsonl"), bpe_dir)).next_groups(2)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"there is no row in it"):
        GroupStream(options_of(options, str(tmp_path / "a.jsonl"), bpe_dir)).next_groups(2)


def test_a_data_set_on_the_hub_is_streamed_by_datasets(
    options: DataConfig, bpe_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: Any, **how: Any) -> Any:
        asked.append((names, how))
        return datasets.IterableDataset.from_generator(lambda: iter(rows(5)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = GroupStream(options_of(options, {"path": "nobody/nothing", "subset": "en"}, bpe_dir, buffer_size=1))
    assert len(stream.next_groups(7)) == 7 and stream.position.num_passes == 1
    assert asked == [(("nobody/nothing", "en"), {"split": "train", "streaming": True})] * 2


def test_labels_that_are_all_the_same_are_refused_after_a_pass(options: DataConfig, bpe_dir: str) -> None:
    labelled = [{"prompt": "p", "completion": f" {n}", "label": True} for n in range(5)]
    found, job = tokenise_job(options, labelled, bpe_dir, Reading("labels"))
    stream = GroupStream(StreamOptions(found, job, 4, 0))
    assert len(stream.next_groups(5)) == 5
    with pytest.raises(UserError, match=r"data: all 5 rows are desirable"):
        stream.next_groups(1)


def test_what_cannot_be_streamed_is_said_at_once(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    from datasets import IterableDataset
    from datasets.distributed import split_dataset_by_node

    (tmp_path / "a.json").write_text(json.dumps(rows(2)))
    of_one_rank = split_dataset_by_node(IterableDataset.from_generator(lambda: iter(rows(2))), 0, 2)
    for source, words in (
        (str(tmp_path / "a.json"), r"a\.json is one list, which can only be read as a whole; write a row a line"),
        (
            {"path": str(write(tmp_path / "a.jsonl", 2)), "weight": 0.5},
            "has weight 0.5, but data.streaming reads a source a whole",
        ),
        (of_one_rank, "data.train was split by split_dataset_by_node"),
    ):
        with pytest.raises(UserError, match=words):
            check_streamable(options_of(options, source, bpe_dir).sources)


@pytest.mark.parametrize(
    "change",
    [{"num_passes": -1}, {"num_kept": True}, {"place": {"num_drawn": 3, "num_read": 2}}, {"report": 1}],
)
def test_a_damaged_position_is_none(change: dict[str, Any]) -> None:
    assert Position.of(Position(1, Place(2, 3), 2).to_dict()) == Position(1, Place(2, 3), 2)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Position.of(Position(1, Place(2, 3), 2).to_dict() | change)


def _memory_of_a_stream(options: DataConfig, file: str, tokenizer: str, num_groups: int) -> tuple[int, int]:
    """Bytes that this process has more after the first tenth of the groups, and after all of them."""
    import gc
    import os

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stream, before, middle = GroupStream(options_of(options, file, tokenizer, 1000)), resident(), 0
    for number in range(num_groups // 500):
        stream.next_groups(500)
        if number == num_groups // 5000:
            middle = resident()
    assert stream.position.num_passes == 0
    return middle - before, resident() - before


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(20_000, marks=pytest.mark.slow),
        pytest.param(1_000_000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(3600)]),
    ],
)
def test_memory_holds_a_buffer_however_many_rows_there_are(
    count: int, options: DataConfig, bpe_dir: str, tmp_path: Path
) -> None:
    note = "0123456789" * 200  # that nothing reads: rows are large, and quickly tokenised
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(count):
            row = {"prompt": "question", "chosen": f" yes {number % 100}", "rejected": " no", "note": note}
            file.write(json.dumps(row) + "\n")
    from tests.helpers.worlds import run_world

    arguments = options, str(tmp_path / "a.jsonl"), bpe_dir, count - 2000
    ((early, late),) = run_world(1, _memory_of_a_stream, *arguments, timeout=3400, new=True)
    assert late - early < 12 << 20, f"{(late - early) >> 20} MiB more"
    assert late < 150 << 20
