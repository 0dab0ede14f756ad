"""Findings about held-out pairs and about the data: what was learned for these pairs alone, or by their length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megadpo.config.sources import eval_label, eval_prefix
from megadpo.pages.numbers import number
from megadpo.report import limits
from megadpo.report.findings.finding import Check, Finding, long_enough, pairs_of
from megadpo.report.run_files import Curve, RunFiles
from megadpo.report.series import first_part, last_part, mean_and_error, onset, running_mean, together, window_of


def evaluation_diverges(run: RunFiles) -> Finding | None:
    """The held-out loss rises again, or the held-out accuracy stays far behind, while training goes on to improve; of
    several sets in one of them."""
    found = (check(run, name) for check in (_rising, _left_behind) for name in run.held_out_sets)
    return next((finding for finding in found if finding is not None), None)


def _rising(run: RunFiles, name: str) -> Finding | None:
    held_out, loss = run.curve(f"{eval_prefix(name)}loss").finite(), run.curve("loss").finite()
    if len(held_out) < limits.FEWEST_EVALUATIONS or len(loss) < limits.FEWEST_RECORDS:
        return None
    lowest = min(held_out.values)
    place = held_out.values.index(lowest)
    limit = lowest + max(limits.RISE_LOSS, limits.RISE_SHARE * abs(lowest))
    if place > len(held_out) - 2 or held_out.values[-1] <= limit:
        return None
    means = running_mean(loss.values, window_of(len(loss)))
    then = [mean for step, mean in zip(loss.steps, means, strict=True) if step <= held_out.steps[place]]
    if then and means[-1] >= then[-1]:
        return None  # the training loss rises, too: that is no overfitting
    return Finding(
        "evaluation_diverges",
        "warning",
        f"The held-out loss{_of(name)} rises while the training loss falls",
        held_out.steps[place],
        f"It was lowest here, {number(lowest)}, and is {number(held_out.values[-1])} at step {held_out.steps[-1]}; the "
        f"training loss went on to {number(means[-1])}.",
        "Set eval.best_metric, which keeps and exports the best checkpoint, and eval.patience, which ends the run; or "
        "train so many steps only, lower train.learning_rate, raise objective.beta, give more data.",
    )


def _of(name: str) -> str:
    return f" of {name}" if name else ""


def _left_behind(run: RunFiles, name: str) -> Finding | None:
    accuracy = long_enough(run.curve("rewards/accuracies"))
    held_out = run.curve(f"{eval_prefix(name)}rewards/accuracies").finite()
    num_held_out = run.fact("data", eval_label(name), "num_used") or run.option("eval.pairs")
    if accuracy is None or not len(held_out) or not isinstance(num_held_out, int) or num_held_out < 1:
        return None
    window = window_of(len(accuracy))
    error = math.sqrt(0.25 / num_held_out + 0.25 / pairs_of(run, window))
    smooth = Curve(accuracy.steps, running_mean(accuracy.values, window))
    gap = together(smooth, held_out, lambda ours, theirs: ours - theirs)
    if not len(gap) or gap.values[-1] <= limits.GAP_ACCURACY + limits.DEVIATIONS * error:
        return None
    return Finding(
        "evaluation_diverges",
        "warning",
        f"The held-out accuracy{_of(name)} stays behind that of training",
        onset(gap, lambda value: value > limits.GAP_ACCURACY),
        f"At step {gap.steps[-1]} {smooth.values[smooth.steps.index(gap.steps[-1])]:.0%} of the training pairs are ordered "
        f"as they should be, and {held_out.values[-1]:.0%} of the {num_held_out:,} held-out ones.",
        "Train fewer epochs, lower train.learning_rate or raise objective.beta; look whether data.eval is of the same kind "
        "as data.train; give more data.",
    )


def data_too_small(run: RunFiles) -> Finding | None:
    """The pairs were seen too many times."""
    epoch = run.curve("epoch").finite()
    if not len(epoch) or epoch.values[-1] <= limits.MOST_PASSES * 1.02:
        return None
    num_pairs = run.fact("data", "train", "num_used")
    pairs = f"{num_pairs:,} pairs" if isinstance(num_pairs, int) else "pairs"
    return Finding(
        "data_too_small",
        "warning",
        "There is little data for so many epochs",
        onset(epoch, lambda value: value > limits.MOST_PASSES),
        f"The {pairs} were seen {number(epoch.values[-1])} times each; what a model learns of pairs after the first two or "
        "three passes is mostly these pairs.",
        "Set train.epochs to 1 to 3 (or lower train.steps), and give more pairs if that is too short.",
    )


def length_drift(run: RunFiles) -> Finding | None:
    """The model learns length, or writes longer answers, or the answers that it is given change in length."""
    return _margin_follows_length(run) or _writes_longer(run) or _rows_change(run)


def _margin_follows_length(run: RunFiles) -> Finding | None:
    longer = long_enough(run.curve("rewards/margins_chosen_longer"))
    shorter = long_enough(run.curve("rewards/margins_chosen_shorter"))
    if longer is None or shorter is None:
        return None
    # A pair in two may be of either kind; of one that is rarer its error is the larger.
    if pairs_of(run, min(len(last_part(longer.values)), len(last_part(shorter.values)))) < limits.LENGTH_PAIRS:
        return None
    (long_mean, long_error), (short_mean, short_error) = (mean_and_error(last_part(one.values)) for one in (longer, shorter))
    gap = long_mean * limits.LENGTH_SHARE - short_mean
    error = math.hypot(limits.LENGTH_SHARE * long_error, short_error)
    if long_mean <= limits.DEVIATIONS * long_error or gap <= limits.DEVIATIONS * error:
        return None
    window = window_of(len(shorter))
    both = together(
        Curve(longer.steps, running_mean(longer.values, window)),
        Curve(shorter.steps, running_mean(shorter.values, window)),
        lambda one, other: one * limits.LENGTH_SHARE - other,
    )
    return Finding(
        "length_drift",
        "warning",
        "The model learns length",
        onset(both, lambda value: value > 0),
        f"Where the chosen answer is the longer one the margin is {number(long_mean)}, where it is the shorter one "
        f"{number(short_mean)}: longer answers are preferred, whatever they say.",
        "Balance the lengths of chosen and rejected answers in the data, or set objective.length_penalty (R-DPO), "
        "objective.ld_alpha (LD-DPO) or a loss of mean log-probs (sigmoid_norm, simpo).",
    )


def _writes_longer(run: RunFiles) -> Finding | None:
    texts = _generations(run.evaluation)
    if len(texts) < limits.FEWEST_GENERATIONS:
        return None
    ours, theirs = (sum(map(len, side)) / len(texts) for side in zip(*texts, strict=True))
    if theirs == 0 or ours / theirs <= limits.GENERATED_SHARE:
        return None
    return Finding(
        "length_drift",
        "warning",
        "The model writes longer answers",
        None,
        f"Over {len(texts)} held-out prompts its answers are {ours / theirs:.1f} times as long as the reference's.",
        "Look whether the chosen answers of the data are longer than the rejected ones; objective.length_penalty (R-DPO), "
        "objective.ld_alpha (LD-DPO) and losses of mean log-probs hold length down.",
    )


def _generations(evaluation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(the policy's answer, the reference's answer) of each prompt that both have answered."""
    found = (evaluation or {}).get("generations")
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    texts = [(row.get("policy"), row.get("reference")) for row in rows]
    return [(ours, theirs) for ours, theirs in texts if isinstance(ours, str) and isinstance(theirs, str)]


def _rows_change(run: RunFiles) -> Finding | None:
    lengths = long_enough(run.curve("lengths/chosen"))
    if lengths is None:
        return None
    begin, end = mean_and_error(first_part(lengths.values)), mean_and_error(last_part(lengths.values))
    change = end[0] - begin[0]
    limit = limits.DRIFT_SHARE * begin[0]
    if abs(change) - limits.DEVIATIONS * math.hypot(begin[1], end[1]) <= limit:
        return None
    away = Curve(lengths.steps, [math.copysign(1.0, change) * (value - begin[0]) for value in lengths.values])
    return Finding(
        "length_drift",
        "warning",
        "The length of the training answers drifts",
        onset(away, lambda value: value > limit, window_of(len(away))),
        f"The chosen answers have {number(begin[0])} tokens on average at the beginning and {number(end[0])} at the end: "
        "the rows stand in an order, and what is learned last is learned from other rows than the rest.",
        "Set data.shuffle to true, or shuffle the files.",
    )


CHECKS = (
    Check("evaluation_diverges", "do held-out pairs diverge from training", evaluation_diverges),
    Check("data_too_small", "is the data small for the number of epochs", data_too_small),
    Check("length_drift", "does the model learn, write or get other lengths", length_drift),
)
