"""Every loss and option that TRL 1.16 has, as both sides call it, and the two kinds of batches they are compared on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.groups import Group
from megadpo.objectives.specs import SPECS, kind_of
from megadpo.validation.load import load_config
from tests.helpers.models import hh_groups, random_groups, save_model
from tests.unit.objectives.trl_code import FUSED, Measured, Told, compare, mismatched, sequence

NUM_UNITS, VOCABULARY = 6, 11


@dataclass(frozen=True)
class Case:
    """One objective as both sides call it.

    Attributes:
        trainer: TRL's, a key of `trl_code.TRAINERS`.
        ours: options of `objective`.
        theirs: settings of TRL's trainer that do not follow from ours by name.
        single: TRL computes it in fp32 whatever it is given.
        only_random: TRL's own code has no finite gradient at the log-probs of a real batch.
    """

    trainer: str
    ours: dict[str, Any]
    theirs: dict[str, Any] = field(default_factory=dict)
    single: bool = False
    only_random: bool = False

    def __str__(self) -> str:
        return f"{self.trainer} " + " ".join(f"{name}={value}" for name, value in self.ours.items())

    @property
    def options(self) -> ObjectiveConfig:
        losses = self.ours.get("loss_type", "sigmoid")
        names = losses if isinstance(losses, list) else [losses]
        mode = "resident" if any(SPECS[name].needs_reference for name in names) else "none"
        return load_config({"objective": {"beta": 0.3, **self.ours}, "reference": {"mode": mode}}).objective


def _dpo(**ours: Any) -> Case:
    return Case("DPO", ours)


def _divergences() -> list[Case]:
    losses = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
    kinds = (
        ({"f_divergence": "forward_kl"}, "forward_kl", False),
        ({"f_divergence": "js"}, "js_divergence", False),
        ({"f_divergence": "alpha", "f_alpha": 0.7}, "alpha_divergence", True),
    )
    return [
        Case("DPO", {"loss_type": loss, **_needed(loss), **ours}, {"f_divergence_type": theirs}, single)
        for loss in losses
        for ours, theirs, single in kinds
    ]


def _needed(loss: str) -> dict[str, Any]:
    # discopop divides the margin by tau: rounding of log-probs grows with beta / tau.
    return {"exo_pair": {"label_smoothing": 0.1}, "discopop": {"beta": 0.05}}.get(loss, {})


def _reference_free() -> list[Case]:
    cases = [Case("ORPO", {"loss_type": "orpo"}, single=True)]
    for loss, theirs in (("cpo", "sigmoid"), ("simpo", "simpo")):
        for ours in (
            {},
            {"label_smoothing": 0.2},
            {"nll_coef": 0.7},
            {"alphapo_alpha": 0.25 if loss == "simpo" else 0.02},
            {"alphapo_alpha": -0.25, "nll_coef": 0.3, "label_smoothing": 0.1},
            *([{"simpo_gamma": 1.1}] if loss == "simpo" else []),
        ):
            # cpo_trainer.py:703 takes p ** -alpha of the whole response's p, which is 0 in fp32 for all but the shortest.
            underflows = loss == "cpo" and "alphapo_alpha" in ours
            cases.append(Case("CPO", {"loss_type": loss, **ours}, {"loss_type": theirs}, only_random=underflows))
    return cases


def _unpaired() -> list[Case]:
    weights = {"desirable_weight": 0.7, "undesirable_weight": 1.3}
    return [Case("KTO", {"loss_type": loss, **ours}) for loss in ("kto", "apo_zero_unpaired") for ours in ({}, weights)]


CASES: list[Case] = [
    *(_dpo(loss_type=loss) for loss in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard")),
    *(_dpo(loss_type=loss) for loss in ("aot", "aot_unpaired", "apo_zero", "apo_down", "robust")),
    *(_dpo(loss_type=loss, label_smoothing=0.2) for loss in ("exo_pair", "robust", "aot", "aot_unpaired")),
    _dpo(loss_type="discopop", beta=0.05),
    _dpo(loss_type="discopop", discopop_tau=0.3),
    _dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    _dpo(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    *(_dpo(loss_type=loss, ld_alpha=0.4) for loss in ("sigmoid", "ipo", "sigmoid_norm", "aot", "apo_zero")),
    _dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], ld_alpha=0.0),
    # TRL's hinge and sft cannot be differentiated with weights (dpo_trainer.py:1526 multiplies them in place).
    *(_dpo(loss_type=loss, wpo=True) for loss in ("sigmoid", "sigmoid_norm", "ipo", "robust", "nca_pair", "bco_pair")),
    *(_dpo(loss_type=loss, wpo=True) for loss in ("sppo_hard", "apo_zero", "apo_down")),
    *(_dpo(loss_type=loss, wpo=True, **_needed(loss)) for loss in ("exo_pair", "discopop")),
    *_divergences(),
    *_reference_free(),
    *_unpaired(),
    Case("SFT", {"loss_type": "sft"}),
    *(Case("reward", {"loss_type": "reward", **ours}) for ours in ({}, {"margins": True}, {"reward_center_coef": 0.2})),
]


def _of_kind(groups: Sequence[Group], options: ObjectiveConfig) -> list[Group]:
    """Pairs as the objective reads them: with labels, alone, with margins."""
    kind = kind_of(options.loss_types)
    if kind == "pairs":
        if not options.margins:
            return list(groups)
        return [replace(group, row_values={"margin": (0.1 * i,) * 2}) for i, group in enumerate(groups)]
    alone = [Group((group.prompt_of(i % 2),), (group.responses[i % 2],), group.row) for i, group in enumerate(groups)]
    if kind == "examples":
        return alone
    assert kind == "labels", kind
    return [replace(group, row_values={"label": (1.0 - i % 2,)}) for i, group in enumerate(alone)]


def on_random_logits(case: Case) -> Measured:
    """The comparison on made-up groups and made-up logits, in float64 where TRL can."""
    dtype = torch.float32 if case.single else torch.float64
    options = case.options
    groups = _of_kind(random_groups(NUM_UNITS, seed=7, longest=16, vocab_size=VOCABULARY), options)
    sequences = [sequence(group, i) for group in groups for i in range(len(group.responses))]
    sequences += [sequence(group, 0) for group in mismatched(groups)]
    policy = Told(sequences, VOCABULARY, seed=3, reward=case.trainer == "reward")
    reference = policy.near(0.3, seed=4).to(dtype) if _reads_reference(options) else None
    return compare(case.trainer, groups, policy.to(dtype), reference, options, case.theirs)


def _reads_reference(options: ObjectiveConfig) -> bool:
    return any(SPECS[name].needs_reference for name in options.loss_types)


@functools.cache
def _real_groups() -> list[Group]:
    """Real pairs with short answers: TRL adds log-probs up in fp32, whose rounding grows with the sum."""
    with tempfile.TemporaryDirectory() as directory:
        groups = hh_groups(700, save_model(Path(directory), "llama", num_hidden_layers=1), max_length=96)
    short = [group for group in groups if max(len(response) for response in group.responses) <= 14]
    assert len(short) >= NUM_UNITS
    return short[:NUM_UNITS]


@functools.cache
def _real_model(reward: bool, near: bool) -> nn.Module:
    """A small random Llama in fp32; `near`: a small step away from it."""
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=499,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        num_labels=1,
        attn_implementation="eager",
    )
    kind = transformers.LlamaForSequenceClassification if reward else transformers.LlamaForCausalLM
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
        for parameter in model.parameters():
            parameter.sub_(0.01 * near * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if not reward:
        add_fused_lm_head(model, outputs=FUSED)
    return model


def on_a_real_batch(case: Case) -> Measured:
    """The comparison on real rows through a small random model, everything in fp32."""
    options = case.options
    groups = _of_kind(_real_groups(), options)
    reward = case.trainer == "reward"
    if reward:  # transformers looks for the last token that is no padding
        groups = [replace(g, responses=tuple(np.where(r == 0, 2, r) for r in g.responses)) for g in groups]
    reference = _real_model(reward, near=True) if _reads_reference(options) else None
    return compare(case.trainer, groups, _real_model(reward, near=False), reference, options, case.theirs)
