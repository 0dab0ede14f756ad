"""Parameters chosen by patterns over Hugging Face names."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

from megadpo.errors import UserError


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of the patterns that chooses the parameter of this name, or None.

    A pattern is a regular expression over the whole name (`model.layers.3.self_attn.q_proj.weight`), of which the beginning
    up to a dot, and `.weight` or `.bias` at the end, may be left out: `q_proj` chooses the queries of every layer.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).fullmatch(name)), None)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})(?:\.(?:weight|bias))?")


def check_expressions(option: str, patterns: Iterable[str]) -> None:
    """Raises UserError where one of the patterns that `option` gives is no regular expression."""
    for pattern in patterns:
        try:
            _compiled(pattern)
        except re.error as error:
            raise UserError(f"{option}: {pattern!r} is no regular expression ({error}); correct it") from error


def check_matches(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Each pattern chooses a parameter of these names that none before it chooses.

    Raises:
        UserError: naming the option, the pattern, and what there is.
    """
    chosen = {first_match(patterns, name) for name in names}
    for pattern in patterns:
        if pattern in chosen:
            continue
        if any(_compiled(pattern).fullmatch(name) for name in names):
            raise UserError(
                f"{option}: patterns before {pattern!r} match all that it does, and the first that matches counts; put it "
                "before them or remove it"
            )
        raise UserError(f"{option}: {pattern!r} matches nothing that is trained; there are {', '.join(_kinds(names))}")


def _kinds(names: Sequence[str]) -> list[str]:
    """What can be written, shortly: names within a layer once, in the model's order."""
    short = dict.fromkeys(re.sub(r"^model\.(layers\.\d+\.)?|\.(weight|bias)$", "", name) for name in names)
    shown = list(dict.fromkeys(re.sub(r"experts\.\d+", "experts.N", name) for name in short))
    return shown if len(shown) <= 24 else [*shown[:24], "…"]
