"""An objective, made once from its options: what the training step and the metrics are given.

What each loss is stands in `specs.py`; its function is in the file that its line there names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.rows.formats import Reading
from megadpo.objectives import specs
from megadpo.objectives.custom import own_loss
from megadpo.objectives.reference_free import alpha_reward
from megadpo.objectives.specs import SPECS
from megadpo.objectives.statistics import ResponseStatistics
from megadpo.objectives.supervised import sft
from megadpo.objectives.terms import Answers, Lists, Normalisers, Pairs, Responses

Loss = Callable[[Any, Normalisers], Tensor]
"""The responses of some units, as `Objective.responses` gives them -> one loss a unit: [U]."""

_VIEWS: dict[str, type[Responses]] = {"pairs": Pairs, "lists": Lists, "labels": Answers, "examples": Responses}

_REWARDS: dict[str, Callable[[Responses], Tensor]] = {
    "log_ratio": lambda responses: responses.reward_R,
    "log_prob": lambda responses: _of_log_prob(responses, responses.statistics.token_logps_R),
    "mean_log_prob": lambda responses: _of_log_prob(responses, responses.mean_logp_R),
    "head": lambda responses: responses.statistics.reward_R,
}

_REWARD_METRICS = ("rewards/chosen", "rewards/rejected")
_COMPARISON_METRICS = ("rewards/accuracies", "rewards/margins")
BY_LENGTH = ("rewards/margins_chosen_longer", "rewards/margins_chosen_shorter")
"""Of pairs: the margin where the chosen answer is the longer, and where it is the shorter one."""
_TEXT_METRICS = ("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")


@dataclass(frozen=True)
class Term:
    """One of the losses that are added up.

    Attributes:
        name: an `objective.loss_type`, or "nll".
        weighted_by_wpo: whether WPO's weights apply to it where they are on.
    """

    name: str
    weight: float
    function: Loss
    weighted_by_wpo: bool = True


@dataclass(frozen=True)
class Objective:
    """The losses that are added up, and what they need of data, model and step.

    Attributes:
        options: what the losses read of the configuration: beta and so on.
        terms: the losses, in the order of the configuration, the NLL term last.
        reward: [R], what the metrics call the reward of each response.
        reading: the kind of rows, and which of their values are read.
        needs_reference: whether a loss reads the reference's log-probs.
        has_reward_head: whether a scalar head is trained in place of the language model's.
        scores_prompt: whether a loss reads the log-probs of the prompts' tokens.
        couples_batch: whether a unit's loss depends on others of the global batch, which is then evaluated at once.
        measures_kl: whether a loss is measured against the KL of the batch's mismatched prompts and answers (KTO).
        runs_delta: whether rewards are shifted by their running mean over steps (BCO).
        metric_names: of the metrics it has, in the order of their sums, see metrics/collect.py.
    """

    options: ObjectiveConfig
    terms: tuple[Term, ...]
    reward: Callable[[Responses], Tensor]
    reading: Reading
    needs_reference: bool
    has_reward_head: bool
    scores_prompt: bool
    couples_batch: bool
    measures_kl: bool
    runs_delta: bool
    metric_names: tuple[str, ...]

    @classmethod
    def of(cls, options: ObjectiveConfig, own: Loss | None = None) -> Objective:
        """The objective of checked options.

        Args:
            own: the loss `custom`, in place of what `objective.module` names.

        Raises:
            ImportError, AttributeError: a line of `specs.SPECS` names no function.
        """
        losses = options.loss_types
        functions = [own_loss(own) if own is not None and name == "custom" else loss_function(name) for name in losses]
        terms = [Term(*one) for one in zip(losses, options.weights, functions, strict=True)]
        if options.nll_coef:
            terms.append(Term("nll", options.nll_coef, sft, weighted_by_wpo=False))
        needs_reference = specs.needs_reference(losses)
        return cls(
            options=options,
            terms=tuple(terms),
            reward=_REWARDS["log_ratio" if needs_reference else SPECS[losses[0]].reward],
            reading=specs.reading_of(options),
            needs_reference=needs_reference,
            has_reward_head=specs.has_reward_head(losses),
            scores_prompt=specs.scores_prompt(losses),
            couples_batch=specs.couples_batch(options),
            measures_kl=specs.measures_kl(losses),
            runs_delta=specs.runs_delta(options),
            metric_names=metric_names(options),
        )

    @property
    def ld_alpha(self) -> float | None:
        """LD-DPO's weight of the tokens beyond a pair's shorter answer, see `statistics.response_sums`; None: 1."""
        return self.options.ld_alpha

    @property
    def kind(self) -> str:
        """The kind of rows, see `Reading`."""
        return self.reading.kind

    def responses(self, statistics: ResponseStatistics) -> Responses:
        """The statistics as the losses of this kind read them."""
        return _VIEWS[self.kind](statistics, self.options)


def loss_function(name: str) -> Loss:
    """The function of an `objective.loss_type`: it has the same name, in the file that the line of `SPECS` names."""
    function: Loss = getattr(importlib.import_module(f"megadpo.objectives.{SPECS[name].file}"), name)
    return function


def metric_names(options: ObjectiveConfig) -> tuple[str, ...]:
    """Of several losses, each has its own "loss/NAME"."""
    kind = specs.kind_of(options.loss_types)
    names: tuple[str, ...]
    if specs.has_reward_head(options.loss_types):
        names = ("loss", *_REWARD_METRICS, *_COMPARISON_METRICS)
    elif kind == "examples":
        names = ("loss", *(name for name in _TEXT_METRICS if not name.endswith("rejected")))
    else:
        names = ("loss", *_REWARD_METRICS, *(() if kind == "labels" else _COMPARISON_METRICS), *_TEXT_METRICS)
    names += BY_LENGTH if kind == "pairs" else ()
    names += ("kl",) * specs.measures_kl(options.loss_types) + ("delta",) * specs.runs_delta(options)
    return names + (tuple(f"loss/{name}" for name in options.terms) if len(options.terms) > 1 else ())


def _of_log_prob(responses: Responses, logps_R: Tensor) -> Tensor:
    return responses.options.beta * alpha_reward(logps_R, responses.options.alphapo_alpha)
