"""The report as a page: findings first, then curves, what the run was, and of several runs what tells them apart."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megadpo.config.sources import eval_prefix
from megadpo.data.rows.report import counted
from megadpo.pages.charts import Mark, Series, bars, line_chart
from megadpo.pages.html import Html, element, joined
from megadpo.pages.numbers import number
from megadpo.pages.page import Section, charts, facts, folded, notice, page, table
from megadpo.report import limits
from megadpo.report.compare import differences, flat_options, unusual_options
from megadpo.report.curves import Chart, ends_of, groups_of, is_logarithmic, series_of, series_of_runs
from megadpo.report.findings.every import CHECKS, findings_of
from megadpo.report.findings.finding import Finding
from megadpo.report.run_files import RunFiles

SUMMED_UP = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "logps/chosen": "Log-prob of chosen",
    "logps/rejected": "Log-prob of rejected",
    "entropy": "Entropy",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "peak_memory_gib": "Peak memory, GiB",
}
MOST_GENERATIONS = 20


def render(runs: Sequence[RunFiles]) -> str:
    """The page of one run, or of several."""
    data = as_json(runs)
    if len(runs) == 1:
        run = runs[0]
        return page(f"Run {run.name}", _sections(run), data, subtitle=headline(run))
    sections = [
        Section("Findings", *(_found(run, findings_of(run), heading=True) for run in runs)),
        Section("Options that differ", _differing(runs)),
        Section("Results", _compared(runs)),
        *(
            Section(group, charts(*(drawn for chart in some for drawn in _charts_of_runs(runs, chart))))
            for group, some in groups_of(runs).items()
        ),
        Section("The runs", *(folded(run.name, element("p", headline(run)), _what_it_was(run)) for run in runs)),
    ]
    return page(f"{len(runs)} runs compared", sections, data, subtitle=", ".join(run.name for run in runs))


def as_json(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the report says, for scripts."""
    described = [
        {
            "name": run.name,
            "directory": str(run.directory),
            "status": run.status,
            "steps": run.last_step,
            "num_steps": run.num_steps,
            "findings": [finding.to_dict() for finding in findings_of(run)],
            "results": {
                name: dict(zip(("first", "last"), ends, strict=True))
                for name, curve in run.curves.items()
                if (ends := ends_of(curve)) is not None
            },
            "damaged": list(run.damaged),
        }
        for run in runs
    ]
    return {"runs": described, "differences": differences(runs)}


def headline(run: RunFiles) -> str:
    """A run in a line."""
    planned = run.num_steps
    steps = counted(run.last_step, "step") if planned is None else f"{run.last_step:,} of {counted(planned, 'step')}"
    words = [f"{run.status}: {steps}"]
    for name, label in (
        ("loss", "loss"),
        ("rewards/accuracies", "accuracy"),
        ("eval_rewards/accuracies", "held-out accuracy"),
    ):
        ends = ends_of(run.curve(name))
        if ends is not None:
            words.append(f"{label} {number(ends[1])}")
    return ", ".join(words)


def _sections(run: RunFiles) -> list[Section]:
    found = findings_of(run)
    marks = [Mark(finding.step, finding.title) for finding in found if finding.step is not None]
    sections = [Section("Findings", _found(run, found)), Section("Results", _results(run))]
    for group, some in groups_of([run]).items():
        sections.append(
            Section(group, charts(*(_chart(run, chart, marks if group != "Speed and memory" else []) for chart in some)))
        )
    if run.evaluation is not None:
        sections.append(Section("Evaluation", *_evaluation(run.evaluation)))
    return [*sections, Section("What was run", _what_it_was(run))]


def _found(run: RunFiles, found: Sequence[Finding], heading: bool = False) -> Html:
    """The findings of a run, and what was looked for."""
    boxes = [_notice(finding) for finding in found]
    boxes += [notice("warning", "Damaged files", sentence) for sentence in run.damaged]
    if not boxes:
        few = run.last_step < limits.FEWEST_RECORDS
        words = f"All {len(CHECKS)} checks are silent." + (" So short a run says little." if few else "")
        boxes.append(notice("good", "Nothing stands out", words))
    named = {finding.name for finding in found}
    rows = [
        (f"{check.question[0].upper()}{check.question[1:]}?", "yes" if check.name in named else "no") for check in CHECKS
    ]
    title = element("h3", run.name) if heading else Html("")
    return joined(title, *boxes, folded("What was looked for", table(("", ""), rows)))


