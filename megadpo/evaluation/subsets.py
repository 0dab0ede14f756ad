"""What pairs are evaluated on, and the subset that each belongs to: its row's `subset`, else the name of its data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megadpo.config.sources import Source, parse_sources
from megadpo.data.rows.row_files import SUFFIXES
from megadpo.data.rows.sources import iter_rows
from megadpo.data.store import GroupColumns, GroupStore
from megadpo.errors import UserError

COLUMN = "subset"
"""The column of RewardBench's rows."""
REWARD_BENCH_COLUMNS = ("chosen_model", "rejected_model")
"""Columns of its rows with text that is not meant to be read."""
NO_SUBSET = "(no subset)"
"""Of rows that lack what others of their source have."""


@dataclass(frozen=True)
class EvaluationData:
    """One source of pairs.

    Attributes:
        value: as `data.eval` has it.
        name: what its pairs are called; None: the user gave none.
    """

    value: Any
    name: str | None = None


def named_data(words: Sequence[str]) -> list[EvaluationData]:
    """What `--data [NAME=]FILE …` names.

    Raises:
        UserError: NAME or FILE is empty.
    """
    found = []
    for word in words:
        name, is_named, value = word.partition("=")
        if not is_named or "/" in name or os.path.exists(word):  # a path may have a "=" in it
            found.append(EvaluationData(word))
            continue
        if not name.strip() or not value.strip():
            raise UserError(f"--data: {word!r} must be FILE or NAME=FILE, both not empty")
        found.append(EvaluationData(value, name.strip()))
    return found


@dataclass(frozen=True)
class LabelledRows:
    """What is known of the rows before any is tokenised.

    Attributes:
        subsets: of every row, in the order of the sources.
        has_text_prompts: of every source, whether every row has a `prompt` that is text.
    """

    subsets: list[str]
    has_text_prompts: list[bool]


def read_subsets(data: Sequence[EvaluationData], columns: Mapping[str, str], column: str | None) -> LabelledRows:
    """Read every row for its subset.

    Args:
        columns: `data.columns`, which may rename the rows' fields.
        column: that holds the subset, which then must be there; None: `subset`, where there is one.

    Raises:
        UserError: a source cannot be read, a subset is no name, or no row has the column.
    """
    sources = [parse_sources(one.value, columns, "--data", held_out=True) for one in data]
    defaults = _default_names([source for group in sources for source in group])
    subsets: list[str] = []
    has_text_prompts: list[bool] = []
    seen: dict[str, None] = {}
    number = 0
    for one, group in zip(data, sources, strict=True):
        for source in group:
            found, fields, is_text = _of_source(source, column or COLUMN)
            seen |= fields
            has_text_prompts.append(is_text)
            if all(name is None for name in found):
                subsets += [one.name or defaults[number]] * len(found)
            else:
                subsets += [(f"{one.name}/" if one.name else "") + (name or NO_SUBSET) for name in found]
            number += 1
    if column is not None and column not in seen:
        raise UserError(f"--subset-column {column}: no row has it; the rows have {', '.join(seen)}")
    return LabelledRows(subsets, has_text_prompts)


def _of_source(source: Source, column: str) -> tuple[list[str | None], dict[str, None], bool]:
    """The subset of each row, the fields that rows have, and whether each has a prompt of text."""
    found, fields, num_text = [], dict[str, None](), 0
    for location, row in iter_rows(replace(source, ignored=())):
        found.append(_subset(row.get(column), column, location))
        fields |= dict.fromkeys(row)
        num_text += isinstance(row.get("prompt"), str)
    return found, fields, 0 < num_text == len(found)


def _subset(value: Any, column: str, location: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str | int | float):
        raise UserError(
            f"{location}: `{column}` is {value!r:.40}; a subset is a name; correct it, or name another column with "
            "--subset-column"
        )
    return str(value).strip()


def _default_names(sources: Sequence[Source]) -> list[str]:
    """The file's name without its suffix; the whole path where two have the same."""
    names = [_stem(source.name) for source in sources]
    return [name if names.count(name) == 1 else source.name for name, source in zip(names, sources, strict=True)]


def _stem(path: str) -> str:
    name = Path(path).name or path
    return next((name.removesuffix(suffix) for suffix in sorted(SUFFIXES, key=len) if name.endswith(suffix)), name)


def sources_of(
    data: Sequence[EvaluationData], columns: Mapping[str, str], as_messages: Sequence[bool]
) -> list[dict[str, Any]]:
    """The value of `data.eval` that stands for the data.

    Args:
        columns: `data.columns`; every source gets its own, so that the option is to be left out beside this.
        as_messages: of every source, whether the text of a `prompt` is what a user says, and that of the answers what the
            assistant does, so that the chat template is used.
    """
    sources = [source for one in data for source in parse_sources(one.value, columns, "--data", held_out=True)]
    values = []
    for source, is_conversation in zip(sources, as_messages, strict=True):
        renames = dict(source.columns)
        if is_conversation:
            renames["question"] = renames.pop("prompt", "prompt")
        given = {"path": source.path, "weight": source.weight, "columns": renames}
        named = {"split": source.split, "subset": source.subset}
        values.append(given | {key: value for key, value in named.items() if value is not None})
    return values


def first_of_each(groups: GroupStore, sets: Sequence[str | None], count: int) -> GroupStore:
    """The first groups of each set; `sets` has the name of each source's."""
    if len(set(sets)) == 1:
        return groups.first(count)
    set_G = np.array([sets.index(name) for name in sets])[groups.sources]
    kept = np.sort(np.concatenate([np.flatnonzero(set_G == number)[:count] for number in np.unique(set_G)]))
    columns = GroupColumns.of([groups[group_id] for group_id in kept], groups.sources[kept].tolist())
    return GroupStore(columns, groups.source_names, groups.source_weights.tolist())
