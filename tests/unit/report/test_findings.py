"""Each finding of a report on a run that was made to show it, and all of them silent on healthy ones."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.report import limits
from megadpo.report.findings.every import CHECKS, findings_of
from megadpo.report.findings.finding import Finding
from megadpo.report.run_files import read_run
from tests.helpers.made_runs import BETA, Record, make_run


def found_in(directory: Path) -> list[Finding]:
    return findings_of(read_run(directory))


def rewards(record: Record, chosen: float, margin: float) -> None:
    """Set the rewards of a record, and with them the log-probs, the reference's staying as they are."""
    for side, reward in (("chosen", chosen), ("rejected", chosen - margin)):
        record[f"logps/{side}"] += (reward - record[f"rewards/{side}"]) / BETA
        record[f"rewards/{side}"] = reward
    record["rewards/margins"] = margin


def chosen_falls(record: Record, share: float) -> None:
    rewards(record, record["rewards/chosen"] - 3 * max(0.0, share - 0.4), record["rewards/margins"])


def far_away(record: Record, share: float) -> None:
    rewards(record, record["rewards/chosen"], record["rewards/margins"] + 12 * max(0.0, share - 0.4))


def saturated(record: Record, share: float) -> None:
    record["rewards/accuracies"] = 1.0 if share > 0.5 else record["rewards/accuracies"]


def as_good(record: Record, share: float) -> None:
    record["eval_rewards/accuracies"] = 0.5 + 0.45 * share


def inverted(record: Record, share: float) -> None:
    record["rewards/accuracies"] = 1 - record["rewards/accuracies"] if share > 0.01 else 0.0
    rewards(record, record["rewards/chosen"], -record["rewards/margins"])


def still(record: Record, share: float) -> None:
    del share
    record["loss"] = math.log(2) + 0.001 * math.sin(record["step"])
    rewards(record, 0.0, 0.0005 * math.sin(record["step"]))


def without_entropy(record: Record, share: float) -> None:
    record["entropy"] *= 1 - 0.8 * share


def longer_answers_win(record: Record, share: float) -> None:
    record["rewards/margins_chosen_longer"] += share
    record["rewards/margins_chosen_shorter"] -= 1.5 * share


def longer_rows_last(record: Record, share: float) -> None:
    record["lengths/chosen"] *= 1 + share


def many_passes(record: Record, share: float) -> None:
    record["epoch"] = 8 * share


def overfitted(record: Record, share: float) -> None:
    record["eval_loss"] += 0.6 * max(0.0, share - 0.5)


def left_behind(record: Record, share: float) -> None:
    del share
    record["eval_rewards/accuracies"] = 0.52


def sure_of_training(record: Record, share: float) -> None:
    record["rewards/accuracies"] = 0.9 if share > 0.3 else record["rewards/accuracies"]


def not_a_number(record: Record, share: float) -> None:
    if share > 0.5:
        record["loss"] = record["grad_norm"] = math.nan


def without_rate(record: Record, share: float) -> None:
    del share
    record["learning_rate"] = 0.0


def long_waits(record: Record, share: float) -> None:
    del share
    record["data_wait_seconds"] = 0.4


def apart(record: Record, share: float) -> None:
    del share
    if record["step"] == 1:
        rewards(record, 0.7, 0.4)


PAIR = {"row": 1234, "share": 0.8, "chosen_logp": -900.0, "rejected_logp": -20.0, "chosen_tokens": 700}
SPIKES = [
    {"step": step, "what": "the gradient norm is 900, above the mean 7.4 of the last 128 steps", "loss": 0.7, "grad_norm":
     900.0, "updated": True, "pairs": [PAIR]}
    for step in (60, 61, 150)
]  # fmt: skip
BROKEN = {"step": 90, "what": "the loss is nan; the model's log-probs of row 17 are not finite", "loss": "nan",
          "grad_norm": "nan", "updated": False, "pairs": [{"row": 17}]}  # fmt: skip
LONGER = {"generations": [{"prompt": "p", "policy": "word " * 30, "reference": "word " * 10}] * 20}
FAILED = {"sessions": [{"began": 1.7e9, "ended": 1.7e9, "status": "failed", "reason": "step 90: the loss is nan"}]}