def _notice(finding: Finding) -> Html:
    where = "Over the whole run. " if finding.step is None else f"From step {finding.step:,} on. "
    where = (
        f"At step {finding.step:,}. " if finding.name in ("did_not_finish", "gradient_spikes") and finding.step else where
    )
    parts: list[object] = [where + finding.what, joined(element("b", "What to do: "), finding.advice)]
    shown = [part if isinstance(part, Html) and part.startswith("<p") else element("p", part) for part in parts]
    if finding.pairs:
        shown.append(_pairs(finding.pairs))
    return notice(finding.level, finding.title, *shown)


PAIR_COLUMNS = {
    "step": "step",
    "row": "row",
    "share": "share",
    "chosen_logp": "log-prob chosen",
    "rejected_logp": "log-prob rejected",
    "margin": "margin, nats",
    "chosen_tokens": "tokens chosen",
    "rejected_tokens": "tokens rejected",
    "prompt": "prompt",
    "chosen": "chosen",
    "rejected": "rejected",
}


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> Html:
    """The pairs of a finding, with those of their values that there are."""
    columns = [name for name in PAIR_COLUMNS if any(pair.get(name) is not None for pair in pairs)]
    rows = [[_plain(pair.get(name)) for name in columns] for pair in pairs]
    shown = table([PAIR_COLUMNS[name] for name in columns], rows)
    words = "share: of the step's gradient, estimated; rows are counted from 0 over all files of the data"
    return joined(shown, element("p", words, class_="weak"))


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _results(run: RunFiles) -> Html:
    """First and last values of training, and of the held-out pairs."""
    rows = []
    for name, label in SUMMED_UP.items():
        ends, held_out = ends_of(run.curve(name)), run.curve(f"eval_{name}").finite()
        if ends is not None:
            theirs = (held_out.values[0], held_out.values[-1]) if len(held_out) else (None, None)
            rows.append((label, *ends, *theirs))
    for name in filter(None, run.held_out_sets):
        for metric, label in SUMMED_UP.items():
            values = run.curve(f"{eval_prefix(name)}{metric}").finite().values
            if values:
                rows.append((f"{label}, {name}", None, None, values[0], values[-1]))
    has_held_out = any(row[3] is not None for row in rows)
    headings = ("", "training, first", "training, last", "held-out, first", "held-out, last")
    width = 5 if has_held_out else 3
    note = "Of training, the mean of the first and of the last tenth of the records."
    return joined(table(headings[:width], [row[:width] for row in rows]), element("p", note, class_="weak"))


def _chart(run: RunFiles, chart: Chart, marks: Sequence[Mark]) -> Html:
    series = series_of(run, chart)
    logarithmic = is_logarithmic(next(iter(chart.metrics)), series)
    at_spikes = [mark for mark in marks if series and _covers(series, mark)]
    return line_chart(chart.title, series, note=chart.note, marks=at_spikes, smooth=chart.is_noisy, log_y=logarithmic)


def _covers(series: Sequence[Series], mark: Mark) -> bool:
    return any(len(one.x) and one.x[0] <= mark.x <= one.x[-1] for one in series)


def _charts_of_runs(runs: Sequence[RunFiles], chart: Chart) -> list[Html]:
    """A chart a metric: a colour is a run here."""
    drawn = []
    for name, label in chart.metrics.items():
        series = series_of_runs(runs, name)
        title = chart.title if len(chart.metrics) == 1 else f"{chart.title}: {label}"
        logarithmic = is_logarithmic(name, series)
        drawn.append(line_chart(title, series, note=chart.note, smooth=chart.is_noisy, log_y=logarithmic))
    return drawn


def _differing(runs: Sequence[RunFiles]) -> Html:
    found = differences(runs)
    if not found:
        return element("p", "None: the runs have the same options (but for their output_dir).")
    rows = [(key, *(_option(values[run.name]) for run in runs)) for key, values in found.items()]
    return table(("option", *(run.name for run in runs)), rows)


def _compared(runs: Sequence[RunFiles]) -> Html:
    rows = [("Status", *(run.status for run in runs)), ("Steps", *(run.last_step for run in runs))]
    for name, label in SUMMED_UP.items():
        for key, words in ((name, label), (f"eval_{name}", f"{label}, held-out")):
            ends = [ends_of(run.curve(key)) for run in runs]
            if any(one is not None for one in ends):
                rows.append((words, *(None if one is None else one[1] for one in ends)))
    return table(("at the end", *(run.name for run in runs)), rows)


def _option(value: object) -> object:
    return "null" if value is None else value if isinstance(value, bool | int | float | str) else str(value)


