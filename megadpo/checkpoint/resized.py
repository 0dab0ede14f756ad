"""A model with another number of rows in embedding and head: for tokens that were added, or to leave out rows of none."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.families import HEAD, TensorSource, mtp_names
from megadpo.model.families.common import EMBEDDING
from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS_AT_A_TIME = 4096


class ResizedSource:
    """The tensors of a model with `num_rows` rows in embedding and head, as a TensorSource.

    Rows beyond the model's are the mean of its own, so that a new token is at first as likely as an average one (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021).
    """

    def __init__(self, source: TensorSource, num_rows: int) -> None:
        self._source, self._num_rows = source, num_rows
        self._mean = functools.lru_cache(maxsize=2)(self._mean_of)

    def names(self) -> Iterable[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        return (self._num_rows, *shape[1:]) if name in (EMBEDDING, HEAD) else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        if name not in (EMBEDDING, HEAD):
            return self._source.read(name, dim, start, length)
        stored = self._source.shape(name)[0]
        if dim != 0:
            kept = self._source.read(name, dim, start, length)[: self._num_rows]
            new = self._mean(name)[start : start + length]
        else:
            kept = self._source.read(name, 0, min(start, stored), max(min(start + length, stored) - start, 0))
            new = self._mean(name)
        num_new = (self._num_rows if dim != 0 else length) - len(kept)
        return torch.cat([kept, new.to(kept.dtype).expand(num_new, -1)]) if num_new else kept

    def _mean_of(self, name: str) -> Tensor:
        """[columns], summed in float64."""
        num_rows, columns = self._source.shape(name)
        total = torch.zeros(columns, dtype=torch.float64)
        for start in range(0, num_rows, ROWS_AT_A_TIME):
            count = min(ROWS_AT_A_TIME, num_rows - start)
            total += self._source.read(name, 0, start, count).sum(0, dtype=torch.float64)
        return total / num_rows

    def release(self) -> None:
        self._source.release()


def with_vocabulary(hf_config: PretrainedConfig, num_rows: int, num_tokens: int) -> PretrainedConfig:
    """A copy of a transformers config that says so many rows.

    Args:
        num_tokens: one more than the largest id that the tokenizer makes; 0 where there is no tokenizer.

    Raises:
        UserError: fewer than the tokenizer's tokens.
    """
    if num_rows < max(num_tokens, 1):
        raise UserError(
            f"--resize-vocabulary is {num_rows}, but the tokenizer makes {num_tokens} ids; give as many at least"
        )
    config = copy.deepcopy(hf_config)
    config.vocab_size = num_rows
    return config


def refuse_rows_elsewhere(source: TensorSource, shape: ModelShape) -> None:
    """Refuse multi-token prediction's own embedding and head, which go through as they are: their rows would be too few.

    Raises:
        UserError: naming the first.
    """
    for name in mtp_names(shape.num_layers, source.names()):
        if shape.vocab_size in source.shape(name):
            raise UserError(
                f"--resize-vocabulary is for models without an embedding or head of multi-token prediction, and {name} has "
                f"{shape.vocab_size} rows, which would stay; leave it out, or remove these tensors from the model"
            )
