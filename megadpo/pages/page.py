"""One self-contained HTML document: no network, light and dark, readable on a telephone.

    page("A run", [Section("Curves", charts(line_chart("loss", [Series("train", steps, losses)])))])

All that comes from outside is escaped (html.py). Should something slip in all the same, the page's policy lets no script run
but its own, nothing be loaded from an address, no form be sent; a link still leads where it says when it is clicked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megadpo.pages.html import Html, element, escaped, joined
from megadpo.pages.numbers import number

HERE = Path(__file__).parent
LEVELS = {"problem": "Problem", "warning": "Warning", "note": "Note", "good": "Good"}
"""Of a notice, the gravest first -> the word it begins with."""


@dataclass(frozen=True, init=False)
class Section:
    """A part of a page with a heading; `parts` are one after the other, each escaped where it is not `Html`."""

    title: str
    parts: tuple[object, ...]

    def __init__(self, title: str, *parts: object) -> None:
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "parts", parts)


def page(title: str, sections: Iterable[Section], data: object = None, subtitle: object = "") -> str:
    """The whole document.

    Args:
        data: an object that JSON can hold, for scripts that read the page: in the element of id "data".
        subtitle: a line under the title.
    """
    sections, names = list(sections), set[str]()
    body, links = [], []
    for section in sections:
        name = _anchor(section.title, names)
        links.append(element("a", section.title, href=f"#{name}"))
        body.append(element("section", element("h2", section.title), *section.parts, id=name))
    script, style = _own("page.js"), _own("page.css")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        element("title", title),
        f"<style>{style}</style>",
    ]
    header = element("header", element("h1", title), element("p", subtitle) if subtitle else Html(""))
    nav = element("nav", *links) if len(links) > 2 else Html("")
    embedded = f'<script type="application/json" id="data">{_script_json(data)}</script>\n' if data is not None else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{"".join(head)}\n</head>\n<body>\n{header}\n{nav}\n'
        f"<main>\n{joined(*body)}\n</main>\n{embedded}<script>{script}</script>\n</body>\n</html>\n"
    )


def charts(*figures: Html) -> Html:
    """Charts side by side, as many in a row as there is room for."""
    return element("div", *figures, class_="charts")


def table(headings: Sequence[object], rows: Iterable[Sequence[object]], caption: object = None) -> Html:
    """A table; numbers stand to the right, None is an empty cell. One that is too wide scrolls inside its own box."""
    head = element("thead", element("tr", *(element("th", heading, scope="col") for heading in headings)))
    body = element("tbody", *(element("tr", *(_cell(value) for value in row)) for row in rows))
    title = element("caption", caption) if caption is not None else Html("")
    return element("div", element("table", title, head, body), class_="scroll", tabindex=0)


def facts(values: Mapping[str, object]) -> Html:
    """Names and values in two columns; one that is None is left out."""
    shown = [(name, value) for name, value in values.items() if value is not None]
    return element("dl", *(joined(element("dt", name), element("dd", _text(value))) for name, value in shown))


def notice(level: str, title: object, *parts: object) -> Html:
    """A box that says something about what is shown; `level` is one of `LEVELS`."""
    heading = element("h3", element("span", LEVELS[level], class_="level"), " ", title)
    return element("article", heading, *(part if isinstance(part, Html) else element("p", part) for part in parts),
                   class_=f"notice {level}")  # fmt: skip


def folded(summary: object, *parts: object) -> Html:
    """Parts that are shown when their summary is clicked."""
    return element("details", element("summary", summary), *parts)


def finite_json(value: object) -> object:
    """The object with nan and infinities, for which JSON has no word, as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return value


def _cell(value: object) -> Html:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return element("td", "" if value is None else _text(value), class_="number" if is_number else None)


def _text(value: object) -> Html:
    if isinstance(value, bool):
        return escaped("yes" if value else "no")
    return escaped(number(value) if isinstance(value, int | float) else value)


def _anchor(title: str, taken: set[str]) -> str:
    base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
    name, count = base, 2
    while name in taken or name == "data":
        name, count = f"{base}-{count}", count + 1
    taken.add(name)
    return name


def _script_json(data: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(finite_json(data), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
