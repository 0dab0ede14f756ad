"""Whether model, tokenizer and chat template of a configuration go together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadpo.config.schema import Config
from megadpo.data.rows import templates
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.doctor.check import Check
from megadpo.errors import UserError
from megadpo.inspect.data import open_shape
from megadpo.inspect.rows import end_ids, ends_well
from megadpo.model.shape import ModelShape
from megadpo.training.models import check_modules, open_model
from megadpo.validation.model import check_same_tokenizer

CONVERSATION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A river."}]
_MARKS = re.compile(r"<\|[\w ]+\|>|<[a-z]+_of_[a-z]+>|</?s>|\[/?INST\]")
"""What chat templates write special tokens like."""


def check_model(config: Config) -> Iterator[Check]:
    """Everything about `model.path`, `reference.path` and `data.chat_template`; what hangs on a lack is left out."""
    try:
        model = open_shape(config)
    except UserError as error:
        yield Check("model", "failed", str(error), "Set model.path to the directory of a model of a known family.")
        return
    yield _tensors(config)
    try:
        tokenizer = load_tokenizer(str(model.huggingface), templates.read_template(config.data.chat_template))
    except UserError as error:
        yield Check("tokenizer", "failed", str(error), "Put the tokenizer's files beside config.json.")
        return
    yield check_vocabulary(tokenizer, model.shape)
    yield check_special_tokens(tokenizer, model.shape, model.huggingface)
    yield from check_template(tokenizer, model.huggingface)
    if config.reference.path not in (None, config.model.path) and Path(str(config.reference.path)).is_dir():
        try:
            check_same_tokenizer(str(config.reference.path), str(model.huggingface))
            yield Check("reference's tokenizer", "ok", "reads the policy's token ids")
        except UserError as error:
            yield Check("reference's tokenizer", "failed", str(error), "Use a reference that was trained with these tokens.")


def _tensors(config: Config) -> Check:
    """The model's files, opened as a run opens them."""
    try:
        model = open_model(config.model.path, "model.path", config)
        check_modules(config, model.shape)
    except UserError as error:
        return Check("model", "failed", str(error), "Do what the sentence says; fetch files that are missing anew.")
    shape = model.shape
    words = (
        f"{len(list(model.source.names()))} tensors, {shape.num_layers} layers of {shape.hidden_size}, as config.json says"
    )
    return Check("model", "ok", words) if model.warning is None else Check("model", "warning", words, f"{model.warning}.")


def check_vocabulary(tokenizer: Any, shape: ModelShape) -> Check:
    """The model has a row for every id that the tokenizer makes."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= shape.vocab_size:
        found = f"the tokenizer makes ids up to {largest}, the model's vocabulary has {shape.vocab_size} rows"
        return Check("vocabulary", "failed", found, "Use the tokenizer that belongs to the model, or resize its embedding.")
    return Check("vocabulary", "ok", f"ids up to {largest}, {shape.vocab_size} rows")


def check_special_tokens(tokenizer: Any, shape: ModelShape, directory: Path) -> Check:
    """An end-of-sequence token, which is one of those where generation stops."""
    end = tokenizer.eos_token_id
    if end is None:
        fix = "Set eos_token in tokenizer_config.json: answers of plain text could not end."
        return Check("special tokens", "failed", "the tokenizer has no end-of-sequence token", fix)
    stops = _stops(directory)
    words = f"end of sequence {tokenizer.eos_token!r} ({end})"
    if stops and end not in stops:
        names = ", ".join(f"{tokenizer.convert_ids_to_tokens(number)!r} ({number})" for number in sorted(stops))
        fix = "Set eos_token_id in generation_config.json to the tokenizer's, or the tokenizer's eos_token to the model's."
        return Check("special tokens", "warning", f"{words}, but generation stops at {names}", fix)
    if tokenizer.pad_token_id is None:
        return Check("special tokens", "ok", f"{words}; no padding token, and none is needed")
    return Check("special tokens", "ok", words)


def _stops(directory: Path) -> set[int]:
    """Where generation stops: eos_token_id of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if found is not None:
            return set(found if isinstance(found, list) else [found])
    return set()


def check_template(tokenizer: Any, directory: Path) -> Iterator[Check]:
    """The chat template writes special tokens that are some, goes on from its own prompt, and closes the answer."""
    template = tokenizer.chat_template
    if not template:
        words = "the tokenizer has none: rows of messages will be refused, plain text works"
        yield Check("chat template", "ok", words)
        return
    try:
        whole = templates.render_ids(tokenizer, CONVERSATION, "a question and its answer", {})
        prompt = templates.render_ids(tokenizer, CONVERSATION[:1], "a question", {}, is_prompt=True)
        templates.check_prompt_survives(tokenizer, CONVERSATION[:1], CONVERSATION[1:], "a question and its answer", {})
    except UserError as error:
        yield Check("chat template", "failed", str(error), "Set data.chat_template to a template that works for this model.")
        return
    if not ends_well(whole, end_ids(tokenizer, directory), tokenizer):
        found = f"an answer ends in {tokenizer.decode(whole[-3:])!r}, which is no end-of-turn token"
        fix = "Set data.chat_template to one that closes the assistant's turn: a model would not learn to stop."
        yield Check("chat template", "warning", found, fix)
        return
    marks = sorted(set(_MARKS.findall(str(template))))
    unknown = [mark for mark in marks if len(tokenizer(mark, add_special_tokens=False)["input_ids"]) != 1]
    if unknown:
        found = f"it writes {', '.join(unknown[:5])}, which the tokenizer reads as several tokens"
        fix = "Use this model's own template, or add these to the tokenizer as special tokens and train their embeddings."
        yield Check("chat template", "warning", found, fix)
        return
    kept = "goes on from its prompt" if whole[: len(prompt)] == prompt else "renders the prompt's end anew with an answer"
    yield Check("chat template", "ok", f"{kept}, and closes the answer with {tokenizer.decode(whole[-2:])!r}")
