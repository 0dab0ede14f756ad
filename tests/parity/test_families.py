"""The dense families beside Llama's nearest: each computes what plain transformers computes, in every layout.

One entry of FAMILIES is one model, by its family's name; what follows a hyphen tells variants apart. The layouts of one
number of processes are measured in one world for all of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig, PipelineScheduleConfig
from megadpo.data.groups import Group
from megadpo.parallel.layout import Layout
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, Outcome, outcomes_of_models

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5],
    "long_factor": [1.1, 1.4, 2.0, 3.0, 4.5, 6.0],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.9,
    "mscale_all_dim": 0.707,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"sliding_window": 20},
    "phi3-partial-longrope": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
    "olmo2": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "granite": {"tie_word_embeddings": True},
    "granite-biased": {"attention_bias": True, "mlp_bias": True},
    "ministral": {},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": False, "tie_word_embeddings": True},
    "cohere": {"use_qk_norm": True, "tie_word_embeddings": True},
    "cohere-dynamic": {
        "attention_bias": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "cohere2": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"final_logit_softcapping": 3.0, "attention_bias": True},
    "deepseek_v2": {"first_k_dense_replace": 2, "tie_word_embeddings": True},
    "deepseek_v3": {"first_k_dense_replace": 2, "rope_parameters": YARN, "max_position_embeddings": 128},
    "deepseek_v3-halves": {"first_k_dense_replace": 2, "q_lora_rank": None, "rope_interleave": False},
    "llama-gelu-biased": {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True},
}
ONE = {1: [Case(Layout()), Case(Layout(), share_prompts=False, tokens_per_micro_batch=120)]}
TWO = {
    2: [
        Case(Layout(tensor=2, sequence=True)),
        Case(Layout(pipeline=2), share_prompts=False),
    ]
}
MORE = {
    1: [Case(Layout(), recompute="full"), Case(Layout(), recompute="small")],
    2: [
        Case(Layout(tensor=2)),
        Case(Layout(context=2)),
        Case(Layout(context=2, context_method="allgather")),
        Case(Layout(pipeline=2), schedule=PipelineScheduleConfig(name="1f1b", split_pairs=True)),
    ],
    4: [
        Case(Layout(tensor=2, pipeline=2, sequence=True)),
        Case(Layout(tensor=2, data=2, sequence=True), share_prompts=False),
    ],
}
IN_MORE = (
    "phi3-partial-longrope",
    "olmo2",
    "smollm3",
    "granite-biased",
    "glm4",
    "cohere",
    "gemma2",
    "gemma3_text",
    "deepseek_v3",
)
"""Models with which these are measured: all that is new is in them."""
OTHERS = tuple(name for name in FAMILIES if name not in IN_MORE)
BETA = 0.1
UNSHARED = ("phi3-partial-longrope", "cohere-dynamic")
"""Whose prompts may not be shared: the responses' lengths lie on both sides of where the rope changes."""


def cases_of(name: str, cases: list[Case]) -> list[Case]:
    return [case for case in cases if not (name in UNSHARED and case.share_prompts)]


@pytest.fixture(scope="module")
def groups():
    return random_groups(5, seed=2, longest=30)


Expected = tuple[torch.Tensor, float, dict[str, torch.Tensor]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((TWO, IN_MORE), id="two processes"),
        pytest.param((TWO, OTHERS), id="two processes, the others", marks=pytest.mark.exhaustive),
        pytest.param((ONE, tuple(FAMILIES)), id="one process", marks=pytest.mark.exhaustive),
        pytest.param((MORE, IN_MORE), id="more layouts", marks=pytest.mark.exhaustive),
    ],
)
def measured(request, groups, tmp_path_factory) -> dict[str, tuple[Expected, list[tuple[Case, Outcome]]]]:
    """By model: log-probs, loss and gradients of transformers, and what every case gave."""
    worlds, names = request.param
    models = {name: saved(tmp_path_factory.mktemp(name), name) for name in names}
    found: dict[str, list[tuple[Case, Outcome]]] = {name: [] for name in models}
    for num_processes, cases in worlds.items():
        jobs = [(*paths, cases_of(name, cases)) for name, paths in models.items()]
        measure = functools.partial(outcomes_of_models, objective=ObjectiveConfig(beta=BETA))
        of_models = run_world(num_processes, measure, jobs, groups)[0]
        for name, (_, _, some), outcomes in zip(models, jobs, of_models, strict=True):
            found[name] += zip(some, outcomes, strict=True)
    return {name: (expected(*paths, groups), found[name]) for name, paths in models.items()}


def saved(directory: Path, name: str) -> tuple[Path, Path]:
    """A policy and a reference."""
    changes = {"num_hidden_layers": 2, **FAMILIES[name]}
    paths = directory / "policy", directory / "reference"
    for seed, path in enumerate(paths):
        save_model(path, name.split("-")[0], seed=seed, tokenizer=False, **changes)
    return paths


def expected(policy: Path, reference: Path, groups: list[Group]) -> Expected:
    model = oracle.load(policy)
    loss, gradients = oracle.dpo_step(model, groups, oracle.all_logps(oracle.load(reference), groups), BETA)
    return oracle.all_logps(model, groups), loss, gradients


@pytest.mark.slow
def test_log_probs_loss_and_every_gradient_equal_transformers(measured) -> None:
    for name, ((logps, loss, gradients), found) in measured.items():
        norm = float(torch.stack([g.double().norm() for g in gradients.values()]).norm())
        assert found, name
        for case, outcome in found:
            worst = float((outcome.logps.view_as(logps) - logps).abs().max())
            assert worst <= 1e-4, f"{name}, {case}: {worst}"
            worst, tensor = oracle.worst_relative_error(outcome.gradients, gradients)
            assert worst <= 1e-5, f"{name}, {case}: {tensor} {worst}"
            assert outcome.grad_norm == pytest.approx(norm, rel=1e-5), f"{name}, {case}"
            assert outcome.loss == pytest.approx(loss, rel=1e-6), f"{name}, {case}"
