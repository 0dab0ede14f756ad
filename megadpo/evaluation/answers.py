"""What model and reference answer to held-out prompts, side by side, and how far apart they are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.evaluation.figures import Report
from megadpo.evaluation.generate import Answer, exported, generate, texts_of
from megadpo.evaluation.measure import Models, num_scored_tokens, response_values
from megadpo.evaluation.request import Generation
from megadpo.evaluation.statistics import kl_of
from megadpo.parallel.messages import gathered
from megadpo.parallel.world import place_on_machine, rank, world_size
from megadpo.platform.device import resolve_dtype
from megadpo.training.models import ModelFiles


def side_by_side(models: Models, prompts: list[list[int]], options: Generation, tokenizer: Any) -> Report:
    """Answers of model and reference side by side, and how far apart they are there; collective."""
    numbered = list(enumerate(prompts))
    policy = _answers(models.policy, models, numbered, options)
    reference = None if models.reference is None else _answers(models.reference, models, numbered, options)
    records: list[Report] = []
    for number, prompt in numbered:
        texts = texts_of(tokenizer, [prompt, policy[number].ids])
        record: Report = {"prompt": texts[0], "policy": texts[1], "reference": None} | _about("policy", policy[number])
        if reference is not None:
            (record["reference"],) = texts_of(tokenizer, [reference[number].ids])
            record |= _about("reference", reference[number])
        records.append(record)
    report: Report = {"generations": records, "generation": asdict(options), "kl": None}
    if models.reference is not None:
        report["kl"] = _kl(models, prompts, [policy[number] for number in range(len(prompts))], options)
    return report


def _about(side: str, answer: Answer) -> Report:
    return {f"{side}_ids": answer.ids, f"{side}_ended": answer.has_ended}


def _answers(
    files: ModelFiles, models: Models, numbered: Sequence[tuple[int, list[int]]], options: Generation
) -> dict[int, Answer]:
    """A model's answers to all prompts, each rank having written some of them."""
    dtype = resolve_dtype(models.config.model.dtype)
    with _shared_export(files.merged or files.path, dtype, models.config.checkpoint.verify) as directory:
        own = generate(directory, numbered[rank() :: world_size()], options, dtype)
    parts = gathered({str(number): [answer.ids, answer.has_ended] for number, answer in own.items()})
    return {int(number): Answer(*value) for part in parts for number, value in part.items()}


@contextlib.contextmanager
def _shared_export(path: str, dtype: torch.dtype, verify: bool) -> Iterator[str]:
    """`exported`, once a machine; collective."""
    local, _ = place_on_machine()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(exported(path, dtype, verify)) if local == 0 else None
        yield gathered(made)[rank() - local]
        dist.barrier()


def _kl(models: Models, prompts: list[list[int]], answers: list[Answer], options: Generation) -> Report:
    """The KL divergence as the model's own answers show it; collective."""
    assert models.reference is not None
    groups = GroupStore.of(
        Group((np.array(prompt, np.int32),), (np.array(answer.ids, np.int32),), number)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    )
    ratios_S = response_values(models, models.policy, "--model", groups)
    ratios_S = ratios_S - response_values(models, models.reference, "--reference", groups)
    is_drawn = options.temperature == 1 and options.top_p == 1
    return {"is_estimate": is_drawn} | kl_of(ratios_S, num_scored_tokens(groups))
