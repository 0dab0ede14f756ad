"""All groups of a run on memory-mapped flat arrays: any number of rows, shared between processes by the page cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from megadpo.data.groups import Group

FORMAT_VERSION = 1


@dataclass(frozen=True)
class GroupColumns:
    """Groups as flat arrays.

    Group g owns segments group_segments_G[g] to group_segments_G[g + 1] - 1: its prompts, then its responses.

    Attributes:
        tokens_T: int32, every token of every segment, one after the other.
        segment_offsets_S: int64 [S + 1], where each segment starts in `tokens_T`, and the end.
        group_segments_G: int64 [G + 1], where each group starts among the segments, and the end.
        num_prompts_G: int32 [G], 1 or the number of responses.
        rows_G: int64 [G], position of the row in the sources.
        sources_G: int32 [G], number of the source.
    """

    tokens_T: npt.NDArray[np.int32]
    segment_offsets_S: npt.NDArray[np.int64]
    group_segments_G: npt.NDArray[np.int64]
    num_prompts_G: npt.NDArray[np.int32]
    rows_G: npt.NDArray[np.int64]
    sources_G: npt.NDArray[np.int32]

    @staticmethod
    def of(groups: Iterable[Group], sources: Sequence[int] | None = None) -> GroupColumns:
        """Columns of groups in memory; `sources` gives each its source number (0 where left out)."""
        groups = list(groups)
        segments = [segment for group in groups for segment in (*group.prompts, *group.responses)]
        return GroupColumns(
            tokens_T=np.concatenate([np.zeros(0, np.int32), *segments]).astype(np.int32, copy=False),
            segment_offsets_S=_offsets([len(segment) for segment in segments]),
            group_segments_G=_offsets([len(group.prompts) + len(group.responses) for group in groups]),
            num_prompts_G=np.array([len(group.prompts) for group in groups], np.int32),
            rows_G=np.array([group.row for group in groups], np.int64),
            sources_G=np.array(sources if sources is not None else [0] * len(groups), np.int32),
        )

    @staticmethod
    def concatenate(parts: Sequence[GroupColumns]) -> GroupColumns:
        """The groups of all parts, in order."""
        joined = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("tokens_T", "num_prompts_G", "rows_G", "sources_G")
        }
        segments = _offsets(np.concatenate([np.diff(part.segment_offsets_S) for part in parts]))
        groups = _offsets(np.concatenate([np.diff(part.group_segments_G) for part in parts]))
        return GroupColumns(segment_offsets_S=segments, group_segments_G=groups, **joined)


def _offsets(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
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
        """A store of groups in memory, all of one source."""
        return GroupStore(GroupColumns.of(groups))

    def __len__(self) -> int:
        return len(self.columns.rows_G)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        columns = self.columns
        first, end = (int(value) for value in columns.group_segments_G[number : number + 2])
        bounds = columns.segment_offsets_S[first : end + 1]
        segments = tuple(np.asarray(columns.tokens_T[bounds[i] : bounds[i + 1]]) for i in range(end - first))
        num_prompts = int(columns.num_prompts_G[number])
        return Group(segments[:num_prompts], segments[num_prompts:], int(columns.rows_G[number]))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """int64 [G]: each group's row."""
        return self.columns.rows_G

    @property
    def sources(self) -> npt.NDArray[np.int32]:
        """int32 [G]: each group's source number."""
        return self.columns.sources_G

    @cached_property
    def digest(self) -> str:
        """blake2b over every array (not over names and weights), in hexadecimal."""
        if self._digest is not None:
            return self._digest
        hasher = hashlib.blake2b(digest_size=20)
        for item in fields(GroupColumns):
            array = np.ascontiguousarray(getattr(self.columns, item.name))
            hasher.update(f"{item.name} {array.dtype.str} {array.shape};".encode())
            hasher.update(array.data)
        return hasher.hexdigest()

    def max_token_id(self) -> int:
        """The largest id in use: it must lie below the model's vocabulary size. Reads every token."""
        return int(self.columns.tokens_T.max(initial=0))

    def segment_lengths(self) -> npt.NDArray[np.int64]:
        """int64 [S]: tokens of every segment."""
        return np.diff(self.columns.segment_offsets_S)

    def chosen_lengths(self, numbers: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of the groups `numbers`, two int64 arrays: tokens of the first response, and of the prompt before it."""
        first = np.asarray(self.columns.group_segments_G[numbers])
        response = first + self.columns.num_prompts_G[numbers]
        ends = self.columns.segment_offsets_S
        return ends[response + 1] - ends[response], ends[first + 1] - ends[first]

    def num_tokens(self, share_prompts: bool) -> npt.NDArray[np.int64]:
        """int64 [G]: tokens each group puts into the model's stream, as `Group.num_stream_tokens`."""
        columns = self.columns
        starts = np.asarray(columns.segment_offsets_S)[columns.group_segments_G]
        total = np.diff(starts)
        if share_prompts:
            return total
        first = columns.group_segments_G[:-1]
        prompt_lengths = self.segment_lengths()[first]
        num_copies = np.diff(columns.group_segments_G) - 2
        return total + np.where(columns.num_prompts_G == 1, num_copies * prompt_lengths, 0)

    def save(self, directory: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write .npy files and a store.json, which holds `extra` too; the directory appears whole or not at all.

        A directory that is there already is left as it is.
        """
        directory = Path(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            for item in fields(GroupColumns):
                with (partial / f"{item.name}.npy").open("wb") as file:
                    np.save(file, getattr(self.columns, item.name), allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            about = {
                "format_version": FORMAT_VERSION,
                "num_groups": len(self),
                "digest": self.digest,
                "source_names": self.source_names,
                "source_weights": self.source_weights.tolist(),
                "extra": extra or {},
            }
            with (partial / "store.json").open("w", encoding="utf-8") as file:
                json.dump(about, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            if not directory.exists():
                os.rename(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @staticmethod
    def load(directory: str | Path) -> GroupStore:
        """Memory-map a saved store.

        Raises:
            OSError, ValueError, KeyError: where it is not one, or of another format version.
        """
        directory = Path(directory)
        about = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{directory} has format version {about['format_version']}, expected {FORMAT_VERSION}")
        arrays = {
            item.name: np.load(directory / f"{item.name}.npy", mmap_mode="r", allow_pickle=False)
            for item in fields(GroupColumns)
        }
        store = GroupStore(GroupColumns(**arrays), about["source_names"], about["source_weights"], about["digest"])
        if len(store) != about["num_groups"]:
            raise ValueError(f"{directory} holds {len(store)} groups, expected {about['num_groups']}")
        return store
