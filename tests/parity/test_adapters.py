"""Adapters compute what PEFT computes on plain transformers, in every layout and engine; off, they are not there."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.config.schema import PipelineScheduleConfig
from megadpo.data.groups import Group
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers import oracle, peft_oracle
from tests.helpers.marks import all_but_the_first_slow
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.adapter_worker import Adapted, AdapterOutcome, Case, outcomes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OWN = functools.partial(PipelineScheduleConfig, name="1f1b")
STAGES = Layout(pipeline=2)
EXPERTS, TENSOR = Layout(data=2, expert=2), Layout(tensor=2, sequence=True)
SHARED = Layout(tensor=2, sequence=True, expert_tensor=2)
EVERY_WAY = {
    1: [
        Case(),
        Case(memory=Activations("full")),
        Case(memory=Activations("selective")),
        Case(memory=Activations("small")),
        Case(memory=Activations(offload="disk", offload_dir=Path(tempfile.gettempdir()))),
        Case(offload="cpu"),
        Case(zero_stage=0),
    ],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(tensor=2, sequence=True), memory=Activations("full")),
        Case(STAGES),
        Case(STAGES, memory=Activations("full")),
        Case(Layout(pipeline=2, virtual=2)),
        Case(STAGES, schedule=OWN()),
        Case(STAGES, schedule=OWN(reference="interleaved")),
        Case(STAGES, schedule=OWN(zero_bubble=True)),
        Case(STAGES, schedule=OWN(split_pairs=True)),
        Case(Layout(context=2, context_method="allgather")),
        Case(Layout(data=2)),
        Case(Layout(data=2), overlap=True),
        Case(Layout(data=2), fusion=True),
        Case(Layout(data=2), zero_stage=1),
        Case(Layout(data=2), zero_stage=2),
        Case(Layout(data=2), zero_stage=3),
        Case(Layout(tensor=2, sequence=True), zero_stage=2),
    ],
    4: [Case(Layout(tensor=2, pipeline=2, sequence=True)), Case(Layout(tensor=2, data=2), zero_stage=3)],
}
OFTEN_WAYS = {
    1: [
        Case(),
        Case(memory=Activations("full")),
        Case(memory=Activations("small")),
        Case(memory=Activations(offload="disk", offload_dir=Path(tempfile.gettempdir()))),
        Case(offload="cpu"),
    ],
    2: [
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(pipeline=2, virtual=2)),
        Case(STAGES, schedule=OWN(reference="interleaved")),
        Case(STAGES, schedule=OWN(zero_bubble=True)),
        Case(STAGES, schedule=OWN(split_pairs=True)),
        Case(Layout(context=2, context_method="allgather")),
        Case(Layout(data=2), overlap=True),
        Case(Layout(data=2), zero_stage=2),
        Case(Layout(data=2), zero_stage=3),
    ],
}
"""Of these, each time."""
SOME_WAYS = {
    1: [Case()],
    2: [Case(Layout(tensor=2)), Case(Layout(tensor=2, sequence=True)), Case(STAGES)],
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[int, list[Case]]]] = {
    "biases, some modules, rank-stabilised": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True, "rank": 6},
        SOME_WAYS,
    ),
    "tied, norms of heads, DoRA": (
        "qwen3",
        {"tie_word_embeddings": True},
        {"target_modules": ALL, "use_dora": True},
        SOME_WAYS,
    ),
    "biases, DoRA on some modules": (
        "qwen2",
        {},
        {"target_modules": ["k_proj", "o_proj", "down_proj"], "use_dora": True, "use_rslora": True, "alpha": 4.0},
        SOME_WAYS,
    ),
    "windows, one layer, head and norms whole": (
        "mistral",
        {},
        {
            "target_modules": ["gate_proj", "down_proj"],
            "layers_to_transform": [0, 1],
            "modules_to_save": ["lm_head", "norm"],
        },
        SOME_WAYS,
    ),
    "many ways": ("llama", {"num_hidden_layers": 4}, {"target_modules": ALL}, OFTEN_WAYS),
}
"""Family, changes to the model, the adapters' options, and the ways to train them."""