def _evaluation(evaluation: Mapping[str, Any]) -> list[Html]:
    """What `megadpo eval` has found: subsets, calibration, generations."""
    parts: list[Html] = []
    subsets = [row for row in _rows(evaluation.get("subsets")) if "name" in row]
    if subsets:
        whole = evaluation.get("all")
        rows = [*subsets, {"name": "all", **whole}] if isinstance(whole, Mapping) else subsets
        columns = list(dict.fromkeys(name for row in subsets for name, value in row.items() if _is_plain(value)))
        parts.append(
            table([name.replace("_", " ") for name in columns], [[row.get(name) for name in columns] for row in rows])
        )
        shares = {
            str(row["name"]): float(row["accuracy"]) for row in subsets if isinstance(row.get("accuracy"), int | float)
        }
        if len(shares) > 1:
            parts.append(charts(bars("Accuracy by subset", shares, words=lambda value: f"{value:.1%}")))
    calibration = _rows(evaluation.get("calibration"))
    if calibration:
        parts.append(charts(_calibration(calibration)))
    generations = _rows(evaluation.get("generations"))
    if generations:
        texts = [(row.get("prompt"), row.get("policy"), row.get("reference")) for row in generations[:MOST_GENERATIONS]]
        parts.append(folded("Generations, side by side", table(("prompt", "policy", "reference"), texts)))
    return parts or [element("p", "eval/eval.json has no subset, calibration or generations.")]


def _calibration(rows: Sequence[Mapping[str, Any]]) -> Html:
    """How often the answer that the model prefers is the chosen one, over how sure it is."""
    points = sorted(
        (float(row["predicted"]), float(row["accuracy"]))
        for row in rows
        if isinstance(row.get("predicted"), int | float) and isinstance(row.get("accuracy"), int | float)
    )
    said, seen = [point[0] for point in points], [point[1] for point in points]
    lines = [Series("observed", said, seen), Series("calibrated", [0.5, 1.0], [0.5, 1.0], 7, is_dashed=True)]
    return line_chart("Calibration", lines, x_label="predicted", note="share of pairs ordered as they should be")


def _rows(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _what_it_was(run: RunFiles) -> Html:
    """Model, data, objective, layout, versions, beginnings and ends, options."""
    loss = run.option("objective.loss_type")
    described = {
        "Model": run.option("model.path"),
        "Parameters": run.fact("model", "num_parameters"),
        "Trained": run.fact("model", "num_trained"),
        "Architecture": run.fact("model", "type"),
        "Precision": run.fact("dtype") or run.option("model.dtype"),
        "Reference": run.option("reference.path") if run.option("reference.mode") != "none" else "none",
        "Objective": " + ".join(map(str, loss)) if isinstance(loss, list) else loss,
        "Training data": _option(run.option("data.train")),
        "Its rows": run.fact("data", "train", "sentence"),
        "Held-out data": _option(run.option("data.eval")) if run.option("data.eval") else None,
        "Exported": _exported(run),
        "Pairs a step": run.option("train.pairs_per_step"),
        "Layout": run.fact("layout"),
        "Processes": run.fact("num_processes"),
        "Device": run.fact("device"),
        "Versions": _versions(run),
    }
    parts = [facts({name: value for name, value in described.items() if _is_plain(value)})]
    sessions = [
        (number_, _clock(one.get("began")), _clock(one.get("ended")), one.get("first_step"), one.get("last_step"),
         one.get("status") or "not ended", one.get("reason"))
        for number_, one in enumerate(run.sessions, 1)
    ]  # fmt: skip
    if sessions:
        parts.append(
            table(("", "began", "ended", "from step", "to step", "end", "reason"), [[*map(_plain, row)] for row in sessions])
        )
    unusual = unusual_options(run)
    if unusual:
        parts.append(
            table(("option", "value"), [(key, _option(value)) for key, value in unusual.items()], "Options that are set")
        )
    rows = [(key, _option(value)) for key, value in flat_options(run).items()]
    parts.append(folded("All options", table(("option", "value"), rows)))
    return joined(*parts)


def _exported(run: RunFiles) -> str | None:
    """Which evaluation's model the run has exported; None: its last model."""
    found = next((one for one in reversed(run.sessions) if one.get("best_step") is not None), None)
    return found and f"the model of step {found['best_step']}, the best by {found.get('best_metric')}"


def _versions(run: RunFiles) -> str | None:
    versions = run.fact("versions")
    return ", ".join(f"{name} {value}" for name, value in versions.items()) if isinstance(versions, Mapping) else None


def _clock(seconds: object) -> str | None:
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 4e9:
        return None
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
