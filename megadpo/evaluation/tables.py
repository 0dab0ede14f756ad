"""The figures of an evaluation as tables on a terminal; plain text where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from megadpo.evaluation.scores import KINDS

MOST_ANSWERS = 8
"""Shown on the terminal; eval.json has all."""
MOST_CHARACTERS = 600
BAR = 24
PLAIN_WIDTH = 132
"""Where nobody says how wide the paper is."""


def console() -> Console:
    """stdout: in colours and as wide as a terminal, where it is one."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def tables(report: Mapping[str, Any]) -> RenderableType:
    """Everything that there is of a report."""
    parts: list[RenderableType] = [_heading(report)]
    if "subsets" in report:
        parts += [_subsets(report), *([_sections(report)] if report["sections"] else [])]
        parts += [_kinds(report), _calibration(report), _lengths(report)]
    if report.get("kl"):
        parts.append(_kl(report["kl"]))
    if "generations" in report:
        parts.append(_generations(report))
    if "harness" in report:
        parts.append(_harness(report["harness"]))
    parts += [Text(f"note: {remark}", style="yellow") for remark in report["remarks"]]
    return Group(*parts)


def _table(title: str, columns: Sequence[str], num_left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < num_left else "right", overflow="fold")
    return table


def _heading(report: Mapping[str, Any]) -> Text:
    against = f" against {report['reference']}" if report["reference"] else ", no reference"
    return Text(f"{report['model']}{against}, {report['dtype']}, {report['layout']}")


def _subsets(report: Mapping[str, Any]) -> Table:
    score = report["score"]
    has_reference = "chosen_win_rate" in report["all"]
    columns = ["subset", "pairs", "accuracy", "95 %", "ties", "margin", "±", "chosen", "rejected"]
    columns += ["chosen up", "rejected up"] if has_reference else []
    beta = "" if report["beta"] is None else f", beta {report['beta']:g}"
    table = _table(f"Reward accuracy by {score} ({KINDS[score]}{beta})", columns)
    for record in report["subsets"]:
        table.add_row(escape(record["name"]), *_cells(record, has_reference))
    table.add_section()
    mean = report["mean_over_subsets"]
    empty = [""] * (len(columns) - 6)
    table.add_row("mean over subsets", "", _share(mean["accuracy"]), "", "", _number(mean["margin"]), *empty)
    table.add_row("all pairs", *_cells(report["all"], has_reference), style="bold")
    return table


def _cells(record: Mapping[str, Any], has_reference: bool) -> list[str]:
    cells = [f"{record['num_pairs']:,}", _share(record["accuracy"]), _interval(record), f"{record['num_ties']:,}"]
    cells += [_number(record[name]) for name in ("margin", "margin_error", "chosen_score", "rejected_score")]
    return cells + ([_share(record[f"{side}_win_rate"]) for side in ("chosen", "rejected")] if has_reference else [])


def _sections(report: Mapping[str, Any]) -> Table:
    table = _table("RewardBench's sections", ["section", "score", "subsets", "missing"])
    for record in report["sections"]:
        table.add_row(record["name"], _share(record["accuracy"]), str(record["num_subsets"]), ", ".join(record["missing"]))
    if report["reward_bench"] is not None:
        table.add_section()
        table.add_row("mean of the sections", _share(report["reward_bench"]), "", "", style="bold")
    return table


def _kinds(report: Mapping[str, Any]) -> Table:
    table = _table("Kinds of score, over all pairs", ["score", "what", "accuracy", "95 %", "ties", "calibration error"], 2)
    for name, record in report["kinds"].items():
        what = KINDS.get(name) or f"the reference's own {name.removeprefix('reference_')}"
        cells = [_share(record["accuracy"]), _interval(record), f"{record['num_ties']:,}"]
        table.add_row(name, what, *cells, _number(record.get("calibration_error")))
    return table


def _calibration(report: Mapping[str, Any]) -> Table:
    title = f"Calibration of sigmoid(margin): expected error {_number(report['calibration_error'])}"
    table = _table(title, ["probability", "pairs", "predicted", "right", "95 %", ""])
    for record in report["calibration"]:
        cells = [f"{record['num_pairs']:,}", _share(record["predicted"]), _share(record["accuracy"]), _interval(record)]
        filled = round(BAR * record["accuracy"])
        bar = Text("█" * filled + "░" * (BAR - filled), style="green")
        table.add_row(f"{record['low']:.2f} to {record['high']:.2f}", *cells, bar)
    return table


def _lengths(report: Mapping[str, Any]) -> Table:
    table = _table("By length", ["", "pairs", "accuracy", "95 %"])
    for record in report["by_length"]:
        table.add_row(record["name"], f"{record['num_pairs']:,}", _share(record["accuracy"]), _interval(record))
    return table


def _kl(record: Mapping[str, Any]) -> Table:
    what = "KL divergence from the reference" if record["is_estimate"] else "Log-ratio to the reference"
    table = _table(f"{what}, nats", ["answers", "an answer", "±", "k3", "a token"], 0)
    values = [_number(record[name]) for name in ("estimate", "standard_error", "estimate_k3", "per_token")]
    table.add_row(f"{record['num_answers']:,}", *values)
    return table


def _generations(report: Mapping[str, Any]) -> Table:
    records, options = report["generations"], report["generation"]
    how = "greedy" if not options["temperature"] else f"temperature {options['temperature']:g}, seed {options['seed']}"
    shown = "" if len(records) <= MOST_ANSWERS else f", {MOST_ANSWERS} of {len(records)} prompts"
    has_reference = report["reference"] is not None
    columns = ["prompt", "model", *(["reference"] if has_reference else [])]
    table = _table(f"Answers ({how}{shown})", columns, len(columns))
    table.show_lines = True
    for record in records[:MOST_ANSWERS]:
        table.add_row(*(escape(_short(record[name])) for name in ("prompt", "policy", "reference")[: len(columns)]))
    return table


def _short(text: str) -> str:
    """A prompt's end and an answer's beginning are what is read first: the middle is left out."""
    text = "".join(character if character.isprintable() or character == "\n" else " " for character in text).strip()
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def _harness(results: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = _table("lm-evaluation-harness", ["task", "metric", "value", "±"], 2)
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not metric.endswith("_stderr") and kind:
                table.add_row(escape(task), escape(name), _number(value), _number(figures.get(f"{metric}_stderr,{kind}")))
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _interval(record: Mapping[str, Any]) -> str:
    low, high = record["accuracy_low"], record["accuracy_high"]
    return "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
