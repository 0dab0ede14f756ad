"""All groups of a run in memory-mapped flat arrays, which processes share through the page cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megadpo.data.groups import Group
from megadpo.files import hash_of_file, is_sealed, sealed

FORMAT_VERSION = 4
ABOUT = "store.json"
_DTYPES = {
    "tokens_T": np.int32,
    "segment_offsets_S": np.int64,
    "group_segments_G": np.int64,
    "num_prompts_G": np.int32,
    "rows_G": np.int64,
    "sources_G": np.int32,
}
_ARRAYS = tuple(_DTYPES)


@dataclass(frozen=True)
class GroupColumns:
    """Groups as flat arrays.

    A segment is here a prompt or a response; attention's are `micro_batch.Segment`. Group g owns the segments from
    group_segments_G[g] to group_segments_G[g + 1] - 1: its prompts, then its responses.
    Axes: T tokens, S segments, G groups, R responses of all groups.

    Attributes:
        tokens_T: int32, the tokens of all segments, concatenated.
        segment_offsets_S: int64 [S + 1], where each segment starts in `tokens_T`; the last is T.
        group_segments_G: int64 [G + 1], each group's first segment; the last is S.
        num_prompts_G: int32 [G], 1 or the number of responses.
        rows_G: int64 [G], position of the group's row in the sources.
        sources_G: int32 [G], index of the source.
        row_values: name -> float64 [R], a value for each response of all groups, in order.

    Raises:
        ValueError: one of `row_values` is not float64 [R], or its name is no identifier (it becomes a file name).
    """

    tokens_T: npt.NDArray[np.int32]
    segment_offsets_S: npt.NDArray[np.int64]
    group_segments_G: npt.NDArray[np.int64]
    num_prompts_G: npt.NDArray[np.int32]
    rows_G: npt.NDArray[np.int64]
    sources_G: npt.NDArray[np.int32]
    row_values: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (int(self.group_segments_G[-1]) - int(self.num_prompts_G.sum()),)
        for name, values_R in self.row_values.items():
            if not name.isidentifier():
                raise ValueError(f"row values cannot be named {name!r}")
            if values_R.dtype != np.float64 or values_R.shape != shape:
                raise ValueError(f"{name} is {values_R.dtype} {list(values_R.shape)}, expected float64 {list(shape)}")

    @staticmethod
    def of(groups: Iterable[Group], sources: Sequence[int] | None = None) -> GroupColumns:
        """Columns of groups in memory; `sources` are their source indices, 0 where left out.

        Raises:
            ValueError: where groups differ in the names of their row values.
        """
        groups = list(groups)
        names = sorted(groups[0].row_values) if groups else []
        if any(sorted(group.row_values) != names for group in groups):
            raise ValueError(f"some groups have other row values than {', '.join(names) or 'none'}")
        segments = [segment for group in groups for segment in (*group.prompts, *group.responses)]
        return GroupColumns(
            tokens_T=np.concatenate([np.zeros(0, np.int32), *segments]).astype(np.int32, copy=False),
            segment_offsets_S=offsets_of([len(segment) for segment in segments]),
            group_segments_G=offsets_of([len(group.prompts) + len(group.responses) for group in groups]),
            num_prompts_G=np.array([len(group.prompts) for group in groups], np.int32),
            rows_G=np.array([group.row for group in groups], np.int64),
            sources_G=np.array(sources if sources is not None else [0] * len(groups), np.int32),
            row_values={
                name: np.array([value for group in groups for value in group.row_values[name]], np.float64) for name in names
            },
        )

    @staticmethod
    def concatenate(parts: Sequence[GroupColumns]) -> GroupColumns:
        """The groups of all parts, in order.

        Raises:
            ValueError: where parts that are not empty differ in the names of their row values.
        """
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("tokens_T", "num_prompts_G", "rows_G", "sources_G")
        }
        segments = offsets_of(np.concatenate([np.diff(part.segment_offsets_S) for part in parts]))
        groups = offsets_of(np.concatenate([np.diff(part.group_segments_G) for part in parts]))
        filled = [part for part in parts if len(part.rows_G)]
        names = sorted(filled[0].row_values) if filled else []
        if any(sorted(part.row_values) != names for part in filled):
            raise ValueError(f"some parts have other row values than {', '.join(names) or 'none'}")
        row_values = {name: np.concatenate([part.row_values[name] for part in filled]) for name in names}
        return GroupColumns(segment_offsets_S=segments, group_segments_G=groups, row_values=row_values, **joined)

    def first(self, count: int) -> GroupColumns:
        """Views of the first `count` groups (0 <= count <= G)."""
        num_segments = int(self.group_segments_G[count])
        num_tokens = int(self.segment_offsets_S[num_segments])
        num_responses = num_segments - int(self.num_prompts_G[:count].sum())
        return GroupColumns(
            tokens_T=self.tokens_T[:num_tokens],
            segment_offsets_S=self.segment_offsets_S[: num_segments + 1],
            group_segments_G=self.group_segments_G[: count + 1],
            num_prompts_G=self.num_prompts_G[:count],
            rows_G=self.rows_G[:count],
            sources_G=self.sources_G[:count],
            row_values={name: values_R[:num_responses] for name, values_R in self.row_values.items()},
        )

    def named_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array under its file name; row values last, as "numbers.margin", in alphabetical order."""
        row_values = {f"numbers.{name}": self.row_values[name] for name in sorted(self.row_values)}
        return {name: getattr(self, name) for name in _ARRAYS} | row_values