OF_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[int, list[Case]]]] = {
    "tensors of several projections": (
        "phi3",
        {"tie_word_embeddings": True},
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "use_dora": True, "rank": 6},
        {1: [Case()], 2: [Case(Layout(tensor=2, sequence=True)), Case(Layout(data=2), zero_stage=3)]},
    ),
    "latents": (
        "deepseek_v3",
        {"first_k_dense_replace": 2},
        {
            "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
            "use_dora": True,
            "rank": 6,
        },
        {1: [Case()], 2: [Case(Layout(tensor=2)), Case(Layout(tensor=2, sequence=True))]},
    ),
    "biases of all, factors": (
        "granite",
        {"attention_bias": True, "mlp_bias": True},
        {"target_modules": ["o_proj", "up_proj", "down_proj", "lm_head"], "use_dora": False},
        {1: [Case()], 2: [Case(Layout(tensor=2, sequence=True)), Case(Layout(data=2), zero_stage=3)]},
    ),
    "linear attention, gates": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]},
        {"target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "v_proj"], "use_dora": True, "rank": 6},
        {
            1: [Case()],
            2: [Case(Layout(tensor=2)), Case(Layout(tensor=2, sequence=True)), Case(Layout(data=2), zero_stage=3)],
        },
    ),
    "norms after rope, attention in chunks": (
        "llama4_text",
        {"moe_layers": []},
        {"target_modules": ALL, "use_dora": True, "modules_to_save": ["norm"]},
        {1: [Case()], 2: [Case(Layout(tensor=2, sequence=True)), Case(STAGES)]},
    ),
    "every way": ("llama", {"num_hidden_layers": 4}, {"target_modules": ALL}, EVERY_WAY),
}
"""The same of models whose layers are other ones, and all ways."""

OF_VOCABULARY = {
    1: [Case(), Case(memory=Activations("full")), Case(offload="cpu"), Case(zero_stage=0)],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(STAGES),
        Case(STAGES, schedule=OWN(zero_bubble=True)),
        Case(STAGES, schedule=OWN(reference="interleaved")),
        Case(Layout(context=2, context_method="allgather")),
        Case(Layout(data=2), overlap=True),
        Case(Layout(data=2), zero_stage=1),
        Case(Layout(data=2), zero_stage=3),
    ],
}
ENDS = {
    "embedding": ["embed_tokens", "down_proj"],
    "head": ["lm_head", "q_proj"],
    "embedding and head": ["embed_tokens", "lm_head"],
}
VOCABULARY = {
    f"{name}, {'tied' if tied else 'untied'}": (
        "qwen2",
        {"tie_word_embeddings": tied},
        {"target_modules": modules, "use_rslora": tied, "rank": 5},
        OF_VOCABULARY,
    )
    for tied in (False, True)
    for name, modules in ENDS.items()
}
"""The same with adapters of matrices of the vocabulary, which two ranks cannot share alike."""
BOTH_ENDS = {
    "both ends, untied": (
        *VOCABULARY["embedding and head, untied"][:3],
        {1: [Case(), Case(offload="cpu")], 2: [OF_VOCABULARY[2][n] for n in (1, 3, 5, 8)]},
    ),
    "both ends, tied": (
        *VOCABULARY["embedding and head, tied"][:3],
        {1: [Case(), Case(memory=Activations("full"))], 2: [OF_VOCABULARY[2][n] for n in (0, 2, 4, 6)]},
    ),
}
"""Of these, each time: each way with one of two models."""


@pytest.fixture(
    scope="module",
    params=[
        *all_but_the_first_slow(KINDS),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in BOTH_ENDS),
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in (*OF_FAMILIES, *VOCABULARY)),
    ],
)
def measured(request, tmp_path_factory):
    """What PEFT says of a step, and what every case says."""
    family, changes, options, cases = (KINDS | BOTH_ENDS | OF_FAMILIES | VOCABULARY)[request.param]
    changes = {"num_hidden_layers": 2, **changes}
    model = save_model(tmp_path_factory.mktemp("adapters") / "model", family, tokenizer=False, **changes)
    groups = random_groups(8)
    renamed = {"rank": "r", "alpha": "lora_alpha"}
    settings = {"rank": 16, "alpha": 32.0, **options}
    adapted = peft_oracle.adapted_model(model, **{renamed.get(name, name): value for name, value in settings.items()})
    with adapted.disable_adapter():
        reference = oracle.all_logps(adapted, groups)
    loss, _ = oracle.dpo_step(adapted, groups, reference, 0.1)
    expected = loss, peft_oracle.gradients(adapted), reference
    return expected, in_every_case(Adapted(model, options, peft_oracle.adapter_tensors(adapted)), groups, cases, 2)


