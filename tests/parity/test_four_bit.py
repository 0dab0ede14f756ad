"""Adapters on a base in 4 bits compute what PEFT computes on transformers' model in 4 bits, wherever the same blocks are
quantised: in every layout that leaves matrices whole, and with plain scales where no block is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megadpo.checkpoint.hf import read_hf_config
from megadpo.config.schema import ModelConfig, PipelineScheduleConfig
from megadpo.model.activations import Activations
from megadpo.model.families import logical_shapes, shape_of
from megadpo.parallel.layout import Layout
from tests.helpers import oracle, peft_oracle
from tests.helpers.marks import all_but_the_first_slow
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.adapter_worker import Adapted, Case, outcomes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
"""Half a row of every matrix is a whole number of blocks of 64."""

STAGES = Layout(pipeline=2)
WHOLE_MATRICES = {
    1: [
        Case(),
        Case(memory=Activations("full")),
        Case(memory=Activations("small")),
        Case(offload="cpu"),
        Case(zero_stage=0),
        Case(dtype=torch.bfloat16),
    ],
    2: [
        Case(STAGES),
        Case(STAGES, schedule=PipelineScheduleConfig(name="1f1b", reference="interleaved")),
        Case(Layout(pipeline=2), memory=Activations("full")),
        Case(Layout(data=2)),
        Case(Layout(data=2), zero_stage=2),
        Case(Layout(context=2, context_method="allgather")),
    ],
}
CUT_MATRICES = {
    1: [Case()],
    2: [Case(Layout(tensor=2)), Case(Layout(tensor=2, sequence=True)), Case(Layout(tensor=2, sequence=True), zero_stage=1)],
}
KINDS: dict[str, tuple[str, dict[str, Any], ModelConfig, dict[int, list[Case]]]] = {
    "double, biases, some modules": (
        "qwen2",
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["norm"]},
        ModelConfig(quantization="nf4"),
        WHOLE_MATRICES,
    ),
    "plain scales": (
        "llama",
        {"target_modules": ALL},
        ModelConfig(quantization="nf4", double_quantization=False),
        CUT_MATRICES,
    ),
    "double, DoRA": ("qwen3", {"target_modules": ALL, "use_dora": True}, ModelConfig(quantization="nf4"), {1: [Case()]}),
}
"""Family, the adapters' options, how the base is held, and the ways to train them."""


@pytest.fixture(scope="module", params=all_but_the_first_slow(KINDS))
def measured(request, tmp_path_factory):
    """What PEFT says of a step, what every case says, and the model."""
    from transformers import BitsAndBytesConfig

    family, options, built, cases = KINDS[request.param]
    model = save_model(tmp_path_factory.mktemp("four_bit") / "model", family, tokenizer=False, **SIZES)
    groups = random_groups(8)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=built.double_quantization,
        bnb_4bit_compute_dtype=torch.float32,
    )
    adapted = peft_oracle.adapted_model(model, quantization=quantization, r=16, lora_alpha=32.0, **options)
    with adapted.disable_adapter():
        reference = oracle.all_logps(adapted, groups)
    loss, _ = oracle.dpo_step(adapted, groups, reference, 0.1)
    expected = loss, peft_oracle.gradients(adapted), reference
    ours = Adapted(model, options, peft_oracle.adapter_tensors(adapted), built=built)
    found = [
        pair
        for num_processes, some in cases.items()
        for pair in zip(some, run_world(num_processes, outcomes, ours, groups, some, 2)[0], strict=True)
    ]
    return expected, found, model, built


def test_loss_and_every_gradient_equal_peft_in_4_bits(measured):
    (loss, gradients, _), found, _, _ = measured
    for case, outcome in found:
        if case.dtype is torch.bfloat16:
            assert outcome.loss == pytest.approx(loss, rel=0.02), str(case)
            continue
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"


def test_the_reference_is_the_quantised_model_before_and_after_training(measured):
    (_, _, reference), found, model, _ = measured
    dense = float(oracle.all_logps(oracle.load(model), random_groups(8)).sum())
    assert abs(dense - float(reference.sum())) > 1e-3 * abs(dense)  # 4 bits do change it
    for case, outcome in found:
        assert torch.equal(outcome.off, outcome.before), str(case)
        if len(outcome.before) == reference.numel():
            tolerance = 1e-5 if case.dtype is torch.float32 else 0.01
            assert float(outcome.before.sum()) == pytest.approx(float(reference.sum()), rel=tolerance), str(case)


def test_the_base_takes_half_a_byte_a_weight_and_its_scales(measured):
    """Scales: a byte for 64 weights and 4 for 256 bytes of these, and 4 a matrix; 4 bytes for 64 where they are plain."""
    _, found, model, built = measured
    shapes = {name: math.prod(size) for name, size in logical_shapes(shape_of(read_hf_config(model))).items()}
    sizes = [size for name, size in shapes.items() if "proj.weight" in name]
    others = sum(size for name, size in shapes.items() if "proj.weight" not in name)
    expected = sum(
        n // 2 + (n // 64 + 4 * math.ceil(n // 64 / 256) + 4 if built.double_quantization else n // 64 * 4) for n in sizes
    )
    for case, outcome in found:
        num_parts = case.layout.tensor * case.layout.pipeline
        assert outcome.num_four_bit_bytes == pytest.approx(expected / num_parts, rel=1e-12), str(case)
        assert outcome.num_frozen_bytes <= 4 * others, str(case)  # nothing of the matrices is left


@pytest.mark.slow
def test_experts_in_4_bits_are_those_of_their_matrices_made_dense(tmp_path):
    """Transformers holds experts in one tensor, which bitsandbytes leaves as it is: the oracle has what 4 bits leave of each
    matrix in its place, and gradients by the chain rule."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = save_model(tmp_path / "model", "mixtral", tokenizer=False, num_hidden_layers=2)
    groups, options = random_groups(8), {"target_modules": ["w1", "w2", "w3", "q_proj", "o_proj"], "rank": 4, "alpha": 2.0}
    torch.manual_seed(1)
    sizes = peft_oracle.shapes_of(model, options)
    tensors = {name: torch.randn(size) * (0.1 if "lora_A" in name else 0.02) for name, size in sizes.items()}
    plain, changed = oracle.load(model), oracle.load(model)
    for each in (plain, changed):
        named = oracle.in_files({name: p.data for name, p in each.named_parameters()}, each.config)
        for name, values in named.items():
            if name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
                packed = quantize_4bit(values.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
                values.copy_(dequantize_4bit(*packed))
    reference = oracle.all_logps(plain, groups)
    peft_oracle.add_to_matrices(changed, tensors, 0.5)
    loss, whole = oracle.dpo_step(changed, groups, reference, 0.1)
    gradients = peft_oracle.chain_rule(whole, tensors, 0.5)
    ours = Adapted(model, options, tensors, built=ModelConfig(quantization="nf4"))
    for num_processes, case in ((1, Case()), (2, Case(Layout(data=2, expert=2)))):
        (outcome,) = run_world(num_processes, outcomes, ours, groups, [case], 1)[0]
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
