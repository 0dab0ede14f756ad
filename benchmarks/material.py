"""What the benchmarks run on: preference rows, a tokenizer trained on them, a small Llama, and length mixes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megadpo.data.groups import Group

DATA = Path(os.environ.get("MEGADPO_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
HH_ROWS = DATA / "hh-rlhf-harmless-test.jsonl.gz"

BODY = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
"""A Llama of 25.7 million parameters without its two vocabulary matrices: small, but large enough that matrix products
and not Python decide the time."""
TINY_BODY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def preference_file(directory: Path) -> tuple[Path, str]:
    """A file of hh-rlhf rows, and what it is: the real ones, or made-up ones where those are not at hand."""
    if HH_ROWS.is_file():
        return HH_ROWS, f"hh-rlhf rows ({HH_ROWS.name})"
    return made_up_file(directory, 600), f"made-up dialogues, because {HH_ROWS} is missing (set MEGADPO_TEST_DATA)"


def made_up_file(directory: Path, num_rows: int) -> Path:
    """A file of made-up dialogues."""
    path = directory / "made-up.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _made_up_rows(num_rows)), encoding="utf-8")
    return path


def _made_up_rows(count: int) -> list[dict[str, str]]:
    random = np.random.default_rng(0)
    letters = list("etaoinshrdlu")
    words = ["".join(random.choice(letters, size)) for size in random.integers(2, 8, 400)]

    def say(low: int, high: int) -> str:
        return " ".join(random.choice(words, random.integers(low, high)))

    def dialogue() -> str:
        turns = [f"\n\nHuman: {say(5, 40)}\n\nAssistant: {say(5, 80)}" for _ in range(random.integers(0, 4))]
        return "".join(turns) + f"\n\nHuman: {say(5, 40)}\n\nAssistant:"

    prompts = [dialogue() for _ in range(count)]
    return [{key: f"{prompt} {say(5, 80)}" for key in ("chosen", "rejected")} for prompt in prompts]


def save_tokenizer(directory: Path, rows: Path, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on all texts of the rows, in `directory`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with (gzip.open if rows.suffix == ".gz" else open)(rows, "rt", encoding="utf-8") as lines:
        texts = [row[key] for row in map(json.loads, lines) for key in ("chosen", "rejected")]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(directory)
    return fast


def save_llama(directory: Path, vocab_size: int, body: dict[str, int]) -> int:
    """A random Llama in `directory`; its parameters without embedding and head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=8192, tie_word_embeddings=False, **body)
    config.bos_token_id, config.eos_token_id = 0, 1
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters()) - 2 * vocab_size * config.hidden_size


MIXES = {
    # name: median and spread (of the logarithm) of prompt and completion lengths, and the most of a prompt + completion
    "prompt-heavy": (500, 0.5, 80, 0.6, 1024),
    "UltraFeedback-like": (110, 0.9, 230, 0.6, 1024),
    "hh-rlhf-like": (85, 1.0, 30, 1.0, 1024),
}


def synthetic_groups(mix: str, count: int, vocab_size: int, shrink: float = 1.0, longest: int | None = None) -> list[Group]:
    """Pairs of random tokens with log-normal lengths; `shrink` divides all lengths; `longest` in place of the mix's own."""
    random = np.random.default_rng(7)
    prompt, prompt_spread, completion, completion_spread, own_longest = MIXES[mix]
    longest = longest or own_longest

    def length(median: float, spread: float, most: float) -> int:
        return int(np.clip(random.lognormal(np.log(median / shrink), spread), 4, most / shrink))

    groups = []
    for row in range(count):
        num_prompt = length(prompt, prompt_spread, longest * 0.75)
        sizes = [num_prompt, *(length(completion, completion_spread, longest - num_prompt * shrink) for _ in range(2))]
        shared, *responses = (random.integers(2, vocab_size, size).astype(np.int32) for size in sizes)
        groups.append(Group((shared,), tuple(responses), row))
    return groups
