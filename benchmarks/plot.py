"""Charts as SVG, in plain Python: stacked bars, and lines with both axes logarithmic, so that a line's slope is a power."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 70, 190, 50, 50
COLOURS = ("#1b6ca8", "#d1495b", "#3c8d53", "#8d5a97", "#c98a1b", "#555555", "#5aa9b8", "#b07d62", "#cccccc")
BAR, LETTER = 26, 6.8
"""Of stacked bars: the height of one with the space below it, and the width that a letter of their names may take."""


def line_chart(
    path: Path, title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Write a chart with one line a name; its points are (x, y), both above 0."""
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (0, 1))
    x_ticks, y_ticks = _powers_of_two(xs), _powers_of_two(ys)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(x, x_ticks)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, y_ticks)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="{LEFT}" y="{TOP - 8}" text-anchor="end">{escape(y_label)}</text>',
    ]
    for x in x_ticks:
        parts.append(_rule(across(x), TOP, across(x), HEIGHT - BOTTOM))
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_number(x)}</text>')
    for y in y_ticks:
        parts.append(_rule(LEFT, down(y), WIDTH - RIGHT, down(y)))
        parts.append(f'<text x="{LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{_number(y)}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(across(x), down(y)) for x, y in points]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        height = TOP + 10 + 20 * number
        parts.append(_rule(WIDTH - RIGHT + 14, height, WIDTH - RIGHT + 34, height, colour, 2))
        parts.append(f'<text x="{WIDTH - RIGHT + 40}" y="{height + 4}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def stacked_bars(path: Path, title: str, unit: str, bars: Mapping[str, Mapping[str, float]]) -> None:
    """Write a chart with one bar a name, from left to right its parts by their names; a part's length is its number."""
    parts_of_all = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    most = max((sum(bar.values()) for bar in bars.values()), default=0.0) or 1.0
    names = 20 + round(LETTER * max(map(len, bars), default=0))
    bottom = TOP + BAR * len(bars)
    width, height = names + WIDTH - LEFT, bottom + 30 + 20 * -(-len(parts_of_all) // 4)
    scale = (width - names - LEFT) / most
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="15">{escape(title)}</text>',
    ]
    for row, (name, bar) in enumerate(bars.items()):
        top, left = TOP + BAR * row, float(names)
        drawn.append(f'<text x="{names - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        for part, number in bar.items():
            drawn.append(
                f'<rect x="{left:.1f}" y="{top}" width="{number * scale:.1f}" height="{BAR - 6}" '
                f'fill="{_colour(parts_of_all, part)}"><title>{escape(part)}: {number:.4g} {escape(unit)}</title></rect>'
            )
            left += number * scale
        drawn.append(f'<text x="{left + 6:.1f}" y="{top + 14}">{sum(bar.values()):,.4g} {escape(unit)}</text>')
    for number, part in enumerate(parts_of_all):
        left, top = 10 + (width - 20) / 4 * (number % 4), bottom + 10 + 20 * (number // 4)
        drawn.append(f'<rect x="{left:.1f}" y="{top}" width="12" height="12" fill="{_colour(parts_of_all, part)}"/>')
        drawn.append(f'<text x="{left + 18:.1f}" y="{top + 10}">{escape(part)}</text>')
    path.write_text("\n".join([*drawn, "</svg>"]) + "\n", encoding="utf-8")


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[names.index(name) % len(COLOURS)]


def _powers_of_two(values: Sequence[float]) -> list[float]:
    """From the one at or below the least value to the one at or above the largest."""
    first, last = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**power for power in range(first, max(last, first + 1) + 1)]


def _share(value: float, ticks: Sequence[float]) -> float:
    """Where the value lies between the first and last tick, 0 to 1."""
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str = "#dddddd", width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _number(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