def offsets_of(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """int64 [n + 1]: where each of n items of these lengths begins when they are concatenated; the last is the total."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])


class GroupStore(Sequence[Group]):
    """A sequence of groups over `GroupColumns`.

    Attributes:
        columns: the arrays.
        source_names: a name for each source.
        source_weights: float64, how many times an epoch sees each row of a source. Not part of `digest`.
    """

    def __init__(
        self,
        columns: GroupColumns,
        source_names: Sequence[str] = ("data",),
        source_weights: Sequence[float] | None = None,
        digest: str | None = None,
    ) -> None:
        self.columns = columns
        self.source_names = list(source_names)
        self.source_weights = np.array(source_weights or [1.0] * len(self.source_names), np.float64)
        self._digest = digest

    @staticmethod
    def of(groups: Iterable[Group]) -> GroupStore:
        """A store of groups in memory, all of one source; raises what `GroupColumns.of` raises."""
        return GroupStore(GroupColumns.of(groups))

    def first(self, count: int) -> GroupStore:
        """The first `count` groups (all, where there are no more) with their row values, sources and weights."""
        if count < 0:
            raise ValueError(f"{count} groups were requested")
        if count >= len(self):
            return self
        return GroupStore(self.columns.first(count), self.source_names, self.source_weights.tolist())

    def __len__(self) -> int:
        return len(self.columns.rows_G)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group_id = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= group_id < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        columns = self.columns
        first, end = (int(value) for value in columns.group_segments_G[group_id : group_id + 2])
        bounds = columns.segment_offsets_S[first : end + 1]
        segments = tuple(np.asarray(columns.tokens_T[bounds[i] : bounds[i + 1]]) for i in range(end - first))
        num_prompts = int(columns.num_prompts_G[group_id])
        start, stop = (int(value) for value in self.response_offsets_G[group_id : group_id + 2])
        row_values = {name: tuple(values_R[start:stop].tolist()) for name, values_R in columns.row_values.items()}
        return Group(segments[:num_prompts], segments[num_prompts:], int(columns.rows_G[group_id]), row_values)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """int64 [G]: position of each group's row in the sources."""
        return self.columns.rows_G

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        """int32 [G]: each group's source index."""
        return self.columns.sources_G

    @property
    def row_values(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """Name -> float64 [R]: a value for each response of all groups, in order."""
        return self.columns.row_values

    @cached_property
    def response_offsets_G(self) -> npt.NDArray[np.int64]:
        """int64 [G + 1]: the ids of group g's responses are [g] to [g + 1] - 1."""
        return np.asarray(self.columns.group_segments_G) - offsets_of(self.columns.num_prompts_G)

    @property
    def num_responses(self) -> int:
        """R, the number of responses of all groups."""
        return int(self.response_offsets_G[-1])

    def response_offsets_of(self, group_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [N + 1]: where the responses of each of the N groups begin when these groups are concatenated."""
        return offsets_of(np.diff(self.response_offsets_G)[np.asarray(group_ids, np.int64)])

    def response_ids_of(self, group_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64: the ids of the groups' responses (positions among the responses of all groups), group after group."""
        offsets_N = self.response_offsets_of(group_ids)
        shifts_N = self.response_offsets_G[np.asarray(group_ids, np.int64)] - offsets_N[:-1]
        return np.arange(offsets_N[-1]) + np.repeat(shifts_N, np.diff(offsets_N))

    @cached_property
    def digest(self) -> str:
        """blake2b over every array (not over source names and weights), in hexadecimal."""
        if self._digest is not None:
            return self._digest
        hasher = hashlib.blake2b(digest_size=20)
        for name, array in self.columns.named_arrays().items():
            array = np.ascontiguousarray(array)
            hasher.update(f"{name} {array.dtype.str} {array.shape};".encode())
            hasher.update(array.data)
        return hasher.hexdigest()

    def max_token_id(self) -> int:
        """The largest token id, which must be below the model's vocabulary size. Reads every token."""
        return int(self.columns.tokens_T.max(initial=0))

    def segment_lengths(self) -> npt.NDArray[np.int64]:
        """int64 [S]: tokens of every segment."""
        return np.diff(self.columns.segment_offsets_S)

    def chosen_lengths(self, group_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each of the groups, int64: tokens of its first response; tokens of that response's prompt."""
        first = np.asarray(self.columns.group_segments_G[group_ids])
        response = first + self.columns.num_prompts_G[group_ids]
        ends = self.columns.segment_offsets_S
        return ends[response + 1] - ends[response], ends[first + 1] - ends[first]

    def longest_mismatch(self) -> int:
        """The longest prompt plus the longest first response of all groups, in tokens; 0 without groups."""
        responses, prompts = self.chosen_lengths(np.arange(len(self)))
        return int(responses.max(initial=0)) + int(prompts.max(initial=0))

    def num_tokens(self, share_prompts: bool) -> npt.NDArray[np.int64]:
        """int64 [G]: tokens of each group in a micro-batch's stream, as `Group.num_stream_tokens`."""
        columns = self.columns
        starts = np.asarray(columns.segment_offsets_S)[columns.group_segments_G]
        total = np.diff(starts)
        if share_prompts:
            return total
        first = columns.group_segments_G[:-1]
        prompt_lengths = self.segment_lengths()[first]
        num_copies = np.diff(self.response_offsets_G) - 1
        return total + np.where(columns.num_prompts_G == 1, num_copies * prompt_lengths, 0)

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write .npy files and a store.json, which holds `extra` and the hash of each file, too, and begins with its own.

        The directory is written atomically; one that exists is left as it is.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = directory.with_name(f".{directory.name}-{uuid.uuid4().hex}")
        partial.mkdir()  # open to whom the user lets it be: a cache may be shared
        try:
            hashes = {}
            for name, array in self.columns.named_arrays().items():
                with (partial / f"{name}.npy").open("wb") as file:
                    # As np.save does, which does not say why a disk refuses.
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                    file.write(np.ascontiguousarray(array).data)
                    file.flush()
                    os.fsync(file.fileno())
                hashes[name] = hash_of_file(partial / f"{name}.npy")
            about = {
                "format_version": FORMAT_VERSION,
                "key": directory.name,
                "hashes": hashes,
                "num_groups": len(self),
                "numbers": sorted(self.row_values),
                "digest": self.digest,
                "source_names": self.source_names,
                "source_weights": self.source_weights.tolist(),
                "extra": extra or {},
            }
            with (partial / ABOUT).open("wb") as file:
                file.write(sealed(about))
                file.flush()
                os.fsync(file.fileno())
            if not directory.exists():
                os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def load(directory: str | Path) -> GroupStore:
        """Memory-map a saved store, every byte of which is compared with its hash.

        Raises:
            OSError: it cannot be read.
            ValueError, KeyError, TypeError: it is no store, of another format version, or damaged.
        """
        directory = Path(directory)
        about = read_about(directory)

        def read(name: str) -> npt.NDArray[Any]:
            if hash_of_file(directory / f"{name}.npy") != about["hashes"][name]:
                raise ValueError(f"{name}.npy is not what was written")
            array: npt.NDArray[Any] = np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return array

        columns = GroupColumns(
            **{name: read(name) for name in _ARRAYS},
            row_values={name: read(f"numbers.{name}") for name in about["numbers"]},
        )
        check_columns(columns, len(about["source_names"]))
        store = GroupStore(columns, about["source_names"], about["source_weights"], about["digest"])
        if len(store) != about["num_groups"]:
            raise ValueError(f"it holds {len(store)} groups, expected {about['num_groups']}")
        return store


def check_columns(columns: GroupColumns, num_sources: int) -> None:
    """Refuse arrays that do not make up groups, so that nothing is read from outside of them.

    Raises:
        ValueError: saying what is wrong.
    """
    for name, expected in _DTYPES.items():
        array = getattr(columns, name)
        if array.dtype != expected or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} of {array.ndim} dimensions, expected {np.dtype(expected)} of 1")
    segment_offsets, group_segments = columns.segment_offsets_S, columns.group_segments_G
    for name, offsets, end, least in (
        ("segment_offsets_S", segment_offsets, len(columns.tokens_T), 0),
        ("group_segments_G", group_segments, len(segment_offsets) - 1, 2),
    ):
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < least).any():
            raise ValueError(f"{name} does not lead through the {end} entries that it divides")
    num_groups = len(group_segments) - 1
    if not num_groups == len(columns.num_prompts_G) == len(columns.rows_G) == len(columns.sources_G):
        raise ValueError("its arrays are of different numbers of groups")
    num_responses = np.diff(group_segments) - columns.num_prompts_G
    if ((columns.num_prompts_G != 1) & (columns.num_prompts_G != num_responses)).any() or (num_responses < 1).any():
        raise ValueError("a group has neither one prompt nor one a response")
    if columns.rows_G.min(initial=0) < 0 or not 0 <= columns.sources_G.min(initial=0) <= columns.sources_G.max(initial=0):
        raise ValueError("a row or a source has a negative number")
    if num_groups and columns.sources_G.max() >= num_sources:
        raise ValueError("a group is of a source that is not there")
    if columns.tokens_T.min(initial=0) < 0:
        raise ValueError("a token id is negative")


def read_about(directory: Path) -> dict[str, Any]:
    """What store.json says of a saved store.

    Raises:
        OSError: it cannot be read.
        ValueError, KeyError, TypeError: it is damaged, of another store or of another format version.
    """
    text = (directory / ABOUT).read_bytes()
    if not is_sealed(text):
        raise ValueError(f"{ABOUT} is not what was written")
    about: dict[str, Any] = json.loads(text)
    if about["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it has format version {about['format_version']}, expected {FORMAT_VERSION}")
    if about["key"] != directory.name:
        raise ValueError(f"it was written as {about['key']}")
    return about
