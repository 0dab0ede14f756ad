"""`megadpo convert doctor`: whether a Hugging Face directory, whatever is in it, would be trained, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megadpo.checkpoint.companions import companion_files
from megadpo.checkpoint.hf import directory_warning, hf_directory, is_quantised, read_hf_config, read_json
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.checkpoint.peft import is_peft_directory
from megadpo.checkpoint.sharded import open_weights
from megadpo.checkpoint.torch_dist import torch_dist_directory
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
    other = _other_format(directory)
    if other is not None:
        yield other
        return
    shape, is_broken = None, _is_broken(hf_directory(directory) / "config.json")
    try:
        shape = shape_of(read_hf_config(directory))
        yield Check("config", "ok", _words(directory, shape))
    except UserError as error:
        yield Check("config", "failed", str(error), _fix_of_config(directory, is_broken))
    if not is_broken:  # how tensors are read hangs on it, too
        yield from _weights(directory, shape)
        yield from _tokenizer(hf_directory(directory), shape)
    yield _export(hf_directory(directory))


def _other_format(directory: Path) -> Check | None:
    """What is given and is no model directory at all, where that is known; one without a config is of another format."""
    if is_peft_directory(directory):
        found = f"{directory} is an adapter of PEFT, not a model: doctor looks at Hugging Face directories of whole models"
        fix = f"Merge it by `megadpo convert merge {directory} OUT` and look at OUT, or look at the base that it names."
        return Check("directory", "failed", found, fix)
    if (hf_directory(directory) / "config.json").exists():
        return None
    if torch_dist_directory(directory) is not None:
        found = f"{directory} is a checkpoint of Megatron-core (torch_dist), which has no config.json and tokenizer"
        fix = (
            f"Make one of it that can be given by `megadpo convert import {directory} OUT --config HF_DIR`, and look at OUT."
        )
        return Check("directory", "failed", found, fix)
    if not any(directory.iterdir()):
        return Check("directory", "failed", f"{directory} is empty", "Fetch the model into it, or give another directory.")
    what = why_no_model(directory)
    if what is not None:
        return Check("directory", "failed", f"{directory} is no model directory: {what}", "Give what the sentence says.")
    return None


def _is_broken(config: Path) -> bool:
    """Whether there is a config.json that is no JSON object."""
    try:
        read_json(config)
    except UserError:
        return config.is_file()
    return False


def _words(directory: Path, shape: ModelShape) -> str:
    kind = read_json(hf_directory(directory) / "config.json").get("model_type")
    experts = "" if shape.experts is None else f", {shape.experts.count} experts"
    linear = "" if shape.linear is None else f", {len(shape.linear_layers)} of them with linear attention"
    return f"{kind}, {shape.num_layers} layers of {shape.hidden_size}{linear}{experts}, vocabulary {shape.vocab_size:,}"


def _fix_of_config(directory: Path, is_broken: bool) -> str:
    file = hf_directory(directory) / "config.json"
    if is_broken:
        return "Fetch config.json anew; weights and tokenizer are looked at when it can be read."
    if not file.is_file():
        return "Put the model's config.json and tokenizer into the directory, or give the directory that has them."
    if is_quantised(directory):
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
