"""RewardBench's sections: which subsets each has, and how many pairs each subset counts for (arXiv:2403.13787).

The counts are those by which its leaderboard weighs; math-prm counts as much as the six programming languages together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SECTIONS: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984}
    | dict.fromkeys((f"hep-{name}" for name in ("cpp", "go", "java", "js", "python", "rust")), 164),
}


def is_known(subset: str) -> bool:
    """Whether RewardBench has a subset of this name."""
    return any(subset in counts for counts in SECTIONS.values())


def sections(accuracies: Mapping[str, float]) -> list[dict[str, Any]]:
    """The score of each section with a subset among these (name -> accuracy); `missing` are its subsets that are not."""
    records = []
    for name, counts in SECTIONS.items():
        there = {subset: count for subset, count in counts.items() if subset in accuracies}
        if there:
            score = sum(count * accuracies[subset] for subset, count in there.items()) / sum(there.values())
            missing = [subset for subset in counts if subset not in there]
            records.append({"name": name, "accuracy": score, "num_subsets": len(there), "missing": missing})
    return records


def mean(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of the sections' scores; None where a section is not there."""
    scores = [record["accuracy"] for record in records]
    return float(sum(scores) / len(scores)) if len(scores) == len(SECTIONS) else None
