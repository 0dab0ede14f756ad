"""Answers to held-out prompts: by transformers' `generate` or by vLLM, on the model as it was exported."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadpo.checkpoint.convert import export_checkpoint, merge_adapter
from megadpo.checkpoint.peft import is_adapter
from megadpo.checkpoint.sharded import is_checkpoint
from megadpo.config.sources import parse_sources
from megadpo.data.rows.encode import encode
from megadpo.data.rows.formats import PAIRS, recognise
from megadpo.data.rows.messages import as_messages
from megadpo.data.rows.row_files import Fields
from megadpo.data.rows.sources import iter_rows
from megadpo.data.rows.templates import check_template, render_ids
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.evaluation.request import Generation
from megadpo.platform.device import compute_device


@dataclass(frozen=True)
class Answer:
    """What a model says to a prompt.

    Attributes:
        ids: its tokens, the end-of-sequence token included where there is one.
        has_ended: whether it ends with one; else it was cut at `max_new_tokens`.
    """

    ids: list[int]
    has_ended: bool


def prompts_of_data(groups: GroupStore, count: int) -> list[list[int]]:
    """The token ids of the first `count` different prompts, as they are trained on."""
    found: dict[tuple[int, ...], None] = {}
    for group in groups:
        for prompt in group.prompts:
            if len(prompt):
                found.setdefault(tuple(prompt.tolist()))
        if len(found) >= count:
            break
    return [list(ids) for ids in list(found)[:count]]


def prompts_of_file(path: str, tokenizer: Any, as_conversations: bool) -> list[list[int]]:
    """The token ids of the prompts of a file's rows: `prompt` (text or messages), `messages` without the assistant's last
    answer, or a pair's prompt. Messages are rendered by the chat template, up to the beginning of an answer.

    Args:
        as_conversations: a prompt that is text is what a user says; else it is taken as it is.

    Raises:
        UserError: the file or a row of it cannot be read, or has no prompt.
    """
    (source,) = parse_sources(path, name="--generate")
    found = []
    for location, row in iter_rows(source):
        pair = row if row.get("chosen") is not None and row.get("rejected") is not None else _as_pair(row, location)
        if as_conversations and isinstance(pair.get("prompt"), str):
            pair = pair | {"prompt": [{"role": "user", "content": pair["prompt"]}]}
        recognised = recognise(pair, location, PAIRS)
        prompt = recognised.prompts[0]
        if recognised.conversational:
            check_template(tokenizer, location)
            ids = render_ids(tokenizer, as_messages(prompt), location, recognised.template_kwargs, is_prompt=True)
        else:
            ids = encode(tokenizer, [str(prompt)])[0]
        if not ids:
            raise UserError(f"{location}: the prompt is empty; drop the row")
        found.append(ids)
    if not found:
        raise UserError(f"--generate: there is no row in {path}")
    return found


def _as_pair(row: Fields, location: str) -> Fields:
    """The row with two answers that nobody reads, so that its prompt is read as a pair's is."""
    turns = row.get("prompt")
    if turns is None:
        turns = row.get("messages")
        is_answered = (
            isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
        )
        turns = turns[:-1] if is_answered and turns else turns
    if not turns:
        raise UserError(f"{location}: the row has no `prompt` and no `messages`; it has {', '.join(row) or 'nothing'}")
    rest = {name: value for name, value in row.items() if name not in ("messages", "completion", "label")}
    return rest | {"prompt": turns, "chosen": "a", "rejected": "b"}


@contextlib.contextmanager
def exported(path: str, dtype: torch.dtype, verify: bool = True) -> Iterator[str]:
    """The model as a directory that transformers opens: itself, or a copy for as long as this lasts, of a checkpoint as
    `megadpo convert export` writes it, of an adapter as `megadpo convert merge` does."""
    if not is_adapter(path) and not is_checkpoint(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="megadpo-eval-") as directory:
        out = str(Path(directory) / "model")
        if is_adapter(path):
            merge_adapter(path, out, dtype=dtype, verify=verify)
        else:
            export_checkpoint(path, out, verify)
        yield out


def generate(
    directory: str, prompts: Sequence[tuple[int, list[int]]], options: Generation, dtype: torch.dtype
) -> dict[int, Answer]:
    """A model's answers to numbered prompts, by number.

    Raises:
        UserError: vLLM is asked for and not there.
    """
    if not prompts:
        return {}
    by = with_vllm if options.generator == "vllm" else with_transformers
    return by(directory, prompts, options, dtype)


def with_transformers(
    directory: str, prompts: Sequence[tuple[int, list[int]]], options: Generation, dtype: torch.dtype
) -> dict[int, Answer]:
    """One prompt at a time, so that an answer does not depend on what it is padded with; see `generate`."""
    from transformers import AutoModelForCausalLM

    with _without_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, trust_remote_code=False)
    model.to(compute_device()).eval()
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature:
        settings = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    ends = _ends(model.generation_config.eos_token_id)
    if model.generation_config.pad_token_id is None:  # there is nothing to be padded
        model.generation_config.pad_token_id = next(iter(ends), 0)
    answers = {}
    for number, ids in prompts:
        torch.manual_seed(options.seed + number)
        given = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            whole = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=options.max_new_tokens, **settings
            )
        answer = whole[0, len(ids) :].tolist()
        answers[number] = Answer(answer, bool(answer) and answer[-1] in ends)
    return answers


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def with_vllm(
    directory: str, prompts: Sequence[tuple[int, list[int]]], options: Generation, dtype: torch.dtype
) -> dict[int, Answer]:
    """All prompts at once, over all visible devices; see `generate`."""
    require_generator(options)
    from vllm import LLM, SamplingParams

    model = LLM(
        model=directory,
        dtype=str(dtype).removeprefix("torch."),
        seed=options.seed,
        tensor_parallel_size=max(1, torch.cuda.device_count()),
        trust_remote_code=False,
    )
    settings = [
        SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_new_tokens,
            seed=options.seed + number,
        )
        for number, _ in prompts
    ]
    outputs = model.generate([{"prompt_token_ids": ids} for _, ids in prompts], settings)
    return {
        number: Answer(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop")
        for (number, _), output in zip(prompts, outputs, strict=True)
    }


def require_generator(options: Generation) -> None:
    """Raises UserError where vLLM is asked for and not installed."""
    if options.generator == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--generator vllm: vllm is not installed here; pip install vllm, or leave --generator out")


def _ends(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def texts_of(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Token ids as text, without special tokens."""
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in prompts]
