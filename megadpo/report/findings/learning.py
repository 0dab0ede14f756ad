"""Findings about what the model learns: log-probs, rewards, accuracy, entropy."""

from __future__ import annotations

import math

from megadpo.pages.numbers import number
from megadpo.report import limits
from megadpo.report.findings.finding import (
    Check,
    Finding,
    log_ratio,
    long_enough,
    pairs_of,
    reads_reference,
    reference_logps,
)
from megadpo.report.run_files import Curve, RunFiles
from megadpo.report.series import first_part, last_part, mean_and_error, onset, running_mean, stays_beyond, window_of


def chosen_falls(run: RunFiles) -> Finding | None:
    """The chosen answers become less likely than they were under the reference, or at the first evaluation."""
    if reads_reference(run):
        change, before = log_ratio(run, "chosen"), reference_logps(run, "chosen")
        if long_enough(change) is None or not len(before):
            return None
        level = abs(mean_and_error(before.values)[0])
        mean, error = mean_and_error(last_part(change.values))
        since = "the reference gives them"
    else:
        held_out = run.curve("eval_logps/chosen").finite()
        if len(held_out) < limits.FEWEST_EVALUATIONS:
            return None
        level = abs(held_out.values[0])
        change = Curve(held_out.steps, [value - held_out.values[0] for value in held_out.values])
        mean, error = change.values[-1], 0.0
        since = "at the first evaluation"
    limit = max(limits.FALL_NATS, limits.FALL_SHARE * level)
    if not mean + limits.DEVIATIONS * error < -limit:
        return None
    window = window_of(len(change)) if reads_reference(run) else 1
    return Finding(
        "chosen_falls",
        "warning",
        "The chosen answers become less likely",
        onset(change, lambda value: value < -limit, window),
        f"Their log-prob is {number(-mean)} nats an answer ({-mean / level:.0%}) below what {since}: the margin grows by "
        "pushing both answers down, the rejected one further.",
        "Raise objective.beta or lower train.learning_rate; hold the chosen answers up by objective.nll_coef (RPO) or "
        "objective.dpop_lambda; or train one epoch of SFT on them first.",
    )


def log_ratio_is_large(run: RunFiles) -> Finding | None:
    """The policy is far from the reference, on the answers of the data."""
    found: list[tuple[float, Finding]] = []
    for side in ("chosen", "rejected"):
        change, before = long_enough(log_ratio(run, side)), reference_logps(run, side)
        if change is None or not len(before):
            continue
        level = abs(mean_and_error(before.values)[0])
        limit = max(limits.RATIO_NATS, limits.RATIO_SHARE * level)
        mean, error = mean_and_error(last_part(change.values))
        if abs(mean) - limits.DEVIATIONS * error > limit:
            distance = Curve(change.steps, [math.copysign(1.0, mean) * value / limit for value in change.values])
            step = onset(distance, lambda value: value > 1, window_of(len(change)))
            what = (
                f"The log-probs of the {side} answers are {number(abs(mean))} nats an answer from the reference's, "
                f"{abs(mean) / level:.0%} of them."
            )
            found.append((abs(mean) / limit, _far(step, what)))
    kl = long_enough(run.curve("kl"))
    if kl is not None:
        mean, error = mean_and_error(last_part(kl.values))
        if mean - limits.DEVIATIONS * error > limits.RATIO_NATS:
            step = onset(kl, lambda value: value > limits.RATIO_NATS, window_of(len(kl)))
            found.append((mean, _far(step, f"The KL that the loss is measured against is {number(mean)} nats an answer.")))
    return max(found, key=lambda one: one[0])[1] if found else None


def _far(step: int | None, what: str) -> Finding:
    return Finding(
        "log_ratio_large",
        "warning",
        "The policy is far from the reference",
        step,
        what + " A model that is so far away often writes worse than one that stopped earlier, though its margin is larger.",
        "Raise objective.beta, lower train.learning_rate, or take the checkpoint of an earlier step (checkpoint.every).",
    )


