"""Which metrics are drawn together, and under which title: for the page and for the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.config.sources import eval_prefix
from megadpo.pages.charts import Series
from megadpo.report.run_files import EVAL_PREFIX, Curve, RunFiles
from megadpo.report.series import median

LOG_SPREAD = 30.0
"""How many times its median a positive metric's largest value is where its axis is logarithmic."""


@dataclass(frozen=True)
class Chart:
    """Metrics of one chart.

    Attributes:
        metrics: name -> how it is called in the legend. One that ends in "/" stands for all that begin so.
        is_noisy: a running mean is drawn over it.
    """

    title: str
    metrics: dict[str, str]
    note: str | None = None
    is_noisy: bool = True

    @property
    def file(self) -> str:
        """The name of its picture, without suffix."""
        return self.title.lower().replace(" ", "-").replace(",", "")


SIDES = {"chosen": "chosen", "rejected": "rejected"}

LEARNING = (
    Chart("Loss", {"loss": "loss"}),
    Chart("Losses", {"loss/": ""}),
    Chart("Reward margin", {"rewards/margins": "margin"}),
    Chart("Reward accuracy", {"rewards/accuracies": "accuracy"}, "share of pairs whose chosen answer has the higher reward"),
    Chart("Rewards", {f"rewards/{side}": side for side in SIDES}),
    Chart("Log-probs", {f"logps/{side}": side for side in SIDES}, "of an answer, in nats"),
    Chart(
        "Margin by length",
        {"rewards/margins_chosen_longer": "chosen is longer", "rewards/margins_chosen_shorter": "chosen is shorter"},
    ),
    Chart("Lengths", {f"lengths/{side}": side for side in SIDES} | {"lengths/prompt": "prompt"}, "tokens of an answer"),
    Chart("Entropy", {"entropy": "entropy"}, "of the next token, in nats"),
    Chart("Token accuracy", {"mean_token_accuracy": "accuracy"}, "share of chosen tokens that are the likeliest"),
    Chart("Logits", {f"logits/{side}": side for side in SIDES}, "mean logit of the vocabulary"),
    Chart("KL", {"kl": "KL"}, "of mismatched answers, in nats"),
    Chart("Running mean of rewards", {"delta": "delta"}),
)
OPTIMISATION = (
    Chart("Gradient norm", {"grad_norm": "norm"}, "before clipping"),
    Chart("Learning rate", {"learning_rate": "rate"}, is_noisy=False),
    Chart("Steps left out", {"num_left_out": "steps"}, is_noisy=False),
    Chart("Router load", {"moe/": ""}),
)
SPEED = (
    Chart("Tokens per second", {"tokens_per_second": "tokens/s"}),
    Chart("Seconds of a step", {"step_seconds": "step", "data_wait_seconds": "waiting for data"}),
    Chart("Seconds by part", {"seconds/": ""}),
    Chart("Model FLOP utilisation", {"mfu": "MFU"}),
    Chart("Peak memory", {"peak_memory_gib": "GiB"}, "GiB of the first rank", is_noisy=False),
    Chart("Slowest rank", {"slowest_rank": "rank"}, is_noisy=False),
    Chart("Work of the slowest rank", {"slowest_rank_ratio": "ratio"}, "over that of the median"),
    Chart("Seconds of an evaluation", {"eval_seconds": "evaluation"}, is_noisy=False),
)
GROUPS: dict[str, tuple[Chart, ...]] = {"Learning": LEARNING, "Optimisation": OPTIMISATION, "Speed and memory": SPEED}
NOT_DRAWN = {"step", "epoch", "num_tokens", "time", "pairs_per_second"}


HELD_OUT = "Held-out sets"
"""The group of charts of sets that have names."""


