"""The number of parameters that `plan` reckons with is that of the tensors which a rank holds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megadpo.model.families import ExpertPlace, shape_of, shard_parameters
from megadpo.model.moe.layer import is_expert
from megadpo.parallel.layout import Layout
from megadpo.planning.plan import parameters_of
from tests.helpers.families import config_of
from tests.helpers.models import PREFIXES

MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "qwen2_moe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
    "llama4_text",
    "qwen3_next",
)
DENSE: dict[str, dict[str, Any]] = {
    **{family: {} for family in PREFIXES if family not in MIXTURES},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "deepseek_v2-dense": {"first_k_dense_replace": 4},
    "qwen3_next-dense": {"mlp_only_layers": [0, 1, 2, 3], "attention_bias": True},
    "cohere-normed": {"use_qk_norm": True, "attention_bias": True},
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("num_tensor", [1, 2])
def test_a_rank_holds_as_many_numbers_as_are_reckoned_with(name: str, num_tensor: int) -> None:
    shape = shape_of(config_of(name.split("-")[0], tie_word_embeddings=False, **DENSE[name]))
    shards = shard_parameters(
        shape, tensor_rank=0, num_tensor=num_tensor, layers=range(4), has_embedding=True, has_head=True
    )
    held = sum(math.prod(shard.shape) for shard in shards)
    layout = Layout(tensor=num_tensor, sequence=num_tensor > 1)
    assert parameters_of(shape, layout, 0) == (held, 0)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("num_tensor", "num_expert", "num_expert_tensor"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_a_rank_with_experts_does_so_too(name: str, num_tensor: int, num_expert: int, num_expert_tensor: int) -> None:
    shape = shape_of(config_of(name, tie_word_embeddings=False))
    shards = shard_parameters(
        shape,
        tensor_rank=0,
        num_tensor=num_tensor,
        layers=range(4),
        has_embedding=True,
        has_head=True,
        expert_place=ExpertPlace(0, num_expert, 0, num_expert_tensor),
    )
    numbers = {shard.name: math.prod(shard.shape) for shard in shards}
    of_experts = sum(number for name, number in numbers.items() if is_expert(name))
    layout = Layout(tensor=num_tensor, sequence=num_tensor > 1, expert=num_expert, expert_tensor=num_expert_tensor)
    assert parameters_of(shape, layout, 0) == (sum(numbers.values()) - of_experts, of_experts)
