"""Findings about the run itself: how it ended, what is not finite, spikes with their pairs, the learning rate, waiting."""

from __future__ import annotations

import math
from typing import Any

from megadpo.metrics.spikes import SpikeWatch
from megadpo.pages.numbers import number
from megadpo.report import limits
from megadpo.report.findings.finding import Check, Finding, reads_reference
from megadpo.report.run_files import RunFiles
from megadpo.report.series import median, together

SPIKED = ("loss", "grad_norm")


def did_not_finish(run: RunFiles) -> Finding | None:
    """The run failed, or was stopped before its last step."""
    if run.status not in ("failed", "preempted", "interrupted"):
        return None
    last = run.sessions[-1]
    steps = f"after step {run.last_step} of {run.num_steps}" if run.num_steps else f"after step {run.last_step}"
    if run.status == "failed":
        reason = str(last.get("reason") or "")
        return Finding(
            "did_not_finish",
            "problem",
            "The run failed",
            run.last_step or None,
            f"It ended {steps}" + (f": {reason.rstrip('.')}." if reason else "."),
            "Put right what it says; the same command then goes on from the newest intact checkpoint.",
        )
    return Finding(
        "did_not_finish",
        "note",
        f"The run was {run.status}",
        run.last_step or None,
        f"It ended {steps}.",
        "The same command goes on from the newest intact checkpoint.",
    )


def not_finite(run: RunFiles) -> Finding | None:
    """The loss or the gradient norm is no number."""
    broken = {
        step: f"the {'loss' if name == 'loss' else 'gradient norm'} was {value}"
        for name in ("grad_norm", "loss")
        for step, value in zip(run.curve(name).steps, run.curve(name).values, strict=True)
        if not math.isfinite(value)
    }
    records = [spike for spike in run.spikes or () if not _is_finite(spike)]
    broken |= {spike["step"]: str(spike.get("what", "it was not finite")) for spike in records if _has_step(spike)}
    if not broken:
        return None
    first = min(broken)
    left_out = sum(spike.get("updated") is False for spike in records)
    went_on = run.last_step > first
    return Finding(
        "not_finite",
        "warning" if went_on else "problem",
        "The loss is not finite",
        first,
        f"At step {first} {broken[first]}"
        + (f"; so it was at {len(broken)} steps in all" if len(broken) > 1 else "")
        + (", which updated nothing." if went_on and left_out else "."),
        "Look at the rows that are named, and whether the weights of the model are finite; lower train.learning_rate; in "
        "bf16 try model.dtype=fp32; train.on_spike=skip leaves such steps out.",
        _pairs(records),
    )


def gradient_spikes(run: RunFiles) -> Finding | None:
    """Single steps with a loss or a gradient norm far above the others'."""
    if run.spikes is not None:
        records = [spike for spike in run.spikes if _has_step(spike) and _is_finite(spike)]
    else:
        records = _spikes_of_curves(run)
    steps = sorted({spike["step"] for spike in records})
    if not steps:
        return None
    named = ", ".join(map(str, steps[: limits.MOST_STEPS_NAMED])) + (" …" if len(steps) > limits.MOST_STEPS_NAMED else "")
    left_out = len({spike["step"] for spike in records if spike.get("updated") is False})
    what = str(min(records, key=lambda spike: spike["step"]).get("what", "")).rstrip(".")
    what = what[:1].upper() + what[1:] if len(steps) == 1 else what
    return Finding(
        "gradient_spikes",
        "warning" if len(steps) > 1 else "note",
        "The gradient or the loss spikes",
        steps[0],
        (f"{len(steps)} steps ({named}) stand out; of step {steps[0]}: {what}." if len(steps) > 1 else f"{what}.")
        + (f" {'It' if len(steps) == 1 else f'{left_out} of them'} updated nothing (train.on_spike)." if left_out else ""),
        "Look at the rows below: very long, damaged or mislabelled ones are usual. train.on_spike=skip leaves such steps "
        "out; a lower train.learning_rate, more train.pairs_per_step or a longer train.warmup_steps makes them rarer.",
        _pairs(records),
    )


def _spikes_of_curves(run: RunFiles) -> list[dict[str, Any]]:
    """The spikes of a run that has kept none, by the trainer's own rule, from what it has written."""
    deviations = run.option("train.spike_deviations")
    watch = SpikeWatch(float(deviations) if isinstance(deviations, int | float) and deviations > 0 else 6.0)
    both = together(run.curve("loss"), run.curve("grad_norm"), lambda loss, norm: loss)
    norms = dict(zip(run.curve("grad_norm").steps, run.curve("grad_norm").values, strict=True))
    found = []
    for step, loss in zip(both.steps, both.values, strict=True):
        what = watch.spike(loss, norms[step])
        if what is not None and math.isfinite(loss) and math.isfinite(norms[step]):
            found.append({"step": step, "what": what})
    return found


