"""Which head a model has: the vocabulary's, for log-probs, or a scalar one, for rewards. Its config's architecture says."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.families.registry import family_of
from megadpo.model.shape import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def head_of(hf_config: PretrainedConfig | dict[str, Any]) -> Head:
    """The head of a model with this transformers config, or dict that config.json holds."""
    get = hf_config.get if isinstance(hf_config, dict) else lambda key: getattr(hf_config, key, None)
    return "reward" if family_of(hf_config).classifier in (get("architectures") or ()) else "logprobs"


def check_head(hf_config: PretrainedConfig) -> None:
    """Refuse a classifier that gives more than one number.

    Raises:
        UserError: num_labels is not 1.
    """
    if head_of(hf_config) == "reward" and hf_config.num_labels != 1:
        raise UserError(
            f"the model is a {family_of(hf_config).classifier} with {hf_config.num_labels} labels (num_labels); "
            "a reward model has one"
        )


def with_reward_head(hf_config: PretrainedConfig, padding_token: int | None) -> PretrainedConfig:
    """A copy of a transformers config that describes a reward model.

    Args:
        padding_token: its pad_token_id, without which transformers takes no batches.

    Raises:
        UserError: transformers has no such reward model.
    """
    config = copy.deepcopy(hf_config)
    classifier = family_of(hf_config).classifier
    if classifier is None:
        raise UserError(f"transformers has no sequence classifier of {hf_config.model_type} models, which a reward model is")
    config.architectures = [classifier]
    config.num_labels = 1
    config.pad_token_id = padding_token
    return config


def untied(hf_config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a transformers config that describes the model with a head of its own."""
    config = copy.deepcopy(hf_config)
    config.tie_word_embeddings = False
    return config


def tying_settings(settings: Mapping[str, Any], has_own_head: bool) -> dict[str, Any]:
    """What config.json says in place of `settings`, the content of the original one, where an adapter has made two matrices
    of one."""
    says_so = settings.get("tie_word_embeddings") is False  # what a config does not say depends on the family
    return {"tie_word_embeddings": False} if has_own_head and not says_so else {}


def head_settings(hf_config: PretrainedConfig) -> dict[str, Any]:
    """What config.json says because of the head, as transformers writes it; nothing of a language model."""
    if head_of(hf_config) == "logprobs":
        return {}
    return {
        "architectures": list(hf_config.architectures),
        "id2label": {str(number): label for number, label in hf_config.id2label.items()},
        "label2id": dict(hf_config.label2id),
        "pad_token_id": hf_config.pad_token_id,
    }
