"""A model directory opened for reward modelling: a language model gets a scalar head, a reward model keeps its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.errors import UserError
from megadpo.model.families import HEAD, SCORE, TensorSource, head_of, with_reward_head

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class RewardModel:
    """What a reward model is built from.

    Attributes:
        config: of a ...ForSequenceClassification with one label and a padding token.
        source: its weights, ``score.weight`` among them.
        has_new_head: whether the scalar head was drawn here, since the model had none.
    """

    config: PretrainedConfig
    source: TensorSource
    has_new_head: bool


def as_reward_model(hf_config: PretrainedConfig, source: TensorSource, hf_dir: Path, seed: int) -> RewardModel:
    """The model with a scalar head.

    Args:
        hf_config, source: of a language model or a reward model, checked by `check_tensors`.
        hf_dir: the directory with the tokenizer, whose padding token reward models are given batches with.
        seed: a new head is drawn from it alone: normal, mean 0, deviation `initializer_range` (0.02 where the config
            has none), the same in every layout.
    """
    has_new_head = head_of(hf_config) == "logprobs"
    kept = None if has_new_head else hf_config.pad_token_id
    config = with_reward_head(hf_config, _padding_token(hf_config, hf_dir) if kept is None else kept)
    if not has_new_head:
        return RewardModel(config, source, False)
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(config, "initializer_range", None) or 0.02
    return RewardModel(config, _NewHead(source, torch.randn(1, config.hidden_size, generator=generator) * deviation), True)


def refuse_reward_model(hf_config: PretrainedConfig, model: str) -> None:
    """Raise UserError for a reward model where log-probs are needed; `model` names the setting and the path."""
    if head_of(hf_config) == "reward":
        raise UserError(
            f"{model} is a reward model ({hf_config.architectures[0]}): it has a scalar head and no lm_head, so it gives no "
            "log-probs; give a language model, or set objective.loss_type to reward"
        )


def _padding_token(hf_config: PretrainedConfig, hf_dir: Path) -> int | None:
    """The tokenizer's padding token, else the config's, else the end-of-sequence token: the first that has a row."""
    candidates = [hf_config.pad_token_id, hf_config.eos_token_id]
    if any(hf_dir.glob("tokenizer*")):
        tokenizer = load_tokenizer(str(hf_dir))
        candidates = [tokenizer.pad_token_id, hf_config.pad_token_id, tokenizer.eos_token_id, hf_config.eos_token_id]
    # Llama 3 has a list of end-of-sequence tokens.
    tokens = [token[0] if isinstance(token, list) and token else token for token in candidates]
    return next((token for token in tokens if isinstance(token, int) and 0 <= token < hf_config.vocab_size), None)


class _NewHead:
    """The weights of a language model with a scalar head in place of its lm_head."""

    def __init__(self, source: TensorSource, score_1H: Tensor) -> None:
        self._source = source
        self._score_1H = score_1H

    def names(self) -> Iterable[str]:
        return [*(name for name in self._source.names() if name != HEAD), SCORE]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._score_1H.shape) if name == SCORE else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._score_1H.dtype if name == SCORE else self._source.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        return self._score_1H.narrow(dim, start, length) if name == SCORE else self._source.read(name, dim, start, length)

    def release(self) -> None:
        self._source.release()