def in_every_case(
    adapted: Adapted, groups: Sequence[Group], cases: dict[int, list[Case]], num_steps: int
) -> list[tuple[Case, AdapterOutcome]]:
    """Each case and what it gave, those with the same number of processes from one world."""
    return [
        pair
        for num_processes, some in cases.items()
        for pair in zip(some, run_world(num_processes, outcomes, adapted, groups, some, num_steps)[0], strict=True)
    ]


def test_loss_and_every_gradient_equal_peft(measured):
    (loss, gradients, _), found = measured
    norm = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
    for case, outcome in found:
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)


def test_the_reference_is_the_model_without_adapters_before_and_after_training(measured):
    (_, _, reference), found = measured
    for case, outcome in found:
        if len(outcome.before) != reference.numel():  # rank 0 is not the last stage, or has some of the groups
            assert case.layout.pipeline > 1 or case.layout.data > 1
            continue
        assert torch.equal(outcome.off, outcome.before), str(case)
        assert float(outcome.before.sum()) == pytest.approx(float(reference.sum()), rel=1e-5), str(case)


def test_weights_after_two_steps_do_not_depend_on_the_way(measured):
    _, found = measured
    base = found[0][1].weights
    for case, outcome in found[1:]:
        worst, name = oracle.worst_relative_error(outcome.weights, base)
        assert worst <= 1e-4, f"{case}: {name} {worst}"


