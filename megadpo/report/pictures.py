"""The charts of a report as PNG files, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadpo.pages.charts import Series
from megadpo.report.curves import Chart, groups_of, is_logarithmic, series_of, series_of_runs
from megadpo.report.run_files import RunFiles
from megadpo.report.series import running_mean, window_of

COLOURS = ("#1b6ca8", "#c2511b", "#2c8a4b", "#8d4fa8", "#b3263e", "#00798c", "#7a5c1e", "#555f6b")
FEWEST_TO_SMOOTH = 24


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write_pictures(runs: Sequence[RunFiles], directory: Path) -> list[Path]:
    """A PNG for each chart of the page.

    Raises:
        OSError: one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for charts in groups_of(runs).values():
        for chart in charts:
            if len(runs) == 1:
                drawn = [(chart.title, chart.file, series_of(runs[0], chart))]
            else:
                drawn = [_of_runs(runs, chart, name, label) for name, label in chart.metrics.items()]
            for title, file, series in drawn:
                path = directory / f"{_safe(file)}.png"
                _draw(title, series, chart, path)
                written.append(path)
    return written


def _of_runs(runs: Sequence[RunFiles], chart: Chart, name: str, label: str) -> tuple[str, str, list[Series]]:
    is_alone = len(chart.metrics) == 1
    title = chart.title if is_alone else f"{chart.title}: {label}"
    return title, chart.file if is_alone else f"{chart.file}-{label}", series_of_runs(runs, name)


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).lower()


def _draw(title: str, series: Sequence[Series], chart: Chart, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6))
    axes: Any = figure.add_axes((0.11, 0.14, 0.86, 0.76))  # a layout that is computed takes three times as long
    for one in series:
        colour = COLOURS[(one.colour or 0) % len(COLOURS)]
        style = {"color": colour, "linestyle": "--" if one.is_dashed else "-", "linewidth": 1.3}
        values = [math.nan if value is None else value for value in one.y]
        is_smoothed = chart.is_noisy and len(values) > FEWEST_TO_SMOOTH and all(map(math.isfinite, values))
        marker = "o" if len(values) <= FEWEST_TO_SMOOTH else None
        if is_smoothed:
            axes.plot(one.x, values, alpha=0.3, **(style | {"linewidth": 0.8}))
            values = running_mean(values, window_of(len(values)))
        axes.plot(one.x, values, label=_plain(one.name), marker=marker, markersize=2.5, **style)
    axes.set_title(_plain(title), fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if is_logarithmic(next(iter(chart.metrics)), series):
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula, and that is in its legend even where it begins with an underscore."""
    return " " * text.startswith("_") + text.replace("$", r"\$")
