"""`megadpo convert verify`: whether two directories hold the same model, by their tensors and by log-probs of sample text.

A Hugging Face directory is computed by transformers, one of our checkpoints by the model that is trained: two computations
that have nothing in common but the weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megadpo.checkpoint.hf import hf_directory, read_hf_config
from megadpo.checkpoint.peft import is_adapter, is_peft_directory
from megadpo.checkpoint.reward_model import refuse_reward_model
from megadpo.checkpoint.sharded import is_checkpoint, open_weights
from megadpo.checkpoint.torch_dist import torch_dist_directory
from megadpo.config.schema import Config
from megadpo.console.activity import activity, counted_through
from megadpo.data.groups import Group
from megadpo.data.rows.dataset import prepare_groups
from megadpo.errors import UserError
from megadpo.training.logprobs import run_logprobs
from megadpo.validation.load import load_config

SAMPLES = (
    ("The harbour is quiet at dawn, and", " the ferry leaves at six.", " seven hats divide the sea."),
    ("Two plus two makes", " four.", " a fine day for it, I should think."),
    ("def area(width, height):\n    return", " width * height", " None"),
    ("Der Hafen ist ruhig.", " Das Boot legt um sechs ab.", " 港は静かです。"),
)
"""Prompt, one response, another one."""
TOLERANCE = 1e-4
"""Of a response's log-prob in float32, relative to its length in tokens beyond the tenth."""


@dataclass(frozen=True)
class Verdict:
    """How two directories compare.

    Attributes:
        num_equal, num_tensors: tensors with the same values, and all.
        largest: the largest difference of an element, and its tensor's name; None: there is none.
        only_in_one: names that one of them lacks.
        logps: for each response the log-probs of both.
        worst: the largest difference of them over what is allowed.
    """

    num_equal: int
    num_tensors: int
    largest: tuple[float, str] | None
    only_in_one: tuple[str, ...]
    logps: tuple[tuple[float, float], ...]
    worst: float

    @property
    def is_same(self) -> bool:
        """Whether the log-probs agree."""
        return self.worst <= 1

    def lines(self) -> list[str]:
        """For people."""
        words = [f"tensors: {self.num_equal} of {self.num_tensors} have the same values"]
        if self.largest is not None:
            words[0] += f"; the largest difference is {self.largest[0]:.3g}, in {self.largest[1]}"
        if self.only_in_one:
            words.append(f"only one has {len(self.only_in_one)} tensors, the first is {self.only_in_one[0]}")
        words += [f"log-probs of response {number}: {a:.6f} and {b:.6f}" for number, (a, b) in enumerate(self.logps)]
        agree = "agree" if self.is_same else "differ"
        return [*words, f"log-probs {agree}: the largest difference is {self.worst:.3g} times what is allowed"]


def verify(one: str, other: str, texts: Sequence[str] | None = None, tolerance: float = TOLERANCE) -> Verdict:
    """Compare two Hugging Face directories or checkpoints, in float32.

    Args:
        texts: each is parted in the middle into a prompt and a response; None: SAMPLES.

    Raises:
        UserError: a directory is neither, its tokenizer is missing, or a text is too short.
    """
    rows = _rows(texts)
    for path in (one, other):
        _refuse_other_formats(path)
        refuse_reward_model(read_hf_config(path), path)
    with tempfile.TemporaryDirectory(prefix="megadpo-verify-") as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = load_config(Config(), ["model.dtype=fp32", "data.num_workers=1", f"data.cache_dir={folder}"])
        groups = list(prepare_groups(config.data, str(data), str(hf_directory(one))).groups)
        both = []
        for number, path in enumerate((one, other)):
            if is_checkpoint(path):
                both.append(_ours(path, data, Path(folder) / f"{number}.jsonl", config))
            else:
                both.append(_transformers(path, groups))
    lengths = [len(response) for group in groups for response in group.responses]
    if len(both[0]) != len(both[1]):
        raise UserError(f"{one} and {other} have different tokenizers: they part the sample text in other ways")
    worst = worst_difference(both[0], both[1], lengths, tolerance)
    equal, total, largest, surplus = _tensors(one, other)
    return Verdict(equal, total, largest, surplus, tuple(zip(*both, strict=True)), worst)


