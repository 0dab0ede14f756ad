"""The splits of a data set on disk: which of its files (or of its named parts) are for training and which are held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from megadpo.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits, and the words in names of files and folders that stand for them, as `datasets` has them."""
HELD_OUT = ("validation", "test")
ALL = "all"


def split_of(path: PurePath) -> str | None:
    """The split that a path below a data set's directory names: in the file's name, else in the nearest folder's."""
    for part in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        words = set(re.split(r"[\W\d_]+", part.lower()))
        found = [split for split, names in SPLITS.items() if not words.isdisjoint(names)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def choose_split(names: Sequence[PurePath], asked: str | None, held_out: bool, where: str) -> tuple[list[PurePath], str]:
    """The names that are to be read, in their order, and which split they are ("" where there are no splits).

    Args:
        names: files below a directory, or parts of a data set.
        asked: the source's `split`; `all`: whatever their names are.
        held_out: whether rows to evaluate on are wanted.
        where: the source, for error messages.

    Raises:
        UserError: there is no such split, or none for what is wanted.
    """
    splits = {name: split_of(name) for name in names}
    there = [split for split in SPLITS if split in splits.values()]
    if asked == ALL or (asked is None and not there):
        return list(names), ""
    wanted = [asked] if asked is not None else list(HELD_OUT) if held_out else ["train"]
    split = next((split for split in wanted if split in there), None)
    if split is not None:
        return [name for name in names if splits[name] == split], split
    rest = [name for name in names if splits[name] is None]
    if wanted == ["train"] and rest:
        return rest, "train"
    purpose = "held-out split to evaluate on" if held_out and asked is None else f"{wanted[0]} split"
    raise UserError(
        f"data: {where} has no {purpose}; it has {', '.join(there) or 'no split'}; name one as "
        f"{{path: …, split: {there[0] if there else ALL}}}, or `split: {ALL}` for all that is there"
    )
