"""Twenty steps of training equal twenty steps of TRL's trainers: same rows, order, model and optimizer settings."""

from __future__ import annotations

import pytest

from tests.models import save_model
from tests.parity.trl_runs import LOGPS, PAIR_METRICS, Run, assert_same_course, our_history, trl_history

MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
FREE = {"reference": "none", "metrics": PAIR_METRICS}
# TRL's ORPO and SimPO log the mean log-prob of a response under logps/*, ours is the sum.
RUNS = {
    "sigmoid": Run("DPO"),
    "ipo": Run("DPO", {"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "apo_zero": Run("DPO", {"loss_type": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "mpo": Run("DPO", MPO, MPO),
    "aot": Run("DPO", {"loss_type": "aot"}, {"loss_type": ["aot"]}),
    "js, wpo": Run(
        "DPO", {"f_divergence": "js", "wpo": True}, {"f_divergence_type": "js_divergence", "use_weighting": True}
    ),
    "ld": Run("DPO", {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
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
}
LAYOUTS = {
    "tensor 2": (2, {"tensor": 2}, {"share_prompts": False}),
    "pipeline 2": (2, {"pipeline": 2}, {}),
    "tensor 2 x pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}),
}
IN_LAYOUTS = [(name, layout) for name in ("ipo", "aot", "orpo") for layout in ("tensor 2", "pipeline 2")]


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


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_equal_trl(model, theirs, tmp_path, name):
    assert_same_course(RUNS[name], our_history(RUNS[name], model, tmp_path), theirs(name))


@pytest.mark.parametrize(("name", "layout"), [*IN_LAYOUTS, ("sigmoid", "tensor 2 x pipeline 2")])
def test_twenty_steps_equal_trl_on_several_processes(model, theirs, tmp_path, name, layout):
    num_processes, parallel, data = LAYOUTS[layout]
    ours = our_history(RUNS[name], model, tmp_path, num_processes, parallel, **data)
    assert_same_course(RUNS[name], ours, theirs(name))


def test_another_option_is_noticed(model, theirs, tmp_path):
    """A tenth of label smoothing more, which TRL's run has not."""
    run = RUNS["sigmoid"]
    other = our_history(Run("DPO", {"label_smoothing": 0.1}), model, tmp_path)
    with pytest.raises(AssertionError, match="error over tolerance"):
        assert_same_course(run, other, theirs("sigmoid"))
