"""Charts as inline SVG: lines and histograms with hover (page.js), bars. They are whole without the script, too.

A chart is 400 units wide, about as many pixels as a column of a page has; a curve of more points than that is drawn by the
lowest and the highest of each short stretch, so that a single spike of a long run is seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megadpo.pages.html import Html, element, escaped, joined
from megadpo.pages.numbers import log_ticks, number, tick_labels, ticks
from megadpo.pages.page import finite_json

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 8, 190
"""Of the box that the curves are in."""
MOST_POINTS = 400
"""Drawn of a curve."""
MOST_DOTS = 40
"""Points of a curve up to which each has a dot."""
NUM_COLOURS = 8
"""Of page.css; a ninth series begins anew."""


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        name: shown in the legend and on hover.
        x: ascending.
        y: as many; None where there is no value; what is not finite is drawn as a cross on the axis.
        colour: its number in the page's style; by default its place among the curves of its chart.
        is_dashed: drawn as dashes: a second kind of curve, such as evaluation.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int | None = None
    is_dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the x axis that is pointed out by an upright line."""

    x: float
    text: str


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "step",
    note: object = None,
    marks: Sequence[Mark] = (),
    smooth: bool = False,
    log_y: bool = False,
) -> Html:
    """Curves over a common x axis, with the values under the pointer.

    Args:
        note: a line under the chart.
        smooth: a curve of many points is drawn faintly, and its running mean over it.
        log_y: a logarithmic y axis, where all values are positive.
    """
    points = [value for one in series for value in one.y if value is not None and math.isfinite(value)]
    xs = [value for one in series for value in one.x]
    if not points:
        return _figure(title, series, element("p", "no finite value", class_="empty"), note)
    log_y = log_y and min(points) > 0
    x = _Axis(*_padded(min(xs), max(xs), 0.0), LEFT, RIGHT, is_whole=_are_whole(xs))
    if log_y:
        y = _Axis(min(points) / 1.1, max(points) * 1.1, BOTTOM, TOP, is_log=True)
    else:
        y = _Axis(*_padded(min(points), max(points), 0.05), BOTTOM, TOP)
    drawn: list[Html] = [_grid(x, y, x_label)]
    drawn += [_mark(mark, x) for mark in marks if x.low <= mark.x <= x.high]
    kept = [_thinned(one.x, one.y) for one in series]
    for number_, (one, (xs_kept, ys_kept)) in enumerate(zip(series, kept, strict=True)):
        drawn.append(_curve(one, _colour(one, number_), xs_kept, ys_kept, x, y, smooth))
    hover = {
        "kind": "lines", "x": x.as_json(), "y": y.as_json(), "xLabel": x_label,
        "series": [{"name": one.name, "colour": _colour(one, place), "x": xs_kept, "y": ys_kept}
                   for place, (one, (xs_kept, ys_kept)) in enumerate(zip(series, kept, strict=True))],
    }  # fmt: skip
    return _figure(title, series, _svg(title, drawn, hover), note)


def histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    x_label: str,
    num_bins: int = 30,
    note: object = None,
    marks: Sequence[Mark] = (),
) -> Html:
    """How often values occur, of one kind or of several over the same bins, with the counts under the pointer."""
    finite = {name: [value for value in some if math.isfinite(value)] for name, some in values.items()}
    every = [value for some in finite.values() for value in some]
    names = [Series(name, (), ()) for name in values]
    if not every:
        return _figure(title, names, element("p", "no values", class_="empty"), note)
    edges = _bin_edges(min(every), max(every), num_bins, _are_whole(every))
    counts = [_counts(some, edges) for some in finite.values()]
    x = _Axis(edges[0], edges[-1], LEFT, RIGHT)
    y = _Axis(0, max(max(some) for some in counts) * 1.05, BOTTOM, TOP, is_whole=True)
    drawn = [_grid(x, y, x_label)]
    drawn += [_mark(mark, x) for mark in marks if x.low <= mark.x <= x.high]
    for place, some in enumerate(counts):
        way = f"M{x(edges[0]):.1f} {BOTTOM}"
        for left, right, count in zip(edges, edges[1:], some, strict=False):
            way += f"V{y(count):.1f}" if left == edges[0] else f"H{x(left):.1f}V{y(count):.1f}"
            way += f"H{x(right):.1f}"
        drawn.append(element("path", d=f"{way}V{BOTTOM}Z", class_=f"area c{place % NUM_COLOURS}"))
    hover = {
        "kind": "bins", "x": x.as_json(), "y": y.as_json(), "xLabel": x_label, "edges": edges,
        "series": [{"name": name, "colour": place % NUM_COLOURS, "y": some}
                   for place, (name, some) in enumerate(zip(values, counts, strict=True))],
    }  # fmt: skip
    return _figure(title, names, _svg(title, drawn, hover), note)


