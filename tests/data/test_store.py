"""Groups on flat, memory-mapped arrays: what goes in comes out, and the digest knows every token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.groups import Group
from megadpo.data.store import GroupColumns, GroupStore

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda values: np.array(values, np.int32))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    responses = tuple(draw(st.lists(ids, min_size=1, max_size=4)))
    num_prompts = draw(st.sampled_from([1, len(responses)]))
    return Group(tuple(draw(ids) for _ in range(num_prompts)), responses, row=draw(st.integers(0, 10**12)))


def same(one: Group, other: Group) -> bool:
    return one.row == other.row and all(
        len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in ((one.prompts, other.prompts), (one.responses, other.responses))
    )


def pair(prompt: list[int], chosen: list[int], rejected: list[int], row: int = 0) -> Group:
    return Group((np.array(prompt, np.int32),), (np.array(chosen, np.int32), np.array(rejected, np.int32)), row)


@settings(deadline=None)
@given(st.lists(groups(), max_size=8), st.booleans())
def test_groups_of_any_shape_come_back_and_their_tokens_are_counted(given_groups: list[Group], share: bool) -> None:
    store = GroupStore.of(given_groups)
    assert len(store) == len(given_groups)
    assert all(same(ours, theirs) for ours, theirs in zip(store, given_groups, strict=True))
    expected = [group.num_stream_tokens(share) for group in given_groups]
    assert store.num_tokens(share).tolist() == expected


@settings(deadline=None)
@given(st.lists(groups(), max_size=4), st.lists(groups(), max_size=4))
def test_parts_put_together_are_the_whole(one: list[Group], other: list[Group]) -> None:
    whole = GroupStore(GroupColumns.concatenate([GroupColumns.of(one), GroupColumns.of(other)]))
    assert whole.digest == GroupStore.of([*one, *other]).digest


def test_a_saved_store_is_memory_mapped_and_equal(tmp_path: Path) -> None:
    columns = GroupColumns.of([pair([1, 2], [3], [4, 5], 7), pair([9], [8], [7], 8)], sources=[0, 1])
    store = GroupStore(columns, ["a.jsonl", "b.jsonl"], [1.0, 0.5])
    store.save(tmp_path / "store", extra={"num_rows": 3})
    loaded = GroupStore.load(tmp_path / "store")
    assert isinstance(loaded.columns.tokens_T, np.memmap)
    assert all(same(ours, theirs) for ours, theirs in zip(loaded, store, strict=True))
    assert loaded.digest == store.digest == GroupStore(loaded.columns).digest
    assert loaded.source_names == ["a.jsonl", "b.jsonl"] and loaded.source_weights.tolist() == [1.0, 0.5]
    assert loaded.rows.tolist() == [7, 8] and loaded.sources.tolist() == [0, 1] and loaded.max_token_id() == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    assert json.loads((tmp_path / "store" / "store.json").read_text())["extra"] == {"num_rows": 3}


def test_the_digest_sees_tokens_borders_rows_and_sources() -> None:
    stores = [
        GroupStore.of([pair([1, 2], [3], [4])]),
        GroupStore.of([pair([1, 2], [3], [5])]),
        GroupStore.of([pair([1], [2, 3], [4])]),
        GroupStore.of([pair([1, 2], [3], [4], row=1)]),
        GroupStore(GroupColumns.of([pair([1, 2], [3], [4])], sources=[1]), ["a", "b"]),
    ]
    assert len({store.digest for store in stores}) == len(stores)


def test_indexing_is_that_of_a_sequence() -> None:
    store = GroupStore.of([pair([1], [2], [3], row) for row in range(4)])
    assert [group.row for group in store[1:3]] == [1, 2] and store[-1].row == 3 and store[np.int64(2)].row == 2
    for index in (4, -5):
        with pytest.raises(IndexError):
            store[index]


def test_saving_over_an_existing_store_leaves_it_as_it_is(tmp_path: Path) -> None:
    first, second = GroupStore.of([pair([1], [2], [3])]), GroupStore.of([pair([4], [5], [6])])
    first.save(tmp_path / "store")
    second.save(tmp_path / "store")
    assert GroupStore.load(tmp_path / "store").digest == first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nothing_pickled_is_ever_loaded(tmp_path: Path) -> None:
    GroupStore.of([pair([1], [2], [3])]).save(tmp_path / "store")
    np.save(tmp_path / "store" / "rows_G.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"Python objects|allow_pickle"):
        GroupStore.load(tmp_path / "store")
