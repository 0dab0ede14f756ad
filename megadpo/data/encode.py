"""Texts -> token ids, many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """What ``tokenizer(texts, add_special_tokens=…)["input_ids"]`` is, without the masks that come with it."""
    if not texts:
        return []
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    return ids
