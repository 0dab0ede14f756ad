"""Everything that was seen, as plain values: what the terminal, the page and scripts (`--json`) show."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megadpo.config.schema import Config
from megadpo.inspect.data import Inspected, Side, read_data
from megadpo.inspect.findings import Finding, findings
from megadpo.inspect.samples import Sample, rendered, samples

NUM_BINS = 12
QUANTILES = {"median": 0.5, "90_percent": 0.9, "99_percent": 0.99}


@dataclass(frozen=True)
class Summary:
    """What `megadpo inspect` shows.

    Attributes:
        samples: of the training rows.
        rendered: location and text of a conversation as the template writes it.
    """

    inspected: Inspected
    findings: list[Finding]
    samples: list[Sample]
    rendered: tuple[str, str] | None

    @property
    def train(self) -> Side:
        return self.inspected.sides[0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        inspected = self.inspected
        return {
            "model": inspected.config.model.path,
            "objective": inspected.config.objective.loss_types,
            "chat_template": inspected.template,
            "data": {side.name: side_summary(side) for side in inspected.sides},
            "packed": None if inspected.packed is None else asdict(inspected.packed),
            "findings": [{**asdict(one), "count": one.count} for one in self.findings],
            "samples": [asdict(one) for one in self.samples],
            "rendered": None if self.rendered is None else {"location": self.rendered[0], "text": self.rendered[1]},
        }


def look_at_all(config: Config, num_samples: int) -> Summary:
    """Reads the data of a configuration and looks at it from all sides; raises what `read_data` raises."""
    inspected = read_data(config)
    train = inspected.sides[0]
    return Summary(
        inspected, findings(inspected), samples(inspected, train, num_samples), rendered(config, inspected, train.name)
    )


def side_summary(side: Side) -> dict[str, Any]:
    """The counts of the rows of `data.train` or of a set of `data.eval`."""
    report = side.report
    tokens = side.tokens() if len(side.groups) else {}
    return {
        "kind": report.kind,
        "sources": side.groups.source_names,
        "num_rows": report.num_rows,
        "num_kept": report.num_kept,
        "dropped": report.dropped,
        "sentence": report.sentence(),
        "splits": report.splits,
        "tokens": {name: {**quantiles(values), "histogram": histogram(values, tokens)} for name, values in tokens.items()},
        "tokens_per_row": tokens_per_row(side),
        "languages": {"prompt": dict(languages(side, "prompt")), "answers": dict(languages(side, "answers"))},
    }


def quantiles(values: npt.NDArray[np.int64]) -> dict[str, float]:
    """Mean, quantiles and the largest of some lengths; nothing of none."""
    if not len(values):
        return {}
    return {
        "mean": float(values.mean()),
        **{name: int(np.quantile(values, share, method="higher")) for name, share in QUANTILES.items()},
        "longest": int(values.max()),
    }


def histogram(values: npt.NDArray[np.int64], beside: dict[str, npt.NDArray[np.int64]]) -> dict[str, list[int]]:
    """Counts of lengths in bins that are the same for all of `beside`; the last has all beyond its beginning."""
    every = np.concatenate(list(beside.values()))
    end = int(np.quantile(every, 0.99, method="higher")) + 1
    width = -(-end // NUM_BINS)
    counts = np.bincount(np.minimum(values // width, NUM_BINS - 1), minlength=NUM_BINS)
    return {"edges": [width * place for place in range(NUM_BINS)], "counts": counts.tolist()}


def tokens_per_row(side: Side) -> dict[str, float]:
    """Mean tokens that go through the model for a row, with prompts once a response, and once for all that share them."""
    if not len(side.groups):
        return {}
    apart, shared = (float(side.groups.num_tokens(share).mean()) for share in (False, True))
    return {"each_with_its_prompt": apart, "prompt_shared": shared, "saved": 1 - shared / apart}


def languages(side: Side, which: str) -> list[tuple[str, int]]:
    """Languages of prompts or answers of the kept rows, the commonest first."""
    kept = [row for row in side.looks if row.dropped is None]
    if which == "prompt":
        return Counter(row.prompt_language for row in kept).most_common()
    return Counter(one for row in kept for one in row.answer_languages).most_common()
