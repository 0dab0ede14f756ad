"""Twenty steps of training equal twenty steps of TRL's trainers: same rows, order, model and optimizer settings."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.models import save_model, save_reward_model
from tests.parity.trl_runs import (
    KTO_METRICS,
    LABELS_MAX_LENGTH,
    LOGPS,
    PAIR_METRICS,
    REWARD_METRICS,
    SFT_METRICS,
    Run,
    assert_same_course,
    our_histories,
    our_history,
    trl_history,
)

MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
FREE = {"reference": {"mode": "none"}, "metrics": PAIR_METRICS}
# TRL's ORPO and SimPO log the mean log-prob of a response under logps/*, ours is the sum.
RUNS = {
    "sigmoid": Run("DPO"),
    "ipo": Run("DPO", {"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "apo_zero": Run("DPO", {"loss_type": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "mpo": Run("DPO", MPO, MPO),
    "aot": Run("DPO", {"loss_type": "aot"}, {"loss_type": ["aot"]}),
    "js, wpo": Run(
        "DPO",
        {"f_divergence": "js", "wpo": True},
        {"f_divergence_type": "js_divergence", "use_weighting": True},
        max_length=80,  # rewards stay near 0 here: of longer answers fp32's rounding alone comes to their floor
    ),
    "ld": Run("DPO", {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "moving reference": Run(
        "DPO",
        {},
        {"sync_ref_model": True, "ref_model_sync_steps": 6, "ref_model_mixup_alpha": 0.4},
        reference={"mode": "resident", "sync_every": 6, "mixup_alpha": 0.4},
    ),
    "orpo": Run("ORPO", {"loss_type": "orpo"}, **FREE, moves=("loss", 0.4)),
    "cpo": Run(
        "CPO",
        {"loss_type": "cpo", "nll_coef": 0.7, "label_smoothing": 0.1},
        {"loss_type": "sigmoid", "cpo_alpha": 0.7, "label_smoothing": 0.1},
        **{**FREE, "metrics": PAIR_METRICS | LOGPS},
    ),
    "simpo": Run(
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 0.3},
        {"loss_type": "simpo", "simpo_gamma": 0.3, "cpo_alpha": 0.0},
        beta=2.0,
        **FREE,
    ),
    "alphapo": Run(
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 0.3, "alphapo_alpha": 0.1, "nll_coef": 0.5},
        {"loss_type": "simpo", "simpo_gamma": 0.3, "alpha": 0.1, "cpo_alpha": 0.5},
        beta=2.0,
        **FREE,
    ),
    "kto": Run(
        "KTO",
        {"loss_type": "kto", "desirable_weight": 1.2},
        {"desirable_weight": 1.2},
        "labels",
        max_length=LABELS_MAX_LENGTH,
        metrics=KTO_METRICS | {"kl": 1e-4},
        moves=("kl", 0.3),
    ),
    "apo_zero_unpaired": Run(
        "KTO",
        {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.8},
        {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.8},
        "labels",
        metrics=KTO_METRICS,
        moves=("rewards/chosen", 0.1),
    ),
    "sft": Run("SFT", {"loss_type": "sft"}, {}, "examples", **{**FREE, "metrics": SFT_METRICS}, moves=("loss", 0.4)),
}
EXHAUSTIVE = ("ipo", "apo_zero", "ld", "cpo", "alphapo", "apo_zero_unpaired")
"""Losses and options that tests/unit/objectives holds to TRL's code, trained by the trainers that the others have."""
LAYOUTS = {
    "tensor 2": (2, {"tensor": 2}, {"share_prompts": False}),
    "pipeline 2": (2, {"pipeline": 2}, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}),
}
IN_LAYOUTS = [
    ("kto", "pipeline 2"),
    pytest.param("sigmoid", "tensor 2 x pipeline 2", marks=pytest.mark.exhaustive),
    *(
        pytest.param(*cell, marks=pytest.mark.exhaustive)
        for cell in itertools.product(("ipo", "orpo", "aot", "kto"), ("tensor 2", "pipeline 2"))
        if cell != ("kto", "pipeline 2")
    ),
]


def marks_of(name):
    if name == "sigmoid":
        return ()
    return pytest.mark.exhaustive if name in EXHAUSTIVE else pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("trl") / "model", "llama", num_hidden_layers=2, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """TRL's history of a run, made once."""
    found = {}

    def history(name):
        if name not in found:
            found[name] = trl_history(RUNS[name], model, tmp_path_factory.mktemp("theirs"))
        return found[name]

    return history


NOTICED = "a tenth of label smoothing more"


@pytest.fixture(scope="module")
def ours(request, model, tmp_path_factory):
    """Our histories of the runs that are asked for, all of them in one process."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    is_whole = request.config.getoption("exhaustive")
    runs = {name: run for name, run in RUNS.items() if name in asked and (is_whole or name not in EXHAUSTIVE)}
    runs[NOTICED] = Run("DPO", {"label_smoothing": 0.1})
    return our_histories(runs, model, tmp_path_factory.mktemp("ours"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in RUNS])
def test_twenty_steps_equal_trl(ours, theirs, name):
    assert_same_course(RUNS[name], ours[name], theirs(name))


@pytest.mark.parametrize(("name", "layout"), IN_LAYOUTS)
@pytest.mark.slow
def test_twenty_steps_equal_trl_on_several_processes(model, theirs, tmp_path, name, layout):
    num_processes, parallel, data = LAYOUTS[layout]
    ours = our_history(RUNS[name], model, tmp_path, num_processes, parallel, **data)
    assert_same_course(RUNS[name], ours, theirs(name))


@pytest.mark.slow
def test_twenty_steps_of_a_reward_model_equal_trl(tmp_path):
    run = Run(
        "reward",
        {"loss_type": "reward", "reward_center_coef": 0.1},
        {"center_rewards_coefficient": 0.1},
        max_length=1024,  # TRL leaves longer rows out
        **{**FREE, "metrics": REWARD_METRICS},
        moves=("loss", 0.1),
    )
    model = save_reward_model(tmp_path / "model", num_hidden_layers=2)
    assert_same_course(run, our_history(run, model, tmp_path / "ours"), trl_history(run, model, tmp_path / "theirs"))


@pytest.mark.slow
def test_another_option_is_noticed(ours, theirs):
    """TRL's run has it not."""
    with pytest.raises(AssertionError, match="error over tolerance"):
        assert_same_course(RUNS["sigmoid"], ours[NOTICED], theirs("sigmoid"))