FAULTS: dict[str, tuple[str, str, tuple[int, int] | None, dict[str, Any]]] = {
    "the chosen answers fall": ("chosen_falls", "warning", (90, 180), {"change": chosen_falls}),
    "far from the reference": ("log_ratio_large", "warning", (90, 160), {"change": far_away}),
    "saturated": ("accuracy_saturated", "warning", (100, 130), {"change": saturated, "change_held_out": as_good}),
    "inverted": ("preference_inverted", "problem", (1, 60), {"change": inverted}),
    "nothing is learned": ("nothing_learned", "warning", (1, 1), {"change": still}),
    "entropy falls": ("entropy_collapses", "warning", (100, 180), {"change": without_entropy}),
    "length is learned": ("length_drift", "warning", (1, 80), {"change": longer_answers_win}),
    "rows in an order": ("length_drift", "warning", (40, 160), {"change": longer_rows_last}),
    "longer texts": ("length_drift", "warning", None, {"evaluation": LONGER}),
    "many passes": ("data_too_small", "warning", (70, 85), {"change": many_passes}),
    "overfitted": ("evaluation_diverges", "warning", (100, 125), {"change_held_out": overfitted}),
    "left behind": ("evaluation_diverges", "warning", (25, 125),
                    {"change": sure_of_training, "change_held_out": left_behind}),
    "spikes": ("gradient_spikes", "warning", (60, 60), {"spikes": SPIKES}),
    "a single spike": ("gradient_spikes", "note", (150, 150), {"spikes": SPIKES[2:]}),
    "not finite, left out": ("not_finite", "warning", (90, 90), {"spikes": [BROKEN]}),
    "not finite, written": ("not_finite", "warning", (101, 101), {"change": not_a_number}),
    "no learning rate": ("learning_rate_zero", "problem", (1, 1), {"change": without_rate}),
    "an endless warm-up": ("learning_rate_zero", "warning", (1, 1), {"options": {"train.warmup_steps": 500}}),
    "nothing but warm-up": ("learning_rate_zero", "warning", (1, 1), {"options": {"train.warmup_ratio": 0.996}}),
    "waiting": ("waits_for_data", "note", (1, 1), {"change": long_waits}),
    "apart": ("starts_apart", "warning", (1, 1), {"change": apart}),
    "failed": ("did_not_finish", "problem", (200, 200), {"facts": FAILED}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_with_its_step_and_nothing_else_is(fault: str, tmp_path: Path) -> None:
    name, level, steps, changes = FAULTS[fault]
    [finding] = found_in(make_run(tmp_path / "run", **changes))
    assert (finding.name, finding.level) == (name, level)
    assert (finding.step is None) == (steps is None)
    if steps is not None:
        assert steps[0] <= (finding.step or 0) <= steps[1]
    assert finding.what.endswith(".") and finding.advice.endswith(".")


def test_every_check_has_a_fault_that_shows_it_and_a_question() -> None:
    assert {name for name, *_ in FAULTS.values()} == {check.name for check in CHECKS}
    assert all(check.question for check in CHECKS) and len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize("num_steps", [1, 3, 12, 25, 40, 70, 100, 200, 600])
def test_healthy_runs_are_silent_however_short_and_noisy(num_steps: int, tmp_path: Path) -> None:
    for seed in range(4):
        run = make_run(tmp_path / str(seed), num_steps, seed)
        assert found_in(run) == [], f"{num_steps} steps, seed {seed}"


def test_a_healthy_run_is_silent_when_it_writes_seldom_or_has_no_reference(tmp_path: Path) -> None:
    assert found_in(make_run(tmp_path / "seldom", 400, every=10)) == []

    def without_reference(record: Record, share: float) -> None:
        del share
        record["rewards/chosen"] = BETA * record["logps/chosen"]
        record["rewards/rejected"] = record["rewards/chosen"] - record["rewards/margins"]

    options = {"objective.loss_type": "simpo", "reference.mode": "none"}
    assert found_in(make_run(tmp_path / "simpo", change=without_reference, options=options)) == []


def test_labels_and_examples_have_their_own_metrics_and_are_silent(tmp_path: Path) -> None:
    def of_labels(record: Record, share: float) -> None:
        del share
        for name in ("rewards/accuracies", "rewards/margins_chosen_longer", "rewards/margins_chosen_shorter"):
            del record[name]
        record["kl"] = 2.0
        if record["step"] % 7 == 0:  # a batch of one label has no number for the other
            record["rewards/rejected"] = record["rewards/margins"] = record["logps/rejected"] = math.nan

    def of_examples(record: Record, share: float) -> None:
        record["loss"] = 2 - 0.4 * share
        for name in [name for name in record if name.startswith("rewards/") or name.endswith("rejected")]:
            del record[name]

    assert found_in(make_run(tmp_path / "kto", change=of_labels, options={"objective.loss_type": "kto"})) == []
    assert found_in(make_run(tmp_path / "sft", change=of_examples, options={"objective.loss_type": "sft"})) == []


def test_kl_is_large_where_the_loss_measures_it(tmp_path: Path) -> None:
    def kl(record: Record, share: float) -> None:
        record["kl"] = 100 * share

    [finding] = found_in(make_run(tmp_path / "run", change=kl, options={"objective.loss_type": "kto"}))
    assert finding.name == "log_ratio_large" and 60 <= (finding.step or 0) <= 80 and "KL" in finding.what


def test_without_a_reference_the_held_out_chosen_answers_tell(tmp_path: Path) -> None:
    def falls(record: Record, share: float) -> None:
        record["eval_logps/chosen"] = -80 - 60 * share

    options = {"objective.loss_type": "cpo", "reference.mode": "none"}
    names = [finding.name for finding in found_in(make_run(tmp_path / "run", change_held_out=falls, options=options))]
    assert names == ["chosen_falls"]


def test_spikes_name_their_pairs_and_a_run_that_kept_none_is_looked_through(tmp_path: Path) -> None:
    [finding] = found_in(make_run(tmp_path / "kept", spikes=SPIKES))
    assert [(pair["step"], pair["row"]) for pair in finding.pairs] == [(60, 1234), (61, 1234), (150, 1234)]
    assert "60, 61, 150" in finding.what and "gradient norm is 900" in finding.what

    def spikes(record: Record, share: float) -> None:
        del share
        record["grad_norm"] *= 100 if record["step"] in (77, 140) else 1

    older = make_run(tmp_path / "older", change=spikes)
    (older / "spikes.jsonl").unlink()
    [finding] = found_in(older)
    assert (finding.name, finding.step) == ("gradient_spikes", 77) and "77, 140" in finding.what


def test_a_run_that_ended_on_nan_before_it_was_written_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=89, spikes=[BROKEN], facts=FAILED)
    found = {finding.name: finding for finding in found_in(run)}
    assert found.keys() == {"not_finite", "did_not_finish"} and found["not_finite"].level == "problem"
    assert found["not_finite"].step == 90 and "row 17" in found["not_finite"].what
    assert "step 90: the loss is nan" in found["did_not_finish"].what


def test_the_held_out_loss_may_rise_with_that_of_training(tmp_path: Path) -> None:
    def rises(record: Record, share: float) -> None:
        record["loss"] += 0.6 * share

    names = {f.name for f in found_in(make_run(tmp_path / "run", change=rises, change_held_out=overfitted))}
    assert "evaluation_diverges" not in names


def test_pure_noise_shows_nothing(tmp_path: Path) -> None:
    """Runs whose metrics are noise around a constant: a learning run that is only short looks like that."""
    random = np.random.default_rng(5)

    def noise(record: Record, share: float) -> None:
        del share
        record["loss"] = math.log(2) + random.normal(0, 0.1)
        rewards(record, random.normal(0, 0.3), random.normal(0.05, 0.5) if record["step"] > 1 else 0.0)
        record["rewards/accuracies"] = random.binomial(16, 0.5) / 16

    for number in range(10):
        assert found_in(make_run(tmp_path / str(number), 60, change=noise)) == []


def test_every_limit_has_its_reason() -> None:
    source = inspect.getsource(limits).splitlines()
    names = [place for place, line in enumerate(source) if line[:1].isupper() and " = " in line]
    assert len(names) > 10 and [source[place] for place in names if not source[place + 1].startswith('"""')] == []
