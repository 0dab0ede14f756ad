"""Texts -> token ids, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """What ``tokenizer(texts, add_special_tokens=…)["input_ids"]`` is.

    That call also makes masks, and remembers for each token which characters it came from. Where transformers only hands
    the texts to the tokenizers library, they are handed to the library's call that leaves the characters out.
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
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return ids
    library = tokenizer.backend_tokenizer
    # As transformers sets it before every call.
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
