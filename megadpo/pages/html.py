"""Markup that cannot be broken by what is put into it: whatever is not `Html` is escaped."""

from __future__ import annotations

import html
import re

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""What HTML cannot hold, or a browser would drop in silence."""


class Html(str):
    """Text that is markup already, and is put into a page as it is."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """A value as text of a page: `Html` as it is, all else with its markup made harmless, lone surrogates and control
    characters as the replacement character."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "replace").decode()
    return Html(html.escape(CONTROL_CHARACTERS.sub("\ufffd", text)))


def joined(*parts: object) -> Html:
    """Parts one after the other, each escaped where it is not `Html`."""
    return Html("".join(escaped(part) for part in parts))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """``<tag attribute="value">children</tag>``; of an attribute's name, a last underscore is dropped (`class_`) and the
    others become hyphens; one that is None or False is left out, and True stands without a value."""
    written = []
    for name, value in attributes.items():
        if value is not None and value is not False:
            attribute = name.rstrip("_").replace("_", "-")
            written.append(f" {attribute}" if value is True else f' {attribute}="{escaped(str(value))}"')
    return Html(f"<{tag}{''.join(written)}>{joined(*children)}</{tag}>")
