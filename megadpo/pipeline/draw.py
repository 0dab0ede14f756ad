"""Draws schedules as SVG: a row for each stage, a box for each operation, as wide as its duration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megadpo.pipeline.schedule import AHEAD, BACKWARD, FORWARD, REFERENCE, WEIGHTS
from megadpo.pipeline.simulate import Timing

COLOURS = {FORWARD: "#4c8bd6", BACKWARD: "#e39a3b", WEIGHTS: "#efc58d", REFERENCE: "#57a868", AHEAD: "#a9d6b4"}
NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    WEIGHTS: "gradients of weights",
    REFERENCE: "reference",
    AHEAD: "reference, next step",
}
HALVES = ("chosen", "rejected")
ROW, MARGIN, LETTER = 26, 70, 7
"""Pixels: the height of a row, the room for its name, the width of a digit."""


def svg(panels: Sequence[tuple[str, Timing]], width: int = 1400) -> str:
    """An SVG of timings one under the other, each with its title, all on the same scale."""
    longest = max((timing.seconds for _, timing in panels), default=0.0) or 1.0
    scale, top, parts = (width - MARGIN - 10) / longest, 30, [_legend()]
    for title, timing in panels:
        parts.append(_text(MARGIN, top + 14, title, weight="bold"))
        top += 22
        for stage, share in enumerate(timing.idle_shares() if timing.seconds else []):
            y = top + stage * ROW
            parts.append(_text(4, y + 16, f"stage {stage}"))
            parts.append(
                f'<rect x="{MARGIN}" y="{y}" width="{timing.seconds * scale:.2f}" height="{ROW - 4}" fill="#eeeeee">'
                f"<title>stage {stage}: idle {share:.1%}</title></rect>"
            )
        parts += [_box(timing, entry, top, scale) for entry in timing.entries()]
        top += timing.schedule.num_stages * ROW + 12
    size = f'width="{width}" height="{top + 8}" viewBox="0 0 {width} {top + 8}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _box(timing: Timing, entry: tuple, top: int, scale: float) -> str:
    stage, op, start, end = entry
    x, y, wide = MARGIN + start * scale, top + stage * ROW, (end - start) * scale
    chunk = f", chunk {op.chunk}" if timing.schedule.num_chunks > 1 else ""
    half = f", {HALVES[op.half]}" if timing.schedule.num_halves > 1 else ""
    title = f"{NAMES[op.kind]} of micro-batch {op.micro_batch}{chunk}{half}: {start:.4g} to {end:.4g}"
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW - 4}" fill="{COLOURS[op.kind]}" stroke="white" '
        f'stroke-width="{0.7 if wide > 4 else 0}"><title>{title}</title></rect>'
    )
    label = str(op.micro_batch) + (HALVES[op.half][0] if timing.schedule.num_halves > 1 else "")
    return box + (_text(x + wide / 2, y + 15, label, "middle") if wide > LETTER * len(label) + 2 else "")


def _legend() -> str:
    parts, x = [], MARGIN
    for kind, name in NAMES.items():
        parts.append(f'<rect x="{x}" y="6" width="14" height="14" fill="{COLOURS[kind]}"/>' + _text(x + 19, 17, name))
        x += 34 + LETTER * len(name)
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.2f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
