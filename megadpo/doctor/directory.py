"""`megadpo convert doctor`: whether a Hugging Face directory, whatever is in it, would be trained, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megadpo.checkpoint.companions import companion_files
from megadpo.checkpoint.hf import directory_warning, hf_directory, is_quantised, read_hf_config, read_json
from megadpo.checkpoint.sharded import open_weights
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.doctor.check import Check
from megadpo.doctor.model import check_special_tokens, check_template, check_vocabulary
from megadpo.errors import UserError
from megadpo.model.families import TensorSource, logical_shapes, mtp_names, shape_of, tensor_problems
from megadpo.model.shape import ModelShape

NEEDS_TRANSFORMERS_5 = ("TokenizersBackend", "SentencePieceBackend")
"""Classes of tokenizers that transformers 4, vLLM and llama.cpp of its time do not know."""
MOST_NAMED = 5


def check_directory_of_model(path: str | Path) -> Iterator[Check]:
    """The config, the tensors, the tokenizer and its template; what hangs on a lack is left out, all else is looked at."""
    directory = Path(path)
    shape = None
    try:
        shape = shape_of(read_hf_config(directory))
        yield Check("config", "ok", _words(directory, shape))
    except UserError as error:
        yield Check("config", "failed", str(error), _fix_of_config(directory))
    yield from _weights(directory, shape)
    yield from _tokenizer(hf_directory(directory), shape)
    yield _export(hf_directory(directory))


def _words(directory: Path, shape: ModelShape) -> str:
    kind = read_json(hf_directory(directory) / "config.json").get("model_type")
    experts = "" if shape.experts is None else f", {shape.experts.count} experts"
    return f"{kind}, {shape.num_layers} layers of {shape.hidden_size}{experts}, vocabulary {shape.vocab_size:,}"


def _fix_of_config(directory: Path) -> str:
    file = hf_directory(directory) / "config.json"
    if file.is_file() and is_quantised(directory):
        return "Give the model that it was made from, in bf16 or fp32."
    return "Nothing is ignored that changes what a model computes: give a model without it, or of a supported family."


def _weights(directory: Path, shape: ModelShape | None) -> Iterator[Check]:
    try:
        source = open_weights(directory, verify=False)
        names = list(source.names())
    except UserError as error:
        yield Check("weights", "failed", str(error), "Fetch the files that are missing or damaged anew.")
        return
    warning = directory_warning(directory)
    if warning is not None:
        yield Check("files", "warning", warning, "It works; put it right to be sure of what is read.")
    if shape is None:
        yield Check("weights", "ok", f"{len(names)} tensors; whether these are the model's hangs on its config")
        return
    yield _tensors(source, shape)
    passed_on = mtp_names(shape.num_layers, names)
    if passed_on:
        yield Check("multi-token prediction", "ok", f"{len(passed_on)} tensors are exported as they are, and not trained")


def _tensors(source: TensorSource, shape: ModelShape) -> Check:
    problems = tensor_problems(shape, source)
    if not problems:
        return Check("weights", "ok", f"{len(logical_shapes(shape))} tensors, as config.json says")
    named = "; ".join(problems[:MOST_NAMED])
    more = f"; and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    fix = "Fetch the model anew, or put its config.json right: tensors and config are of different models."
    return Check("weights", "failed", named + more, fix)


def _tokenizer(directory: Path, shape: ModelShape | None) -> Iterator[Check]:
    try:
        tokenizer = load_tokenizer(str(directory))
    except UserError as error:
        yield Check("tokenizer", "failed", str(error), "Put the tokenizer's files beside config.json.")
        return
    if shape is not None:
        yield check_vocabulary(tokenizer, shape)
        yield check_special_tokens(tokenizer, shape, directory)
    yield from check_template(tokenizer, directory)
    file = directory / "tokenizer_config.json"
    kind = read_json(file).get("tokenizer_class") if file.is_file() else None
    if kind in NEEDS_TRANSFORMERS_5:
        fix = 'To serve it with these, set tokenizer_class to "PreTrainedTokenizerFast" in tokenizer_config.json.'
        found = f"tokenizer_class is {kind}, which transformers 4 and servers that are built on it do not load"
        yield Check("tokenizer class", "warning", found, fix)


def _export(directory: Path) -> Check:
    try:
        files = companion_files(directory)
    except UserError as error:
        return Check("export", "failed", str(error), "Do what the sentence says.")
    return Check("export", "ok", f"{len(files)} files go with the weights: {', '.join(sorted(files))}")
