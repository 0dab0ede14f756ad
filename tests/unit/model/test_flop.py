"""What a step has to compute, counted by hand on small models, and the peaks of cards by the names that torch gives them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.model.families import shape_of
from megadpo.model.flop import Work, body_parameters, peak_flop
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


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_counted_pair_by_pair(window: int | None) -> None:
    groups = groups_of((4, 3, 5), (0, 2, 6))
    pairs = sum(
        1
        for group in groups
        for number, response in enumerate(group.responses)
        for query in range(len(group.prompts[0]) + len(response))
        for key in range(query + 1)
        if (window is None or query - key < window) and (number == 0 or query >= len(group.prompts[0]))
    )
    shape = shape_of(config_of("llama"))
    shape = replace(shape, windows=(window,) * shape.num_layers)
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
    assert work.step(shape, None, np.array([1]), 100) == 2 * products + 3 * attention + 600 * 15


def test_of_a_mixture_the_experts_of_a_token_count() -> None:
    shape = shape_of(config_of("mixtral"))
    experts = shape.experts
    assert experts is not None
    every = 3 * shape.hidden_size * experts.columns
    one_more = replace(shape, experts=replace(experts, per_token=experts.per_token + 1))
    assert body_parameters(one_more) - body_parameters(shape) == every * len(experts.layers)
