"""The pairs of a step with a spike, in `spikes.jsonl`: which rows, how far from the reference, and what they say.

A pair's share of the gradient is estimated: d loss / d log-prob of each answer (the objective's own), times how surprising
its tokens are to the model, for the gradient of a log-prob grows with what is missing to certainty.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megadpo.metrics.sinks import keep_earlier
from megadpo.objectives.evaluate import evaluate
from megadpo.objectives.statistics import ResponseStatistics, response_statistics
from megadpo.objectives.terms import normalisers_of
from megadpo.pages.page import finite_json
from megadpo.parallel.messages import gathered
from megadpo.parallel.world import rank
from megadpo.report.run_files import SPIKES_FILE
from megadpo.training.console import log

if TYPE_CHECKING:
    from megadpo.data.store import GroupStore
    from megadpo.objectives.objective import Objective
    from megadpo.training.run import Run
    from megadpo.training.step import StepResult

PAIRS_KEPT = 5
"""Of a step, those of the largest share."""
MOST_SPIKES = 200
"""Lines of a process: a run that spikes at every other step is known by the first of them."""
SHOWN_CHARACTERS = 300
"""Of a prompt's end and of an answer's beginning."""


def begin_spikes(output_dir: Path, kept_step: int | None) -> None:
    """Keep what an earlier process of this run has written up to `kept_step`; of another run, put it aside. Rank 0 calls
    it."""
    path = output_dir / SPIKES_FILE
    try:
        keep_earlier(path, kept_step)
        path.touch()  # so that its being empty says something
    except OSError as error:
        log(f"warning: {path} cannot be written: {error.strerror or error}")


def record_spike(run: Run, step: int, what: str, loss: float, result: StepResult, updated: bool) -> None:
    """Write down a spike with its pairs; collective."""
    if run.num_spikes_written >= MOST_SPIKES:
        return
    run.num_spikes_written += 1
    groups = run.groups
    found = [pair for part in gathered(_pairs_here(groups, run.setup.objective, result)) for pair in part]
    if rank() != 0:
        return
    # Tensor and context ranks have the same pairs.
    pairs = {pair["group"]: pair for pair in found}
    total = sum(weight for pair in pairs.values() if math.isfinite(weight := pair["weight"]))
    largest = sorted(pairs.values(), key=_gravity, reverse=True)[:PAIRS_KEPT]
    shown = []
    for pair in largest:
        share = {"share": pair["weight"] / total} if total > 0 and math.isfinite(pair["weight"]) else {}
        values = {name: value for name, value in pair.items() if name not in ("group", "weight")}
        shown.append(values | share | _texts(groups, pair["group"], str(run.setup.policy.huggingface)))
    line = {"step": step, "what": what, "loss": loss, "grad_norm": result.grad_norm, "updated": updated, "pairs": shown}
    path = run.setup.output_dir / SPIKES_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_json(line), allow_nan=False) + "\n")
    except OSError as error:
        log(f"warning: {path} cannot be written: {error.strerror or error}")


def _gravity(pair: dict[str, Any]) -> float:
    return float(pair["weight"]) if math.isfinite(pair["weight"]) else math.inf


def _pairs_here(groups: GroupStore, objective: Objective, result: StepResult) -> list[dict[str, Any]]:
    """Each group of this rank's micro-batches with its log-probs and its weight in the gradient; nothing on a stage without
    the head."""
    found = []
    reference = [*result.reference_logps, *[None] * len(result.response_sums)]
    for micro_batch, sums_RS, reference_R in zip(result.micro_batches, result.response_sums, reference, strict=False):
        if not len(micro_batch.group_ids):  # it only fills a round
            continue
        statistics = response_statistics(sums_RS, reference_R, micro_batch)
        slope_R = _slopes(statistics, objective, groups, micro_batch.group_ids)
        weight_R = (slope_R * statistics.token_logps_R).abs()
        table_RC = torch.stack(
            [statistics.logps_R, statistics.reference_logps_R, statistics.num_tokens_R, weight_R.to(statistics.logps_R)]
        ).T.tolist()
        ends = [*statistics.first_G[1:].tolist(), len(table_RC)]
        for place, (first, end) in enumerate(zip(statistics.first_G.tolist(), ends, strict=True)):
            group = int(micro_batch.group_ids[place])
            found.append(
                {"group": group, "row": int(groups.rows[group]), "weight": sum(row[3] for row in table_RC[first:end])}
                | _sides(table_RC[first:end], has_reference=reference_R is not None)
            )
    return found


def _sides(rows: list[list[float]], has_reference: bool) -> dict[str, float]:
    """Of a pair, both answers; of anything else the first one."""
    values: dict[str, float] = {}
    for side, (logp, reference, num_tokens, _) in zip(("chosen", "rejected"), rows[:2], strict=False):
        values |= {f"{side}_logp": logp, f"{side}_tokens": int(num_tokens)}
        if has_reference:
            values[f"{side}_reference_logp"] = reference
    if has_reference and len(rows) == 2:
        values["margin"] = (rows[0][0] - rows[0][1]) - (rows[1][0] - rows[1][1])
    return values


def _slopes(statistics: ResponseStatistics, objective: Objective, groups: GroupStore, group_ids: Any) -> torch.Tensor:
    """d loss / d log-prob of each response; 1 where a pair's loss depends on others of the batch."""
    if objective.couples_batch or objective.measures_kl or objective.has_reward_head:
        return torch.ones_like(statistics.logps_R)
    normalisers = normalisers_of(groups, np.asarray(group_ids, np.int64))
    return evaluate(statistics, normalisers, objective).gradient_RD[:, :3].sum(dim=-1)


def _texts(groups: GroupStore, group_id: int, tokenizer: str) -> dict[str, str]:
    """How a group's prompt ends and its first two answers begin; nothing where the tokenizer cannot say."""
    decode = _decoder(tokenizer)
    if decode is None:
        return {}
    group = groups[group_id]
    shown = {"prompt": decode(group.prompts[0][-SHOWN_CHARACTERS:])[-SHOWN_CHARACTERS:]}
    for side, response in zip(("chosen", "rejected"), group.responses, strict=False):
        shown[side] = decode(response[:SHOWN_CHARACTERS])[:SHOWN_CHARACTERS]
    return shown


@functools.lru_cache(maxsize=2)
def _decoder(directory: str) -> Any:
    """Token ids -> text, by the tokenizer of a model's directory; None where it cannot be opened."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's own code raises: a spike is told without its text
        log(f"warning: the texts of a spike's pairs are left out: {error}")
        return None
    return lambda ids: str(tokenizer.decode([int(token) for token in ids]))