def groups_of(runs: Sequence[RunFiles]) -> dict[str, list[Chart]]:
    """The charts that there is something to draw in, by group; last those of metrics that nobody has foreseen."""
    of_sets = _charts_of_sets(runs)
    known = {name for run in runs for name in run.curves} - {name for chart in of_sets for name in chart.metrics}
    found = {group: [with_names(chart, known) for chart in some] for group, some in GROUPS.items()}
    drawn = {name for some in found.values() for chart in some for name in chart.metrics} | NOT_DRAWN
    rest = sorted(name for name in known if name not in drawn and name.removeprefix(EVAL_PREFIX) not in drawn)
    found = {"Learning": found.pop("Learning"), HELD_OUT: of_sets, **found}
    found["More"] = [Chart(name, {name: name}) for name in rest]
    return {group: kept for group, some in found.items() if (kept := [chart for chart in some if chart.metrics])}


def _charts_of_sets(runs: Sequence[RunFiles]) -> list[Chart]:
    """Of held-out sets with names: a chart a metric, with a curve a set."""
    sets = dict.fromkeys(name for run in runs for name in run.held_out_sets if name)
    known = dict.fromkeys(name for run in runs for name in run.curves)
    metrics: dict[str, dict[str, str]] = {}
    for one in sets:
        for name in known:
            if one == max((other for other in sets if name.startswith(eval_prefix(other))), key=len, default=None):
                metrics.setdefault(name.removeprefix(eval_prefix(one)), {})[name] = one
    titles = {next(iter(chart.metrics)): chart.title for chart in LEARNING if len(chart.metrics) == 1}
    return [Chart(f"Held-out, {titles.get(name, name)}", found, is_noisy=False) for name, found in metrics.items()]


def with_names(chart: Chart, known: set[str]) -> Chart:
    """The chart with those of its metrics that there are, and what ends in "/" written out."""
    there = known | {name.removeprefix(EVAL_PREFIX) for name in known if name.startswith(EVAL_PREFIX)}
    metrics: dict[str, str] = {}
    for name, label in chart.metrics.items():
        if name.endswith("/"):
            metrics |= {other: other.removeprefix(name) for other in sorted(there) if other.startswith(name)}
        elif name in there:
            metrics[name] = label
    return Chart(chart.title, metrics, chart.note, chart.is_noisy)


def series_of(run: RunFiles, chart: Chart) -> list[Series]:
    """The curves of one run: those of training, and in the same colours, dashed, those of held-out pairs."""
    found = []
    for colour, (name, label) in enumerate(chart.metrics.items()):
        for curve, words, is_dashed in (
            (run.curve(name), label, False),
            (run.curve(EVAL_PREFIX + name), "held-out" if len(chart.metrics) == 1 else f"{label}, held-out", True),
        ):
            if len(curve):
                found.append(Series(words, curve.steps, curve.values, colour, is_dashed))
    return found


def series_of_runs(runs: Sequence[RunFiles], name: str) -> list[Series]:
    """One metric of several runs, a colour a run."""
    found = []
    for colour, run in enumerate(runs):
        for curve, words, is_dashed in (
            (run.curve(name), run.name, False),
            (run.curve(EVAL_PREFIX + name), f"{run.name}, held-out", True),
        ):
            if len(curve):
                found.append(Series(words, curve.steps, curve.values, colour, is_dashed))
    return found


def is_logarithmic(name: str, series: Sequence[Series]) -> bool:
    """Whether a gradient norm's axis has to be, for its spikes to leave something of the rest."""
    values = [value for one in series for value in one.y if value is not None and math.isfinite(value)]
    if name != "grad_norm" or not values or min(values) <= 0:
        return False
    return max(values) > LOG_SPREAD * median(values)


def ends_of(curve: Curve) -> tuple[float, float] | None:
    """The metric at the beginning and at the end, each the mean of a tenth of its records; None without any."""
    finite = curve.finite()
    if not len(finite):
        return None
    count = max(1, len(finite) // 10)
    return sum(finite.values[:count]) / count, sum(finite.values[-count:]) / count
