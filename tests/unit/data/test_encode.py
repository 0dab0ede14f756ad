"""Many texts at once: the ids are those that transformers gives, whichever call makes them."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megadpo.data.rows.encode import encode
from megadpo.data.rows.templates import Conversation, render_all, render_ids
from megadpo.data.rows.tokenise import load_tokenizer

TEXTS = ["Hello there.", "", "a b  c\n\nHuman: 天空", "<s>twice</s></s>", "x" * 300]


@pytest.mark.parametrize("directory", ["bpe_dir", "bos_dir"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_texts_get_the_ids_of_the_tokenizers_own_call(
    directory: str, add_special_tokens: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    expected = tokenizer(TEXTS, add_special_tokens=add_special_tokens)["input_ids"]
    assert encode(tokenizer, TEXTS, add_special_tokens) == expected
    tokenizer(TEXTS, truncation=True, max_length=3)  # leaves its settings behind
    assert encode(tokenizer, TEXTS, add_special_tokens) == expected
    tokenizer.split_special_tokens = True
    assert encode(tokenizer, TEXTS) == tokenizer(TEXTS)["input_ids"]
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE with byte fallback", "WordLevel"])
def test_every_kind_of_tokenizer_gives_the_ids_of_its_own_call(kind: str) -> None:
    library = _trained(kind)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<|turn|>", lstrip=True, rstrip=True), "Human"])
    texts = [*TEXTS, " <|turn|> Human: hello <unk> there", "there\u0301 are  HELLOS\n"]
    for add_special_tokens in (True, False):
        expected = [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]
        assert encode(tokenizer, texts, add_special_tokens) == expected
        assert any(expected)


def _trained(kind: str) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    bytes_too = [f"<0x{value:02X}>" for value in range(256)]
    library, trainer = {
        "WordPiece": (Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(special_tokens=special)),
        "Unigram": (Tokenizer(models.Unigram()), trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>")),
        "BPE with byte fallback": (
            Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)),
            trainers.BpeTrainer(special_tokens=special + bytes_too),
        ),
        "WordLevel": (Tokenizer(models.WordLevel(unk_token="<unk>")), trainers.WordLevelTrainer(special_tokens=special)),
    }[kind]
    trainer.show_progress = False
    library.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.Whitespace() if kind.startswith("Word") else pre_tokenizers.Metaspace()
    library.train_from_iterator(TEXTS * 3, trainer)
    if kind == "WordPiece":
        library.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    else:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return library


def test_a_tokenizer_with_a_call_of_its_own_is_called_by_it(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)

    class Own(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, texts: Any, **options: Any) -> Any:
            return {"input_ids": [[len(text)] for text in texts]}

    tokenizer.__class__ = Own
    assert encode(tokenizer, TEXTS) == [[len(text)] for text in TEXTS]


def test_conversations_rendered_together_are_those_rendered_one_by_one(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    turns = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Blue. 天"}]
    conversations = [
        Conversation(turns[:1], "f:1", {}, True),
        Conversation(turns, "f:1", {}),
        Conversation(turns * 2, "f:2", {}),
        Conversation(turns[:1], "f:3", {"name": "Ann"}, True),
        Conversation(turns[:1] * 3, "f:4", {}, True),
    ]
    one_by_one = [render_ids(tokenizer, c.messages, c.location, c.kwargs, c.is_prompt) for c in conversations]
    assert render_all(tokenizer, conversations) == one_by_one

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            return {"input_ids": [len(messages)]}

    tokenizer.__class__ = Own
    assert render_all(tokenizer, conversations) == [[1], [2], [4], [1], [3]]
