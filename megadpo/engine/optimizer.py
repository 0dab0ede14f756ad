"""Optimizers of pieces of Megatron's flat fp32 parameters, each piece with its own rule, rate and decay.

Megatron's DistributedOptimizer keeps of each parameter a flat range in fp32. Such a range may hold parts of several Hugging
Face tensors (queries, keys and values), which the options may treat differently. So torch's optimizers, or ours, are given
views of the ranges: one for each run of elements that are updated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo.config.schema import TrainConfig
from megadpo.engine import eight_bit
from megadpo.engine.bf16_moments import AdamWWithBf16Moments
from megadpo.engine.host_moments import AdamWWithHostMoments
from megadpo.engine.lion import Lion
from megadpo.engine.parameter_groups import KEPT, Settings, kinds_of

SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Piece:
    """Elements of a flat fp32 parameter that are updated alike.

    Attributes:
        main: the parameter.
        place: which of its elements they are.
        view: they, as the optimizer of their rule has them.
    """

    main: Tensor
    place: slice
    settings: Settings
    view: Tensor

    @staticmethod
    def of(main: Tensor, place: slice, settings: Settings) -> Piece:
        return Piece(main, place, settings, main.detach()[place])


class OverPieces(torch.optim.Optimizer):
    """Takes the place of the optimizer of a Megatron DistributedOptimizer, whose parameter groups it shows."""

    def __init__(
        self,
        outer: torch.optim.Optimizer,
        pieces: Sequence[Piece],
        train: TrainConfig,
        moments: str,
        others: Mapping[str, Any],
    ) -> None:
        """
        Args:
            moments: where AdamW keeps its moments, and in what: "fp32", "bf16" or "host".
            others: rules that are followed elsewhere, in steps of their own, and what has their state.
        """
        super().__init__([torch.empty(0)], {})
        self.param_groups = outer.param_groups
        self._train = train
        self._pieces: dict[Tensor, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.main, []).append(piece)
        self.rules = {
            rule: _make(rule, _groups(pieces, rule, train), train, moments)
            for rule in dict.fromkeys(piece.settings.rule for piece in pieces)
            if rule != "frozen" and rule not in others
        }
        self.others = dict(others)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for main, pieces in self._pieces.items():
            for piece in pieces:
                piece.view.grad = None if main.grad is None else main.grad[piece.place]
        rates = {group["lr"] for group in self.param_groups}
        for optimizer in self.rules.values():
            for group in optimizer.param_groups:
                (rate,) = rates
                group["lr"] = rate * group["factor"]
            optimizer.step()
        for piece in (piece for pieces in self._pieces.values() for piece in pieces):
            piece.view.grad = None

    def moments(self, main: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter beside its weights, by kind: of its shape, zeros before the first step."""
        kept: dict[str, Tensor] = {}
        for piece in self._pieces.get(main, []):
            kinds = kinds_of(piece.settings, self._train)
            found = moments_of(self._rule_of(piece), piece.view, kinds) if kinds else {}
            for kind, values in found.items():
                whole = kept.setdefault(kind, torch.zeros_like(main, dtype=torch.float32))
                whole[piece.place] = values
        return kept

    def set_moments(self, main: Tensor, moments: dict[str, Tensor], num_steps: int) -> None:
        """What `moments` gives, after `num_steps` steps; `main` has its weights already."""
        for piece in self._pieces.get(main, []):
            kinds = kinds_of(piece.settings, self._train)
            if kinds:
                own = {kind: moments[kind][piece.place] for kind in kinds}
                set_moments(self._rule_of(piece), piece.view, own, num_steps)

    def _rule_of(self, piece: Piece) -> Any:
        return (self.rules | self.others)[piece.settings.rule]


def _groups(pieces: Sequence[Piece], rule: str, train: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups of the pieces with a rule, one for each rate and decay."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for piece in pieces:
        if piece.settings.rule == rule:
            groups.setdefault((piece.settings.factor, piece.settings.decays), []).append(piece.view)
    return [
        {
            "params": views,
            "factor": factor,
            "lr": train.learning_rate * factor,
            "weight_decay": train.weight_decay if decays else 0.0,
        }
        for (factor, decays), views in groups.items()
    ]


def _make(rule: str, groups: list[dict[str, Any]], train: TrainConfig, moments: str) -> torch.optim.Optimizer:
    if rule == "adamw":
        adamw = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps, fused=True)
        if moments == "bf16":
            return AdamWWithBf16Moments.with_groups_of(adamw)
        return AdamWWithHostMoments.with_groups_of(adamw) if moments == "host" else adamw
    return make_rule(rule, groups, train)


def make_rule(rule: str, groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a rule that is not AdamW's, of these parameter groups."""
    if rule == "adamw_8bit":
        return eight_bit.adamw(groups, train.betas, train.eps)
    if rule == "sgd":
        return torch.optim.SGD(groups, momentum=SGD_MOMENTUM if train.momentum is None else train.momentum, fused=True)
    assert rule == "lion", rule
    return Lion(groups, betas=train.betas)


def moments_of(optimizer: Any, main: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """What an optimizer keeps of a parameter beside its weights: of its shape, zeros before the first step."""
    if isinstance(optimizer, OverPieces):
        return optimizer.moments(main)
    if isinstance(optimizer, AdamWWithHostMoments):
        return optimizer.moments(main)
    kept = optimizer.state.get(main, {})
    if any(eight_bit.SCALE in kind for kind in kinds):
        return eight_bit.decoded(kept, main)
    return {kind: kept[kind] if kind in kept else torch.zeros_like(main, dtype=torch.float32) for kind in kinds}


def set_moments(optimizer: Any, main: Tensor, moments: dict[str, Tensor], num_steps: int) -> None:
    """What `moments_of` gives, after `num_steps` steps; `main` has its weights already."""
    if isinstance(optimizer, OverPieces | AdamWWithHostMoments):
        optimizer.set_moments(main, moments, num_steps)
        return
    if any(eight_bit.SCALE in kind for kind in moments):
        eight_bit.encode(optimizer, main, moments, num_steps)
        return
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWWithBf16Moments) else torch.float32
    stored: dict[str, Any] = {kind: moment.to(main.device, dtype, copy=True) for kind, moment in moments.items()}
    if isinstance(optimizer, torch.optim.AdamW):
        stored["step"] = torch.tensor(float(num_steps), device=main.device)
    elif set(moments) == set(KEPT["adamw"]):  # TransformerEngine's and Apex's FusedAdam count steps in the group
        for group in optimizer.param_groups:
            group["step"] = num_steps
    optimizer.state[main] = stored
