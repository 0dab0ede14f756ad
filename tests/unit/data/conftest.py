"""Rows and tokenizers of the data tests: real rows where they are at hand, real tokenizers trained here."""

from __future__ import annotations

import gzip
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.data.rows.dataset import prepare_groups
from megadpo.data.store import GroupStore

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _data_folder() -> Path:
    return Path(os.environ.get("MEGADPO_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")


@pytest.fixture(scope="session")
def hh_rows() -> list[dict[str, str]]:
    """Raw hh-rlhf rows: the real ones, or generated ones with the same oddities where those are not at hand."""
    file = _data_folder() / "hh-rlhf-harmless-test.jsonl.gz"
    if file.exists():
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    warnings.warn(f"{file} is not there (MEGADPO_TEST_DATA): generated hh-rlhf-like rows are used instead", stacklevel=1)
    return [_generated_row(random.Random(number), number) for number in range(2312)]


def _generated_row(rng: random.Random, number: int) -> dict[str, str]:
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("", "n", "’s", "r")]
    words = [one + other for one in syllables[::3] for other in ("", "lo", "ting,", "me?", "ver.")]

    def say(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, most)))

    turns = [f"\n\nHuman: {say(30)}\n\nAssistant: {say(60)}" for _ in range(max(rng.randint(-3, 5), 0))]
    dialogue = "".join(turns) + f"\n\nHuman: {say(6)}\n\nAssistant:"
    chosen = "" if number % 578 == 86 else f" {say(80)}"
    other = dialogue.replace("\n\nHuman:", "\n\nHuman: well,") if number % 462 == 300 else dialogue
    return {"chosen": dialogue + chosen, "rejected": f"{other} {say(80)}"}


@pytest.fixture(scope="session")
def sharegpt_rows() -> list[dict[str, Any]]:
    """ShareGPT rows, Chinese: the real ones, or a few written ones where those are not at hand."""
    file = _data_folder() / "dpo_zh_demo.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    warnings.warn(f"{file} is not there (MEGADPO_TEST_DATA): written ShareGPT rows are used instead", stacklevel=1)
    human = [{"from": "human", "value": f"第{n}个问题：天空是什么颜色？"} for n in range(40)]
    return [
        {
            "conversations": [turn],
            "chosen": {"from": "gpt", "value": f"蓝色 {n}。"},
            "rejected": {"from": "gpt", "value": f"绿色 {n}！"},
        }
        for n, turn in enumerate(human)
    ]


@pytest.fixture(scope="session")
def labelled_rows() -> list[dict[str, Any]]:
    """Rows of `messages` and `label`, English: the real ones, or written ones where those are not at hand."""
    file = _data_folder() / "kto_en_demo.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    warnings.warn(f"{file} is not there (MEGADPO_TEST_DATA): written labelled rows are used instead", stacklevel=1)
    rows = []
    for number in range(300):
        asked = [{"role": "user", "content": f"What is {number} plus one?"}]
        if number % 4 == 0:
            asked += [{"role": "assistant", "content": "Pardon?"}, {"role": "user", "content": "Please."}]
        answer = {"role": "assistant", "content": f"It is {number + 1 + number % 2}."}
        rows.append({"messages": [*asked, answer], "label": number % 2 == 0})
    return rows


def _byte_level_bpe(hh_rows: list[dict[str, str]], lines_are_words: bool) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if lines_are_words:
        lines = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["chosen"] for row in hh_rows[:400]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory, hh_rows: list[dict[str, str]]) -> str:
    """A byte-level BPE of words that adds no BOS, as GPT-2's and Qwen's, with a ChatML template."""
    return _saved(_byte_level_bpe(hh_rows, lines_are_words=False), tmp_path_factory)


@pytest.fixture(scope="session")
def merging_dir(tmp_path_factory: pytest.TempPathFactory, hh_rows: list[dict[str, str]]) -> str:
    """A byte-level BPE with merges across words, so that tokens straddle the boundary ("Assistant: I" is one token)."""
    return _saved(_byte_level_bpe(hh_rows, lines_are_words=True), tmp_path_factory)


@pytest.fixture(scope="session")
def bos_dir(tmp_path_factory: pytest.TempPathFactory, bpe_dir: str) -> str:
    """The same tokenizer, made to begin every text with BOS, without a chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(bpe_dir)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    fast.chat_template = None
    return _saved(fast, tmp_path_factory)


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory, hh_rows: list[dict[str, str]]) -> str:
    """A Llama-style directory that has nothing but a SentencePiece tokenizer.model."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for row in hh_rows[:300] for line in row["chosen"].split("\n") if line),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def _saved(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def hh_pairs(
    hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path_factory: pytest.TempPathFactory, write_jsonl: Any
) -> GroupStore:
    """The groups of all hh-rlhf rows by the default options, made once."""
    folder = tmp_path_factory.mktemp("hh")
    options = DataConfig(cache_dir=str(folder / "cache"), num_workers=1)
    return prepare_groups(options, write_jsonl(folder / "hh.jsonl", hh_rows), bpe_dir).groups


@pytest.fixture
def options(tmp_path: Path) -> DataConfig:
    """Data options with a cache of the test's own, tokenising in this process."""
    return DataConfig(cache_dir=str(tmp_path / "cache"), num_workers=1)


@pytest.fixture(scope="session")
def write_jsonl() -> Any:
    """write_jsonl(path, rows) -> the path as text."""

    def write(path: Path, rows: list[Any]) -> str:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
        return str(path)

    return write
