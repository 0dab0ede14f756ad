"""Every optimizer is torch's, or its library's, step after step in fp32, in every layout and under both engines."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.helpers.models import save_model
from tests.helpers.worlds import run_world
from tests.parity.rules_worker import Case, Outcome, is_frozen, outcomes

LAYOUTS = {"data": Layout(data=2), "tensor": Layout(tensor=2, sequence=True), "pipeline": Layout(pipeline=2)}
GROUPS = {
    "learning_rates": {"embed_tokens": 5e-4, "q_proj": 1e-3, "down_proj": 4e-3},
    "freeze": ["k_proj", "layers.1.mlp.up_proj", "input_layernorm"],
    "decay_norms_and_biases": True,
}
WHOLE = {"clip_norm": 0.0}
"""Newton-Schulz computes in bfloat16, in which gradients whose norms differ in the last bit of float32 may round apart."""
RULES = {
    "sgd": {"optimizer": "sgd"},
    "sgd, no momentum": {"optimizer": "sgd", "momentum": 0.0},
    "lion": {"optimizer": "lion", "betas": (0.9, 0.99)},
    "groups": GROUPS,
    "a stage that is frozen": {"freeze": ["embed_tokens", "layers.0.*"]},
    "muon": {"optimizer": "muon", **WHOLE},
    "groups of muon": {"optimizer": "muon", "momentum": 0.9, **WHOLE, **GROUPS},
    "groups of lion": {"optimizer": "lion", "betas": (0.95, 0.98), **GROUPS},
}
ALIKE = {
    "learning_rates": {"embed_tokens": 5e-4, "down_proj": 4e-3},
    "freeze": ["input_layernorm", "layers.1.mlp.down_proj"],
}
OF_DEEPSPEED = {
    **{name: RULES[name] for name in ("sgd", "sgd, no momentum", "lion")},
    "groups of sgd": {"optimizer": "sgd", **ALIKE},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": False}
    return save_model(directory / "model", "qwen2", tokenizer=False, **sizes)


def check(case: Case, outcome: Outcome) -> None:
    for name, expected in outcome.torch_s.items():
        found = outcome.weights[name]
        if is_frozen(name, case):
            assert torch.equal(found, outcome.before[name]), (str(case), name)
            continue
        assert not torch.equal(found, outcome.before[name]), (str(case), name)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda text: f"{case} {name}: {text}")  # noqa: B023
    for norm, expected in outcome.norms:
        assert norm == pytest.approx(expected, rel=1e-5), str(case)


IN_LAYOUT = {
    "data": ("sgd", "sgd, no momentum", "lion", "groups of lion", "muon"),
    "tensor": ("sgd", "groups", "groups of muon"),
    "pipeline": ("lion", "groups of lion", "muon", "a stage that is frozen"),
}


BY_ZERO_STAGE = {stage: [Case(Layout(data=2), train, stage) for train in OF_DEEPSPEED.values()] for stage in range(4)}
BY_ZERO_STAGE[1] += [
    Case(Layout(tensor=2), OF_DEEPSPEED["lion"], 1),
    Case(Layout(pipeline=2), OF_DEEPSPEED["groups of sgd"], 1),
]
FEW, MANY = 10, 50
"""Steps. Momenta of 0.9 and 0.99 are there from the second on, and rates fall at each; the few under ZeRO-3 alone."""


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)], ids=lambda steps: f"{steps} steps"
)
def stepped(request, model):
    """What every case gave, all of them from one world: (layout, or ZeRO stage) -> [(case, outcome)]."""
    by_key = {key: [Case(layout, RULES[name]) for name in IN_LAYOUT[key]] for key, layout in LAYOUTS.items()}
    if importlib.util.find_spec("deepspeed") is not None:
        by_key |= {stage: cases for stage, cases in BY_ZERO_STAGE.items() if stage == 3 or request.param == MANY}
    cases = [(key, case) for key, some in by_key.items() for case in some]
    found = {key: [] for key in by_key}
    made = run_world(2, outcomes, model, [case for _, case in cases], request.param, timeout=3000)[0]
    for (key, case), outcome in zip(cases, made, strict=True):
        found[key].append((case, outcome))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_the_library_on_the_same_gradients(stepped, layout):
    for case, outcome in stepped[layout]:
        check(case, outcome)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_steps_of_deepspeed_are_those_of_the_library_on_the_same_gradients(stepped):
    pytest.importorskip("deepspeed")
    for key in stepped.keys() - LAYOUTS.keys():
        for case, outcome in stepped[key]:
            check(case, outcome)


@pytest.mark.slow
def test_steps_of_experts_are_those_of_the_library_on_the_same_gradients(tmp_path):
    mixture = save_model(tmp_path / "model", "qwen3_moe", tokenizer=False, num_hidden_layers=1)
    patterns = {"learning_rates": {"experts.0.*": 1e-3}, "freeze": ["experts.1.up_proj", "experts.2.*"]}
    cases = [Case(Layout(data=2, expert=2), {"optimizer": name, **WHOLE, **patterns}) for name in ("muon", "sgd")]
    cases += [Case(Layout(tensor=2, sequence=True, expert_tensor=2), {"optimizer": "muon", **WHOLE, **patterns})]
    for case, outcome in zip(cases, run_world(2, outcomes, mixture, cases, 5)[0], strict=True):
        check(case, outcome)


@pytest.mark.slow
def test_an_embedding_that_is_the_head_of_another_stage_too_is_updated_or_frozen_as_one(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": True}
    tied = save_model(tmp_path / "model", "qwen2", tokenizer=False, **sizes)
    both = ({"learning_rates": {"embed_tokens": 5e-4}}, {"optimizer": "lion", "freeze": ["embed_tokens"]})
    cases = [Case(Layout(pipeline=2), train) for train in both]
    if importlib.util.find_spec("deepspeed") is not None:
        cases += [Case(Layout(pipeline=2), train, 1) for train in both]
    for case, outcome in zip(cases, run_world(2, outcomes, tied, cases, 5)[0], strict=True):
        check(case, outcome)