MIXTURES = {
    "mixtral": (["w1", "w2", "w3", "q_proj", "o_proj"], {1: [Case()], 2: [Case(EXPERTS), Case(TENSOR), Case(SHARED)]}),
    "qwen3_moe": (ALL, {1: [Case()], 2: [Case(Layout(data=2)), Case(SHARED)]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(MIXTURES))
def test_gradients_of_experts_adapters_follow_from_those_of_their_matrices(tmp_path, family):
    """PEFT has no adapters of single experts in transformers' fused matrices, so the oracle is the chain rule."""
    modules, cases = MIXTURES[family]
    model = save_model(tmp_path / "model", family, tokenizer=False, num_hidden_layers=2)
    groups, options = random_groups(8), {"target_modules": modules, "rank": 4, "alpha": 2.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tensors = {
            name: torch.randn(size) * (0.1 if "lora_A" in name else 0.02)
            for name, size in peft_oracle.shapes_of(model, options).items()
        }
    plain, changed = oracle.load(model), oracle.load(model)
    reference = oracle.all_logps(plain, groups)
    peft_oracle.add_to_matrices(changed, tensors, 0.5)
    loss, whole = oracle.dpo_step(changed, groups, reference, 0.1)
    gradients = peft_oracle.chain_rule(whole, tensors, 0.5)
    for case, outcome in in_every_case(Adapted(model, options, tensors), groups, cases, 1):
        assert outcome.loss == pytest.approx(loss, rel=1e-6), str(case)
        worst, name = oracle.worst_relative_error(outcome.gradients, gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        norm = float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())
        assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), str(case)


ZERO_CASES = {
    1: [Case(), Case(memory=Activations("full")), Case(dtype=torch.bfloat16)],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(tensor=2, sequence=True), dtype=torch.bfloat16),
        Case(STAGES),
        Case(Layout(pipeline=2, virtual=2)),
        Case(STAGES, schedule=OWN(reference="interleaved")),
        Case(Layout(context=2, context_method="ulysses")),
        Case(Layout(data=2), overlap=True),
    ],
}
ALL_AND_ENDS = [*ALL, "embed_tokens", "lm_head"]
ZERO_3 = {2: [Case(Layout(data=2), zero_stage=3), Case(Layout(data=2), zero_stage=1, dtype=torch.bfloat16)]}
ZERO_OFTEN = {1: ZERO_CASES[1][1:], 2: [*ZERO_CASES[2][2:3], *ZERO_CASES[2][4:], ZERO_3[2][0]]}
"""Of LoRA, each time: one of each kind of layout, bf16, ZeRO-3."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        None,
        *(pytest.param(o, marks=pytest.mark.exhaustive) for o in ({}, {"use_dora": True}, {"target_modules": ALL_AND_ENDS})),
    ],
    ids=["often", "LoRA", "DoRA", "ends"],
)
def test_a_new_adapter_has_margins_of_exactly_zero_and_leaves_the_base_as_it_was(tmp_path, options):
    ways = [ZERO_OFTEN] if options is None else [ZERO_CASES] if "use_dora" in options else [ZERO_CASES, ZERO_3]
    options = options or {}
    tied = "target_modules" in options
    model = save_model(tmp_path / "model", "qwen2", tokenizer=False, tie_word_embeddings=tied)
    adapted = Adapted(model, options)
    for case, outcome in [pair for cases in ways for pair in in_every_case(adapted, random_groups(8), cases, 2)]:
        assert len(outcome.margins) >= 16 and not outcome.margins.any(), str(case)
        assert outcome.loss == pytest.approx(0.6931471805599453, abs=1e-6), str(case)
        assert outcome.losses[1] < outcome.losses[0], str(case)
        assert torch.equal(outcome.off, outcome.before), str(case)


WITH_REFERENCE = {
    1: [Case(), Case(memory=Activations("full"))],
    2: [Case(TENSOR), Case(STAGES, schedule=OWN(reference="interleaved")), Case(Layout(data=2), overlap=True)],
}


BODY = ["q_proj", "o_proj", "up_proj"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"target_modules": BODY, "modules_to_save": ["lm_head"]}, marks=pytest.mark.exhaustive),
        {"target_modules": BODY, "modules_to_save": ["lm_head"], "use_dora": True},
        {"target_modules": [*BODY, "embed_tokens", "lm_head"]},
    ],
    ids=["LoRA", "DoRA", "ends"],
)
def test_a_reference_with_adapters_of_its_own_stays_as_it_was(tmp_path, options):
    """Two sets that begin alike: margins of exactly zero, then only one of them moves."""
    model = save_model(tmp_path / "model", "qwen2", tokenizer=False)
    tensors = peft_oracle.adapter_tensors(peft_oracle.adapted_model(model, r=16, lora_alpha=32.0, **options))
    if "modules_to_save" in options:
        tensors["lm_head.weight"] *= 1.01
    adapted = Adapted(model, options, tensors, is_reference=True)
    for case, outcome in in_every_case(adapted, random_groups(8), WITH_REFERENCE, 2):
        assert len(outcome.margins) >= 16 and not outcome.margins.any(), str(case)
        assert outcome.losses[1] < outcome.losses[0], str(case)
        assert torch.equal(outcome.off, outcome.before), str(case)


WITH_DROPOUT = {
    1: [Case(), Case(memory=Activations("full")), Case(memory=Activations("small"))],
    2: [Case(TENSOR), Case(TENSOR, memory=Activations("full")), Case(Layout(tensor=2)), Case(Layout(tensor=2))],
}


@pytest.mark.slow
def test_recomputed_layers_drop_the_same_inputs(tmp_path):
    model = save_model(tmp_path / "model", "llama", tokenizer=False, num_hidden_layers=2)
    options = {"target_modules": [*ALL, "lm_head"]}
    tensors = peft_oracle.adapter_tensors(peft_oracle.adapted_model(model, r=16, lora_alpha=32.0, **options))
    (_, without), *_ = in_every_case(Adapted(model, options, tensors), random_groups(8), {1: [Case()]}, 1)
    adapted = Adapted(model, {**options, "dropout": 0.3}, tensors)
    first: dict[tuple[int, bool], AdapterOutcome] = {}
    for case, outcome in in_every_case(adapted, random_groups(8), WITH_DROPOUT, 1):
        base = first.setdefault((case.layout.tensor, bool(case.layout.sequence)), outcome)
        worst, name = oracle.worst_relative_error(outcome.gradients, base.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        difference, _ = oracle.worst_relative_error(outcome.gradients, without.gradients)
        assert difference > 0.05, str(case)
        assert float(outcome.off.sum()) == pytest.approx(float(without.off.sum()), rel=1e-6), str(case)


def test_gradients_and_moments_are_of_the_adapters_alone(measured):
    """12 bytes for each number that is trained, and what Megatron pads its buffers with."""
    (_, gradients, _), found = measured
    num_trained = sum(gradient.numel() for gradient in gradients.values())
    case, outcome = found[0]
    assert case == Case()
    assert 12 * num_trained <= outcome.num_bytes <= 12.5 * num_trained