def bars(title: str, values: Mapping[str, float], note: object = None, words: Callable[[float], str] = number) -> Html:
    """Named amounts as bars, each with its number (as `words` writes it)."""
    largest = max((abs(value) for value in values.values() if math.isfinite(value)), default=0.0) or 1.0
    rows = []
    for name, value in values.items():
        share = 100 * abs(value) / largest if math.isfinite(value) else 0.0
        bar = element("span", element("span", style=f"width:{share:.1f}%"), class_="bar")
        rows.append(joined(element("span", name, class_="name"), bar, element("span", words(value), class_="number")))
    return _figure(title, (), element("div", *rows, class_="bars"), note)


@dataclass(frozen=True)
class _Axis:
    """From values between `low` and `high` to places between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    is_whole: bool = False

    def __call__(self, value: float) -> float:
        scale = math.log10 if self.is_log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Places to name, and their words."""
        found = log_ticks(self.low, self.high) if self.is_log else ticks(self.low, self.high)
        if self.is_whole:
            found = [value for value in found if float(value).is_integer()]
        return found, [number(value) for value in found] if self.is_log else tick_labels(found)

    def as_json(self) -> list[float | bool]:
        return [self.low, self.high, self.start, self.end, self.is_log]


def _are_whole(values: Sequence[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with some room at both ends, not beyond zero where all is on one side of it; never empty."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 1.0
        return low - room, high + room
    room = (high - low) * share
    return (max(0.0, low - room) if low >= 0 else low - room), (min(0.0, high + room) if high <= 0 else high + room)


def _thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """At most about `MOST_POINTS` points: of each stretch the lowest and the highest, and the first that is not finite."""
    stretch = -(-2 * len(x) // MOST_POINTS)
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    kept: set[int] = {0, len(x) - 1}
    for start in range(0, len(x), stretch):
        places = range(start, min(start + stretch, len(x)))
        finite = [(value, place) for place in places if (value := y[place]) is not None and math.isfinite(value)]
        bad = [place for place in places if (value := y[place]) is not None and not math.isfinite(value)]
        kept |= {min(finite)[1], max(finite)[1]} if finite else set()
        kept |= set(bad[:1])
    return [x[place] for place in sorted(kept)], [y[place] for place in sorted(kept)]


def _running_mean(y: Sequence[float | None]) -> list[float | None]:
    """The mean of the values around each, of a thirtieth of all."""
    half = max(2, len(y) // 60)
    finite = [value if value is not None and math.isfinite(value) else None for value in y]
    sums = [0.0, *accumulate(value or 0.0 for value in finite)]
    counts = [0, *accumulate(value is not None for value in finite)]
    means: list[float | None] = []
    for place in range(len(y)):
        start, end = max(0, place - half), min(len(y), place + half + 1)
        count = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / count if count else None)
    return means


def _curve(
    one: Series, colour: int, xs: Sequence[float], ys: Sequence[float | None], x: _Axis, y: _Axis, smooth: bool
) -> Html:
    """A series of which the points `xs`, `ys` are drawn."""
    is_smoothed = smooth and len(one.x) > MOST_DOTS
    classes = f"line c{colour}" + (" dashed" if one.is_dashed else "")
    parts = [element("path", d=_way(xs, ys, x, y), class_=classes + (" raw" if is_smoothed else ""))]
    if is_smoothed:
        mean = _thinned(one.x, _running_mean(one.y))
        parts.append(element("path", d=_way(*mean, x, y), class_=classes))
    elif len(xs) <= MOST_DOTS:
        places = [(x(a), y(b)) for a, b in zip(xs, ys, strict=True) if b is not None and math.isfinite(b)]
        parts += [element("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2, class_=f"dot c{colour}") for a, b in places]
    bad = [x(a) for a, b in zip(xs, ys, strict=True) if b is not None and not math.isfinite(b)]
    if bad:
        way = "".join(f"M{place - 3:.1f} {BOTTOM - 7}l6 6m0 -6l-6 6" for place in bad)
        parts.append(element("path", element("title", f"{one.name}: not finite"), d=way, class_="bad"))
    return joined(*parts)


def _way(xs: Sequence[float], ys: Sequence[float | None], x: _Axis, y: _Axis) -> str:
    """The path through all finite points; it begins anew after a gap."""
    way, is_down = "", False
    for a, b in zip(xs, ys, strict=True):
        if b is None or not math.isfinite(b):
            is_down = False
        else:
            way += f"{'L' if is_down else 'M'}{x(a):.1f} {y(b):.1f}"
            is_down = True
    return way


def _grid(x: _Axis, y: _Axis, x_label: str) -> Html:
    parts = []
    for value, label in zip(*y.ticks(), strict=True):
        place = f"{y(value):.1f}"
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=place, y2=place, class_="grid"))
        parts.append(element("text", label, x=LEFT - 5, y=f"{y(value) + 4:.1f}", text_anchor="end"))
    room = 30  # the label of the axis stands at the right, in place of a tick's
    for value, label in zip(*x.ticks(), strict=True):
        if x(value) < RIGHT - room - 4 * len(x_label):
            parts.append(element("text", label, x=f"{x(value):.1f}", y=BOTTOM + 15, text_anchor="middle"))
    parts.append(element("text", x_label, x=RIGHT, y=BOTTOM + 15, text_anchor="end", class_="label"))
    parts.append(element("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    return joined(*parts)


def _mark(mark: Mark, x: _Axis) -> Html:
    place = f"{x(mark.x):.1f}"
    return element("line", element("title", mark.text), x1=place, x2=place, y1=TOP, y2=BOTTOM, class_="mark")


def _svg(title: str, drawn: Sequence[Html], hover: object) -> Html:
    return element("svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT - 10}", role="img", aria_label=title,
                   data_chart=json.dumps(finite_json(hover), allow_nan=False))  # fmt: skip


def _figure(title: str, series: Sequence[Series], drawing: Html, note: object) -> Html:
    named = [one for one in series if one.name and (len(series) > 1 or one.name != title)]
    keys = [
        element("span", one.name, class_=f"key c{_colour(one, place)}" + (" dashed" if one.is_dashed else ""))
        for place, one in enumerate(series)
        if one in named
    ]
    legend = element("div", *keys, class_="legend") if keys else Html("")
    under = element("p", note, class_="note") if note is not None else Html("")
    return element("figure", element("figcaption", escaped(title)), legend, drawing, under)


def _colour(one: Series, place: int) -> int:
    return (place if one.colour is None else one.colour) % NUM_COLOURS


def _bin_edges(low: float, high: float, num_bins: int, are_whole: bool) -> list[float]:
    """Edges of bins that all values are in; of whole numbers, bins of whole width."""
    if low == high:
        return [low - 0.5, low + 0.5]
    if are_whole:
        width = max(1, math.ceil((high - low + 1) / num_bins))
        return [low + width * place for place in range(math.ceil((high - low + 1) / width) + 1)]
    return [low + (high - low) * place / num_bins for place in range(num_bins + 1)]


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts, width = [0] * (len(edges) - 1), edges[1] - edges[0]
    for value in values:
        counts[min(int((value - edges[0]) / width), len(counts) - 1)] += 1
    return counts
