"""From the scores of all pairs to the figures of a report, its lines a pair, and what has to be said beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megadpo.config.schema import Config
from megadpo.data.store import GroupStore
from megadpo.evaluation import reward_bench
from megadpo.evaluation.measure import Models
from megadpo.evaluation.request import Request, default_score
from megadpo.evaluation.scores import Measured, kinds_there_are, scores
from megadpo.evaluation.statistics import accuracy_of, by_length, calibration_of, record_of

Report = dict[str, Any]
"""Plain values, as JSON has them."""


@np.errstate(invalid="ignore")
def figures_of(request: Request, models: Models, measured: Measured, subsets: Sequence[str]) -> Report:
    """Everything that follows from the scores."""
    options = request.config.objective
    kind = request.score or default_score(request.config, models.has_reward_head, request.reference)
    scores_P2 = scores(kind, measured, options)
    margins_P = scores_P2[:, 0] - scores_P2[:, 1]
    of_pair = np.array(subsets)
    records: list[Report] = [
        {"name": name} | record_of(scores_P2, measured, of_pair == name) for name in dict.fromkeys(subsets)
    ]
    bins, error = calibration_of(margins_P)
    kinds: dict[str, Any] = {}
    for other in kinds_there_are(measured):
        other_P2 = scores(other, measured, options)
        other_P = other_P2[:, 0] - other_P2[:, 1]
        kinds[other] = accuracy_of(other_P) | {
            "margin": float(other_P.mean()),
            "calibration_error": calibration_of(other_P)[1],
        }
    if measured.reference_logps_P2 is not None:
        reference = Measured(measured.num_tokens_P2, logps_P2=measured.reference_logps_P2)
        for other in kinds_there_are(reference):
            other_P2 = scores(other, reference, options)
            kinds[f"reference_{other}"] = accuracy_of(other_P2[:, 0] - other_P2[:, 1])
    sections = reward_bench.sections({record["name"]: record["accuracy"] for record in records})
    return {
        "score": kind,
        "subsets": records,
        "all": record_of(scores_P2, measured, np.ones(len(subsets), bool)),
        "mean_over_subsets": {name: float(np.mean([record[name] for record in records])) for name in ("accuracy", "margin")},
        "sections": sections,
        "reward_bench": reward_bench.mean(sections),
        "kinds": kinds,
        "by_length": by_length(margins_P, measured),
        "calibration": bins,
        "calibration_error": error,
    }


def lines_of(
    groups: GroupStore, subsets: Sequence[str], measured: Measured, kind: str, config: Config
) -> list[dict[str, Any]]:
    """What pairs.jsonl has of each pair."""
    scores_P2 = scores(kind, measured, config.objective)
    columns = {"score": scores_P2, "tokens": measured.num_tokens_P2.astype(int)}
    if measured.logps_P2 is not None:
        columns["logp"] = measured.logps_P2
    if measured.reference_logps_P2 is not None:
        columns["reference_logp"] = measured.reference_logps_P2
    lines = []
    for place, (row, subset) in enumerate(zip(groups.rows, subsets, strict=True)):
        line: dict[str, Any] = {"index": int(row), "subset": subset}
        for name, values_P2 in columns.items():
            line[f"chosen_{name}"], line[f"rejected_{name}"] = values_P2[place].tolist()
        lines.append(line)
    return lines


def finite(value: Any) -> Any:
    """Plain values as JSON can have them: a number that is infinite or none at all is None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


FEW_PAIRS = 100


def remarks_of(report: Report) -> list[str]:
    """What the figures, of which all are `finite`, do not say by themselves, a sentence each."""
    remarks = []
    if "subsets" in report:
        whole = report["all"]
        if whole["num_ties"]:
            same = " (model and reference are the same)" if whole["num_ties"] == whole["num_pairs"] else ""
            remarks.append(f"{whole['num_ties']:,} of {whole['num_pairs']:,} pairs are ties, which count as not won{same}")
        if whole["num_pairs"] and whole["margin"] is None:
            remarks.append(
                f"a score by {report['score']} is larger than any float, and what follows from it is null; choose another "
                "--score"
            )
        few = [record["name"] for record in report["subsets"] if record["num_pairs"] < FEW_PAIRS]
        if few:
            named = ", ".join(few[:5]) + (" …" if len(few) > 5 else "")
            remarks.append(f"fewer than {FEW_PAIRS} pairs in {named}: look at the intervals")
        if report["empty_subsets"]:
            remarks.append(f"no pair was evaluated of {', '.join(report['empty_subsets'])}")
        if report["rows"]["num_truncated"]:
            remarks.append(f"{report['rows']['num_truncated']:,} pairs lost tokens to data.max_length")
        dropped = report["rows"]["dropped"]
        if dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
            remarks.append(f"left out of all figures: {reasons}")
    kl = report.get("kl")
    if kl is not None and not kl["is_estimate"]:
        remarks.append(
            "the log-ratio of these answers estimates no KL divergence: that takes --temperature 1 and no --top-p"
        )
    return remarks