def accuracy_saturated(run: RunFiles) -> Finding | None:
    """Nearly all pairs are ordered as they should be, long before the run's end."""
    accuracy = long_enough(run.curve("rewards/accuracies"))
    if accuracy is None:
        return None
    window = max(window_of(len(accuracy)), math.ceil(limits.SATURATED_PAIRS / pairs_of(run, 1)))
    if window > len(accuracy):
        return None
    full = Curve(accuracy.steps[window - 1 :], running_mean(accuracy.values, window)[window - 1 :])
    step = stays_beyond(full, lambda value: value >= limits.SATURATED_ACCURACY)
    if step is None:
        return None
    rest = sum(at > step for at in accuracy.steps)
    if rest < max(limits.FEWEST_RECORDS, limits.SATURATED_SHARE * len(accuracy)):
        return None
    margin = run.curve("rewards/margins").finite()
    grown = f", while the margin grew to {number(mean_and_error(last_part(margin.values))[0])}" if len(margin) else ""
    return Finding(
        "accuracy_saturated",
        "warning",
        "The training accuracy is saturated",
        step,
        f"From here on at least {limits.SATURATED_ACCURACY:.0%} of the training pairs are ordered as they should be{grown}: "
        f"the last {rest / len(accuracy):.0%} of the run only made it surer of what it knew.",
        "Look at the held-out accuracy and take a checkpoint from about here; train fewer steps or epochs, with a lower "
        "train.learning_rate or a higher objective.beta; or use harder pairs.",
    )


def preference_inverted(run: RunFiles) -> Finding | None:
    """The rejected answers get the higher rewards."""
    accuracy, margin = long_enough(run.curve("rewards/accuracies")), long_enough(run.curve("rewards/margins"))
    if accuracy is None or margin is None:
        return None
    last = last_part(accuracy.values)
    num_pairs, mean = pairs_of(run, len(last)), mean_and_error(last)[0]
    lasting, _ = mean_and_error(last_part(margin.values))
    error = math.sqrt(0.25 / num_pairs)
    if num_pairs < limits.INVERTED_PAIRS or mean + limits.DEVIATIONS * error >= 0.5 or lasting > -1e-3:
        return None
    return Finding(
        "preference_inverted",
        "problem",
        "The rejected answers are preferred",
        onset(margin, lambda value: value < 0, window_of(len(margin))),
        f"At the end {mean:.0%} of the training pairs are ordered as they should be, with a margin of {number(lasting)}.",
        "Look whether chosen and rejected are exchanged in the data or by data.columns; else lower train.learning_rate.",
    )


def nothing_learned(run: RunFiles) -> Finding | None:
    """The loss has not moved over a run that was long enough for it."""
    loss, rate = run.curve("loss").finite(), run.curve("learning_rate").finite()
    if len(loss) < limits.FEWEST_RECORDS or run.last_step < limits.STILL_STEPS or max(rate.values, default=1.0) == 0:
        return None
    begin, end = mean_and_error(first_part(loss.values)), mean_and_error(last_part(loss.values))
    noise = limits.DEVIATIONS * math.hypot(begin[1], end[1])
    if begin[0] - end[0] > max(noise, 0.01 * abs(begin[0])) or end[0] - begin[0] > noise:
        return None
    margin = long_enough(run.curve("rewards/margins"))
    if margin is not None:
        mean, error = mean_and_error(last_part(margin.values))
        if mean > limits.DEVIATIONS * error and mean > 0.01:
            return None
    return Finding(
        "nothing_learned",
        "warning",
        "The model has hardly learned anything",
        loss.steps[0],
        f"The loss is {number(end[0])} at the end and was {number(begin[0])} at the beginning, which is within its noise, "
        f"after {run.last_step:,} steps.",
        "Raise train.learning_rate (whole models: 5e-7 to 5e-6; adapters: 5e-6 to 1e-4), or train more steps; look whether "
        "chosen and rejected answers differ at all.",
    )


def entropy_collapses(run: RunFiles) -> Finding | None:
    """The model becomes sure of its next tokens."""
    entropy = long_enough(run.curve("entropy"))
    if entropy is None:
        return None
    begin, end = mean_and_error(first_part(entropy.values)), mean_and_error(last_part(entropy.values))
    limit = limits.ENTROPY_SHARE * begin[0]
    if not end[0] + limits.DEVIATIONS * math.hypot(begin[1], end[1]) < limit:
        return None
    return Finding(
        "entropy_collapses",
        "warning",
        "The model's entropy collapses",
        onset(entropy, lambda value: value < limit, window_of(len(entropy))),
        f"The entropy of its next token has fallen from {number(begin[0])} to {number(end[0])} nats: its "
        "answers lose variety.",
        "Raise objective.beta, lower train.learning_rate, or stop earlier.",
    )


CHECKS = (
    Check("chosen_falls", "do the chosen answers become less likely", chosen_falls),
    Check("log_ratio_large", "is the policy far from the reference", log_ratio_is_large),
    Check("accuracy_saturated", "is the training accuracy saturated long before the end", accuracy_saturated),
    Check("preference_inverted", "are the rejected answers preferred", preference_inverted),
    Check("nothing_learned", "has the loss not moved", nothing_learned),
    Check("entropy_collapses", "does the model's entropy collapse", entropy_collapses),
)