def _refuse_other_formats(path: str) -> None:
    """Say what to run first of a directory that neither transformers nor our model computes as it is."""
    supported = "verify compares Hugging Face directories and checkpoints of whole models"
    if torch_dist_directory(path) is not None:
        raise UserError(
            f"{path} is a checkpoint of Megatron-core; {supported}: make one of it by `megadpo convert import {path} OUT "
            "--config HF_DIR` and verify OUT"
        )
    if is_peft_directory(path) or (is_checkpoint(path) and is_adapter(path)):
        raise UserError(f"{path} is an adapter; {supported}: merge it by `megadpo convert merge {path} OUT` and verify OUT")


def worst_difference(first: Sequence[float], second: Sequence[float], lengths: Sequence[int], tolerance: float) -> float:
    """The largest difference of two log-probs of a response, in what is allowed for one of its length; infinite where one is
    not finite."""
    parts = [abs(a - b) / (tolerance * max(length / 10, 1)) for a, b, length in zip(first, second, lengths, strict=True)]
    return max(part if math.isfinite(part) else math.inf for part in parts)


def _rows(texts: Sequence[str] | None) -> list[dict[str, str]]:
    if texts is None:
        return [dict(zip(("prompt", "chosen", "rejected"), sample, strict=True)) for sample in SAMPLES]
    rows = []
    for text in texts:
        words = text.split(" ")
        if len(words) < 4:
            raise UserError(f"--text: {text[:60]!r} has fewer than four words; give longer lines")
        half = len(words) // 2
        chosen = " " + " ".join(words[half:])
        rows.append({"prompt": " ".join(words[:half]), "chosen": chosen, "rejected": " " + " ".join(reversed(words[half:]))})
    return rows


def _ours(path: str, data: Path, out: Path, config: Config) -> list[float]:
    run_logprobs(path, str(data), str(out), config)
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [line[key] for line in found for key in ("chosen_logp", "rejected_logp")]


def _transformers(path: str, groups: Sequence[Group]) -> list[float]:
    from transformers import AutoModelForCausalLM

    open_weights(path)  # what is wrong with the directory is said in a sentence
    with activity(f"loading {path} by transformers"):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, local_files_only=True, attn_implementation="eager"
        ).eval()
    found = []
    with torch.no_grad():
        for group in counted_through(groups, "computing log-probs by transformers", len(groups), "pairs"):
            for number, response in enumerate(group.responses):
                prompt = group.prompts[min(number, len(group.prompts) - 1)]
                ids = torch.tensor([[*map(int, prompt), *map(int, response)]])
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                found.append(float(logps[len(prompt) - 1 :].sum()))
    return found


def _tensors(one: str, other: str) -> tuple[int, int, tuple[float, str] | None, tuple[str, ...]]:
    first, second = open_weights(one), open_weights(other)
    names = sorted({*first.names()} & {*second.names()})
    largest: tuple[float, str] | None = None
    num_equal = 0
    for name in counted_through(names, "comparing", len(names), "tensors"):
        if first.shape(name) != second.shape(name):
            raise UserError(f"{name} is {list(first.shape(name))} in {one} and {list(second.shape(name))} in {other}")
        a, b = (source.read(name, 0, 0, source.shape(name)[0]).float() for source in (first, second))
        if torch.equal(a, b):
            num_equal += 1
            continue
        difference = float((a - b).abs().max())
        if largest is None or difference > largest[0]:
            largest = difference, name
    return num_equal, len(names), largest, tuple(sorted({*first.names()} ^ {*second.names()}))
