"""Groups on flat, memory-mapped arrays: what goes in comes out, and the digest knows every token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.groups import Group
from megadpo.data.store import GroupColumns, GroupStore, check_columns

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6).map(lambda values: np.array(values, np.int32))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    responses = tuple(draw(st.lists(ids, min_size=1, max_size=4)))
    num_prompts = draw(st.sampled_from([1, len(responses)]))
    scores = tuple(draw(st.floats(-1e9, 1e9)) for _ in responses)
    prompts = tuple(draw(ids) for _ in range(num_prompts))
    return Group(prompts, responses, row=draw(st.integers(0, 10**12)), row_values={"score": scores})


def same(one: Group, other: Group) -> bool:
    return (one.row, one.row_values) == (other.row, other.row_values) and all(
        len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in ((one.prompts, other.prompts), (one.responses, other.responses))
    )


def pair(prompt: list[int], chosen: list[int], rejected: list[int], row: int = 0, **values: tuple[float, float]) -> Group:
    responses = (np.array(chosen, np.int32), np.array(rejected, np.int32))
    return Group((np.array(prompt, np.int32),), responses, row, values)


@settings(deadline=None)
@given(st.lists(groups(), max_size=8), st.booleans())
def test_groups_of_any_shape_come_back_and_their_tokens_are_counted(given_groups: list[Group], share: bool) -> None:
    store = GroupStore.of(given_groups)
    assert len(store) == len(given_groups)
    assert all(same(ours, theirs) for ours, theirs in zip(store, given_groups, strict=True))
    expected = [group.num_stream_tokens(share) for group in given_groups]
    assert store.num_tokens(share).tolist() == expected


@settings(deadline=None)
@given(st.lists(groups(), min_size=1, max_size=8), st.data())
def test_responses_of_any_groups_are_found_among_all_of_them(given_groups: list[Group], data: st.DataObject) -> None:
    store = GroupStore.of(given_groups)
    row_values = data.draw(st.lists(st.integers(0, len(store) - 1), max_size=9))
    found, offsets = store.response_ids_of(row_values), store.response_offsets_of(row_values)
    scores = store.row_values["score"]
    assert scores.dtype == np.float64 and len(scores) == store.num_responses
    for place, number in enumerate(row_values):
        own = given_groups[number].row_values["score"]
        assert tuple(scores[found[offsets[place] : offsets[place + 1]]]) == own
        assert tuple(scores[store.response_offsets_G[number] : store.response_offsets_G[number + 1]]) == own


@settings(deadline=None)
@given(st.lists(groups(), max_size=8))
def test_the_longest_mismatch_has_room_for_any_prompt_before_any_first_response(given_groups: list[Group]) -> None:
    prompts = [len(group.prompts[0]) for group in given_groups]
    responses = [len(group.responses[0]) for group in given_groups]
    assert GroupStore.of(given_groups).longest_mismatch() == max(prompts, default=0) + max(responses, default=0)


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


def test_numbers_are_saved_memory_mapped_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    store = GroupStore.of([pair([1], [2], [3], 0, weight=(1 / 3, 0.0), margin=(1e300, 5e-324))])
    store.save(tmp_path / "store")
    loaded = GroupStore.load(tmp_path / "store")
    assert {name: values.tolist() for name, values in loaded.row_values.items()} == {
        "margin": [1e300, 5e-324],
        "weight": [1 / 3, 0.0],
    }
    assert isinstance(loaded.row_values["margin"], np.memmap)
    assert loaded.digest == GroupStore(loaded.columns).digest == store.digest


def test_a_store_whose_numbers_do_not_fit_its_groups_is_none() -> None:
    columns = GroupColumns.of([pair([1], [2], [3], 0, margin=(1.0, 1.0))])
    with pytest.raises(ValueError, match=r"margin is float64 \[1\], expected float64 \[2\]"):
        replace(columns, row_values={"margin": np.array([1.0])})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_offsets_S": [0, 2, 3, 5, 6, 7]}, "segment_offsets_S does not lead through the 8 entries"),
        ({"segment_offsets_S": [0, 3, 2, 5, 6, 7, 8]}, "segment_offsets_S does not lead"),
        ({"segment_offsets_S": [1, 2, 3, 5, 6, 7, 8]}, "segment_offsets_S does not lead"),
        ({"segment_offsets_S": [0, 2, 3, 5, 6, 7, 9]}, "segment_offsets_S does not lead"),
        ({"group_segments_G": [0, 5, 6]}, "group_segments_G does not lead through the 6 entries"),
        ({"group_segments_G": [0, 3, 7]}, "group_segments_G does not lead"),
        ({"num_prompts_G": [1, 3]}, "neither one prompt nor one a response"),
        ({"num_prompts_G": [1, -1]}, "neither one prompt nor one a response"),
        ({"rows_G": [0]}, "different numbers of groups"),
        ({"rows_G": [0, -1]}, "a row or a source has a negative number"),
        ({"sources_G": [0, 1]}, "a source that is not there"),
        ({"sources_G": [-1, 0]}, "a row or a source has a negative number"),
        ({"tokens_T": [1, 2, 3, 4, 5, 6, 7, -8]}, "a token id is negative"),
        ({"rows_G": [[0], [1]]}, "rows_G is int64 of 2 dimensions"),
    ],
)
def test_arrays_that_lead_outside_of_each_other_make_no_store(changes: dict[str, list[int]], message: str) -> None:
    columns = GroupColumns.of([pair([1, 2], [3], [4, 5]), pair([6], [7], [8])])
    check_columns(columns, 1)
    arrays = {name: np.array(values, getattr(columns, name).dtype) for name, values in changes.items()}
    with pytest.raises(ValueError, match=message):
        check_columns(replace(columns, **arrays), 1)


def test_the_digest_sees_numbers_and_their_names_but_not_their_order() -> None:
    one, same_numbers, *others = (
        GroupStore.of([pair([1], [2], [3], **row_values)])
        for row_values in (
            {"margin": (1.0, 1.0), "weight": (2.0, 2.0)},
            {"weight": (2.0, 2.0), "margin": (1.0, 1.0)},
            {"margin": (1.0, 1.0), "weight": (2.0, 3.0)},
            {"margin": (2.0, 2.0), "weight": (1.0, 1.0)},
            {"margin": (1.0, 1.0)},
            {},
        )
    )
    assert one.digest == same_numbers.digest
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_the_digest_of_groups_without_numbers_never_changes_as_checkpoints_hold_it() -> None:
    assert GroupStore.of([pair([1, 2], [3], [4, 5], 7)]).digest == "e66d3231c194e4df4bd68cc2409ff92f6043e4cc"


def test_groups_that_differ_in_what_numbers_they_have_make_no_store() -> None:
    with_margin, without = [pair([1], [2], [3], margin=(1.0, 1.0))], [pair([1], [2], [3])]
    with pytest.raises(ValueError, match="some groups have other row values than margin"):
        GroupStore.of([*with_margin, *without])
    with pytest.raises(ValueError, match="some parts have other row values than none"):
        GroupColumns.concatenate([GroupColumns.of(without), GroupColumns.of(with_margin)])
    with pytest.raises(ValueError, match="row values cannot be named"):
        GroupStore.of([pair([1], [2], [3], **{"../margin": (1.0, 1.0)})])


@settings(deadline=None)
@given(st.lists(groups(), min_size=1, max_size=4), st.integers(1, 6))
def test_the_first_groups_are_those_of_a_store_of_them(given_groups: list[Group], count: int) -> None:
    sources = [number % 2 for number in range(len(given_groups))]
    first = GroupStore(GroupColumns.of(given_groups, sources), ["a", "b"], [1.0, 0.5]).first(count)
    expected = GroupStore(GroupColumns.of(given_groups[:count], sources[:count]))
    assert first.digest == expected.digest
    assert all(same(ours, theirs) for ours, theirs in zip(first, expected, strict=True))
    assert first.source_names == ["a", "b"] and first.source_weights.tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="-1 groups"):
        first.first(-1)


def test_nothing_pickled_is_ever_loaded(tmp_path: Path) -> None:
    GroupStore.of([pair([1], [2], [3])]).save(tmp_path / "store")
    np.save(tmp_path / "store" / "rows_G.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"rows_G.npy is not what was written"):
        GroupStore.load(tmp_path / "store")
