"""Objectives and options: what has an effect is read, what has none is refused, in one sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megadpo.config.schema import ObjectiveConfig
from megadpo.errors import UserError
from megadpo.objectives.objective import loss_function
from megadpo.objectives.specs import ALIASES, SPECS, kind_of, needs_reference, reading_of
from megadpo.objectives.terms import Normalisers
from megadpo.validation.load import load_config
from tests.helpers.statistics import evaluate, random_statistics

CHANGED: dict[str, Any] = {
    "loss_weights": [0.7],
    "beta": 0.37,
    "label_smoothing": 0.17,
    "f_divergence": "js",
    "f_alpha": 0.9,
    "ld_alpha": 0.3,
    "wpo": True,
    "nll_coef": 0.4,
    "length_penalty": 0.3,
    "dpop_lambda": 3.0,
    "ipo_normalization": "sum",
    "row_weights": True,
    "margins": True,
    "soft_labels": True,
    "bco_running_delta": True,
    "rpo_eta": 0.6,
    "desirable_weight": 1.5,
    "undesirable_weight": 0.7,
    "list_weights": "score",
    "reward_center_coef": 0.2,
    "discopop_tau": 0.5,
    "simpo_gamma": 1.3,
    "alphapo_alpha": 0.3,
    "module": "examples/custom_objective.py:squared_hinge",
}


def _load(**options: Any) -> ObjectiveConfig:
    loss = options.get("loss_type", "sigmoid")
    mode = "resident" if needs_reference([loss] if isinstance(loss, str) else loss) else "none"
    return load_config({"objective": options, "reference": {"mode": mode}}).objective


def _needed(loss: str) -> dict[str, Any]:
    own = {"module": "tests/unit/objectives/test_custom.py:smooth"}
    return {"exo_pair": {"label_smoothing": 0.05}, "custom": own}.get(loss, {})


def test_every_option_is_tried_here():
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(ObjectiveConfig)} - {"loss_type"}


@pytest.mark.parametrize("loss", SPECS)
@pytest.mark.parametrize("option", CHANGED)
def test_changing_an_option_changes_the_gradient_or_is_refused(loss, option):
    size = {"pairs": 2, "lists": 4, "labels": 1, "examples": 1}[kind_of([loss])]
    normalisers = Normalisers(6, 120, 300, kl=2.0, delta=0.1)
    base = _load(loss_type=loss, **_needed(loss))
    if option == "f_alpha":
        base = dataclasses.replace(base, f_divergence="alpha")
    try:
        changed = _load(loss_type=loss, **{**_needed(loss), option: CHANGED[option]})
        if option == "f_alpha":
            changed = _load(loss_type=loss, **_needed(loss), f_divergence="alpha", f_alpha=0.9)
    except UserError as refusal:
        assert f"objective.{option}" in str(refusal) or "f_divergence" in str(refusal)
        if option == "f_alpha" and SPECS[loss].divergences:
            _load(loss_type=loss, **_needed(loss), f_divergence="alpha", f_alpha=0.9)
        return
    if option == "ld_alpha":
        return  # acts on the token sums, before the objective; see test_against_trl and the layouts test
    if option == "beta" and loss in ("sft", "reward"):
        return  # rewards are shown in units of beta, which these do not read themselves
    if option == "bco_running_delta":
        return  # acts between the passes: see test_running_delta
    # The option lets the rows' own numbers in, which are neutral otherwise.
    reads_rows = option in ("row_weights", "margins", "soft_labels")
    before, after = (
        evaluate(random_statistics(12 // size, size=size, numbers=numbers), normalisers, options).gradient_RD
        for options, numbers in ((base, False), (changed, reads_rows))
    )
    assert not torch.allclose(before, after, rtol=1e-4, atol=1e-9)


def test_every_loss_has_a_function_and_a_line_in_the_documentation():
    from pathlib import Path

    page = (Path(__file__).parents[3] / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name in SPECS:
        assert callable(loss_function(name)) and f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": {"loss_type": "sigmod"}}, "did you mean 'sigmoid'"),
        ({"objective": {"loss_type": "dpo"}}, "'dpo' is not known; did you mean 'sigmoid'"),
        ({"objective": {"loss_type": "KTO"}}, "'KTO' is not known; did you mean 'kto'"),
        ({"objective": {"loss_type": "kto_pair"}}, "did you mean 'kto'"),
        ({"objective": {"loss_type": []}}, "at least one"),
        ({"objective": {"loss_type": ["sigmoid", "sigmoid"]}}, "name each loss once"),
        ({"objective": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}}, "1 weights for 2 losses"),
        ({"objective": {"loss_type": "exo_pair"}}, "label_smoothing is 0, for which exo_pair has no finite loss"),
        (
            {"objective": {"loss_type": "simpo"}, "reference": {"mode": "precomputed"}},
            "reads no reference, but reference.mode is precomputed; set reference.mode to auto or none",
        ),
        ({"objective": {"loss_type": "ipo"}, "reference": {"mode": "none"}}, "ipo needs a reference"),
        ({"objective": {"loss_type": "nca_pair", "f_divergence": "js"}}, "f_divergence is not defined for nca_pair"),
        (
            {"objective": {"loss_type": "ipo", "simpo_gamma": 1.0}},
            "simpo_gamma has no effect on ipo; remove it, or use one of simpo",
        ),
        ({"objective": {"f_alpha": 0.3}}, "no effect unless objective.f_divergence is alpha"),
        ({"objective": {"ld_alpha": 1.5}}, r"ld_alpha must be in \[0, 1\]"),
        ({"objective": {"loss_type": ["kto", "sigmoid"]}}, "kto, sigmoid read different rows .labels and pairs."),
        ({"objective": {"loss_type": ["plackett_luce", "bco"]}}, "cannot be added up"),
        ({"objective": {"loss_type": ["reward", "sigmoid"]}}, "scalar head and stands alone"),
        ({"objective": {"loss_type": "kto"}, "reference": {"mode": "precomputed"}}, "reference.mode to auto"),
        ({"objective": {"loss_type": "kto"}, "train": {"pairs_per_step": 1}}, "set 2 or more"),
        (
            {"objective": {"loss_type": "plackett_luce", "list_weights": "score"}},
            "list_weights has no effect on plackett_luce",
        ),
        ({"objective": {"loss_type": "all_pairs", "list_weights": "gap"}}, "list_weights: 'gap' is not known"),
        ({"objective": {"loss_type": "kto", "wpo": True}}, "wpo is not defined for kto"),
        ({"objective": {"loss_type": "kto", "ld_alpha": 0.5}}, "ld_alpha is not defined for kto"),
        ({"objective": {"loss_type": "best_vs_rest", "margins": True}}, "margins has no effect on best_vs_rest"),
        ({"objective": {"loss_type": "kto", "desirable_weight": -1.0}}, "desirable_weight must be at least 0"),
        ({"objective": {"loss_type": "aot", "row_weights": True}}, "row_weights is not defined for aot"),
        (
            {"objective": {"loss_type": "reward"}, "reference": {"mode": "resident"}},
            "reads no reference, but reference.mode is resident; set reference.mode to auto or none",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_reason(settings, message):
    with pytest.raises(UserError, match=message):
        load_config(settings)


def test_rows_are_read_for_what_the_objective_needs_and_no_more():
    assert reading_of(ObjectiveConfig()).kind == "pairs" and not reading_of(ObjectiveConfig()).row_values
    assert reading_of(ObjectiveConfig(margins=True, row_weights=True)).row_values == {"margin", "weight"}
    assert reading_of(ObjectiveConfig(soft_labels=True)).row_values == {"label_probability"}
    assert reading_of(ObjectiveConfig(loss_type="rpo_sq")).row_values == {"score"}
    assert reading_of(ObjectiveConfig(loss_type=["kto", "sft"])).kind == "labels"
    assert reading_of(ObjectiveConfig(loss_type="all_pairs")).kind == "lists"
    assert reading_of(ObjectiveConfig(loss_type="sft")).kind == "examples"
    assert reading_of(ObjectiveConfig(loss_type=["sigmoid", "sft"])).kind == "pairs"


def test_every_name_that_others_give_hints_at_a_loss_of_ours():
    assert set(ALIASES.values()) <= SPECS.keys() and not set(ALIASES) & SPECS.keys()
