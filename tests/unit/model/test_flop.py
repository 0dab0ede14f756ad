"""What a step has to compute, counted by hand on small models, and the peaks of cards by the names that torch gives them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.flop import useful_flop
from megadpo.config.schema import AdapterConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.adapters.spec import adapter_shapes, resolve
from megadpo.model.families import shape_of
from megadpo.model.flop import AdapterWork, Work, body_parameters, peak_flop
from tests.helpers.families import config_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_card_is_known_by_its_name(name: str, tflops: float) -> None:
    assert peak_flop(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["Tesla P4", "NVIDIA A1000", "CPU", "NVIDIA L400"])
def test_a_card_that_is_not_known_has_no_peak(name: str) -> None:
    assert peak_flop(name) is None


def groups_of(*lengths: tuple[int, ...]) -> list[Group]:
    return [
        Group((np.zeros(prompt, np.int32),), tuple(np.zeros(n, np.int32) for n in answers), 0)
        for prompt, *answers in lengths
    ]


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 3), (None, 4)])
def test_attention_is_counted_pair_by_pair(window: int | None, chunk: int | None) -> None:
    groups = groups_of((4, 3, 5), (0, 2, 6))
    pairs = sum(
        1
        for group in groups
        for number, response in enumerate(group.responses)
        for query in range(len(group.prompts[0]) + len(response))
        for key in range(query + 1)
        if (window is None or query - key < window) and (number == 0 or query >= len(group.prompts[0]))
        if chunk is None or query // chunk == key // chunk
    )
    shape = shape_of(config_of("llama"))
    shape = replace(shape, windows=(window,) * shape.num_layers, chunks=(chunk,) * shape.num_layers)
    work = Work.of(GroupStore.of(groups), shape)
    _, attention = work.forward(shape, np.arange(2))
    assert attention == 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def test_products_are_two_flop_a_parameter_and_token_three_times_with_backward() -> None:
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    shape = shape_of(config)
    model = AutoModelForCausalLM.from_config(config)
    body = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
    assert body_parameters(shape) == body
    work = Work.of(GroupStore.of(groups_of((4, 3, 5), (7, 2, 6))), shape)
    products, attention = work.forward(shape, np.array([1]))
    assert products == 2 * body * 15 + 2 * shape.hidden_size * shape.vocab_size * 8
    assert work.step(shape, None, np.array([1]), None) == 3 * (products + attention)
    assert work.step(shape, shape, np.array([1]), None) == 4 * (products + attention)
    adapter = resolve(AdapterConfig(kind="lora", rank=3), shape)
    numbers = sum(map(math.prod, adapter_shapes(shape, adapter).values()))
    assert (
        work.step(shape, None, np.array([1]), AdapterWork.of(shape, adapter))
        == 2 * products + 3 * attention + 6 * numbers * 15
    )


def test_the_benchmarks_count_what_a_run_counts() -> None:
    config = config_of("llama")
    shape, groups = shape_of(config), groups_of((4, 3, 5), (0, 2, 6))
    assert shape.num_heads * shape.head_dim == shape.hidden_size
    of_run = Work.of(GroupStore.of(groups), shape).step(shape, shape, np.arange(2), None)
    assert useful_flop(groups, config, body_parameters(shape), live_reference=True) == of_run


def test_linear_attention_counts_what_its_definition_does_with_a_state_and_sees_no_pairs() -> None:
    from transformers import AutoModelForCausalLM

    config = config_of("qwen3_next", mlp_only_layers=[0, 1, 2, 3])
    shape, groups = shape_of(config), groups_of((4, 3, 5), (7, 2, 6))
    body = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).model.layers.parameters() if p.dim() == 2)
    work, full = Work.of(GroupStore.of(groups), shape), replace(shape, linear=None)
    products, attention = work.forward(shape, np.array([1]))
    assert products == 2 * body * 15 + 2 * shape.hidden_size * shape.vocab_size * 8
    linear, num_linear = config, 2
    heads, state = linear.linear_num_value_heads, linear.linear_key_head_dim * linear.linear_value_head_dim
    columns = 2 * linear.linear_num_key_heads * linear.linear_key_head_dim + heads * linear.linear_value_head_dim
    of_token = num_linear * (6 * heads * state + 2 * linear.linear_conv_kernel_dim * columns)
    assert attention == work.forward(full, np.array([1]))[1] / 2 + 15 * of_token
    assert work.step(shape, None, np.array([1]), None) == 3 * (products + attention)


@pytest.mark.parametrize("tied", [False, True])
def test_of_modules_that_are_trained_whole_the_head_is_a_product_of_scored_tokens_and_the_embedding_none(tied: bool) -> None:
    shape = replace(shape_of(config_of("llama")), tied_embeddings=tied)
    work, group = Work.of(GroupStore.of(groups_of((7, 2, 6))), shape), np.array([0])

    def added(*modules: str) -> float:
        adapters = [AdapterConfig(kind="lora", rank=3, modules_to_save=list(names)) for names in (modules, ())]
        trained = [AdapterWork.of(shape, resolve(options, shape)) for options in adapters]
        with_them, without = (work.step(shape, None, group, each) for each in trained)
        return with_them - without

    head = 2 * shape.hidden_size * shape.vocab_size * 8
    assert added("norm") == 0 and added("embed_tokens") == (head if tied else 0)
    if not tied:
        assert added("lm_head") == added("embed_tokens", "lm_head") == head


def test_of_a_mixture_the_adapters_of_a_token_s_experts_count() -> None:
    shape = shape_of(config_of("mixtral"))
    assert shape.experts is not None
    adapter = resolve(AdapterConfig(kind="lora", rank=3), shape)
    numbers = {name: math.prod(size) for name, size in adapter_shapes(shape, adapter).items()}
    of_experts = sum(number for name, number in numbers.items() if ".experts." in name)
    assert of_experts > 0
    met = sum(numbers.values()) - of_experts + of_experts * shape.experts.per_token / shape.experts.count
    assert AdapterWork.of(shape, adapter) == AdapterWork(pytest.approx(met), 0, has_whole_head=False)


def test_an_adapter_of_the_head_is_met_by_scored_tokens() -> None:
    shape = shape_of(config_of("llama"))
    adapter = resolve(AdapterConfig(kind="lora", rank=3, target_modules=["lm_head"]), shape)
    assert AdapterWork.of(shape, adapter) == AdapterWork(0, 3 * (shape.hidden_size + shape.vocab_size), False)


def test_of_an_adapter_of_the_embedding_a_token_meets_b_and_looks_a_up() -> None:
    shape = shape_of(config_of("llama"))
    adapter = resolve(AdapterConfig(kind="lora", rank=3, target_modules=["embed_tokens"]), shape)
    assert AdapterWork.of(shape, adapter) == AdapterWork(3 * shape.hidden_size, 0, False)


def test_of_a_mixture_the_experts_of_a_token_count() -> None:
    shape = shape_of(config_of("mixtral"))
    experts = shape.experts
    assert experts is not None
    every = 3 * shape.hidden_size * experts.columns
    one_more = replace(shape, experts=replace(experts, per_token=experts.per_token + 1))
    assert body_parameters(one_more) - body_parameters(shape) == every * len(experts.layers)
