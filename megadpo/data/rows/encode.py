"""Texts -> token ids, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """``tokenizer(texts, add_special_tokens=…)["input_ids"]``, faster.

    The tokenizer's call also makes masks, every token's text and its character offsets. Where transformers only passes the
    texts on to the tokenizers library, the library's batch call without these is used instead.
    """
    if not texts:
        return []
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    is_plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    if not is_plain:
        options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
        return ids
    # An ordinary call for one text sets the library's options (truncation, padding, special tokens).
    tokenizer(texts[0], add_special_tokens=add_special_tokens)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]