def _has_step(spike: dict[str, Any]) -> bool:
    return isinstance(spike.get("step"), int) and not isinstance(spike.get("step"), bool)


def _is_finite(spike: dict[str, Any]) -> bool:
    return not any(isinstance(spike.get(name), str) for name in SPIKED)


def _pairs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs of spikes, each with its step, the largest of each step first."""
    found = []
    for spike in records:
        pairs = spike.get("pairs")
        for pair in pairs if isinstance(pairs, list) else ():
            if isinstance(pair, dict):
                found.append({"step": spike.get("step"), **pair})
    return found[: limits.MOST_PAIRS_SHOWN]


def learning_rate_is_zero(run: RunFiles) -> Finding | None:
    """Nothing is learned, for the learning rate is zero all the time, or for most of it."""
    rate = run.curve("learning_rate").finite()
    zeros = [step for step, value in zip(rate.steps, rate.values, strict=True) if value == 0]
    num_steps = run.num_steps or run.last_step
    warmup = _warmup_steps(run, num_steps)
    never_up = len(rate) and 0 < num_steps <= warmup
    # The first step of a warm-up has rate zero, and the last ones of a schedule may come to it.
    if not zeros and not never_up:
        return None
    if len(zeros) == len(rate):
        what = "It is 0 at every step: no weight changes."
    elif len(zeros) > max(3, 0.2 * len(rate)):
        what = f"It is 0 at {len(zeros)} of {len(rate)} steps, which change no weight."
    elif never_up:
        what = f"The warm-up of {warmup} steps is not shorter than the run of {num_steps}: the peak is never reached."
    else:
        return None
    return Finding(
        "learning_rate_zero",
        "problem" if len(zeros) == len(rate) else "warning",
        "The learning rate is zero" if zeros and len(zeros) > 1 else "The learning rate never gets up",
        zeros[0] if zeros else rate.steps[0],
        what,
        "Set train.learning_rate (whole models: 5e-7 to 5e-6; adapters: 5e-6 to 1e-4) and train.warmup_steps to a tenth of "
        "the run or less (train.warmup_ratio to 0.1 or less).",
    )


def _warmup_steps(run: RunFiles, num_steps: int) -> int:
    """By the rule of training/lr_schedule.py."""
    steps, ratio = run.option("train.warmup_steps"), run.option("train.warmup_ratio")
    if isinstance(ratio, int | float) and math.isfinite(ratio):
        return math.ceil(num_steps * ratio)
    return steps if isinstance(steps, int) else 0


def starts_apart(run: RunFiles) -> Finding | None:
    """Policy and reference should be the same model at the first step, and are not."""
    margins = run.curve("rewards/margins").finite()
    same = run.option("reference.path") in (None, run.option("model.path"))
    plain = not run.option("adapter.path") and not run.option("adapter.dropout") and not run.option("reference.adapter")
    if not reads_reference(run) or run.option("reference.mode") == "none" or not (same and plain):
        return None
    if not len(margins) or margins.steps[0] != 1 or run.option("checkpoint.resume") not in ("auto", "never"):
        return None
    if abs(margins.values[0]) <= limits.APART_MARGIN:
        return None
    return Finding(
        "starts_apart",
        "warning",
        "Policy and reference differ from the start",
        1,
        f"Before the first update they are the same model, but the reward margin is {number(margins.values[0])} and not 0.",
        "Look whether the model directory was changed while the run began, and whether model.kernels, model.attention or "
        "model.fp8 round too much here (model.dtype=fp32 tells).",
    )


def waits_for_data(run: RunFiles) -> Finding | None:
    """Steps wait for their data."""
    waited, seconds = run.curve("data_wait_seconds").finite(), run.curve("step_seconds").finite()
    shares = together(waited, seconds, lambda wait, step: wait / step if step > 0 else 0.0)
    if len(shares) < limits.FEWEST_RECORDS:
        return None
    share, wait = median(shares.values), median(waited.values)
    if share <= limits.WAITING_SHARE or wait <= limits.WAITING_SECONDS:
        return None
    return Finding(
        "waits_for_data",
        "note",
        "Steps wait for their data",
        shares.steps[0],
        f"Half of the steps wait {share:.0%} of their time or more ({number(wait)} s) for the next micro-batches.",
        "Give each process a core for itself, and put data.cache_dir on a local disk.",
    )


CHECKS = (
    Check("did_not_finish", "did the run end before its last step", did_not_finish),
    Check("not_finite", "is the loss or the gradient norm not finite", not_finite),
    Check("gradient_spikes", "do single steps stand out by their loss or gradient norm", gradient_spikes),
    Check("learning_rate_zero", "is the learning rate zero", learning_rate_is_zero),
    Check("starts_apart", "do policy and reference differ before the first update", starts_apart),
    Check("waits_for_data", "do steps wait for their data", waits_for_data),
)
