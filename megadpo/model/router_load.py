"""What the routers of a mixture of experts did with a global batch: the load of each expert, and the loss that balances it.

The load-balancing loss of a layer (Switch Transformer, arXiv:2101.03961, eq. 4; over the global batch as in
arXiv:2501.11873) is ``E sum_e share_e probability_e``: `share` is the part of all choices that fell on expert e,
`probability` the router's mean probability for it. It is 1 where the load is even. Layers add up. `share` has no
gradient, but it is of the whole batch: a pass without gradients counts it first, and each token's part of the loss is
then linear and exact, wherever and in whichever micro-batch the token is.

A token weighs what it would without shared prompts: a prompt's once for each of its responses, padding nothing.

A router's correction bias (`Routing.has_correction_bias`) may be moved by the same load, without gradient and loss
(`move_correction_biases`).

Axes: L layers of the whole model (rows of layers without experts are zero), E experts, T tokens of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.routes import Routes

Biases = Mapping[str, tuple[Tensor, object]]
"""Routers' correction biases, by Megatron's name with the layer's number in the whole model (`Stage.correction_biases`)."""


@dataclass(frozen=True)
class Load:
    """Of a whole global batch, the same on every rank.

    Attributes:
        choices_LE: float64, weight of the tokens that chose the expert.
        probability_LE: float64, its probabilities summed over all tokens by their weight.
        per_token: experts that each token chooses.
        agreed_LE: float64, of `choices_LE` what the routers would have chosen themselves; None: nobody chose for them.
    """

    choices_LE: Tensor
    probability_LE: Tensor
    per_token: int
    agreed_LE: Tensor | None = None

    @property
    def num_tokens(self) -> float:
        """Weight of the batch's tokens, in each layer with experts."""
        return float(self.choices_LE.sum(1).amax()) / self.per_token

    def slope_E(self, layer: int) -> Tensor:
        """d loss of a layer / d probability of each expert, of a token of weight 1."""
        choices_E = self.choices_LE[layer]
        return len(choices_E) * choices_E / choices_E.sum() / self.num_tokens

    def metrics(self) -> dict[str, float]:
        """``moe/aux_loss`` (mean over layers, 1 = even), ``moe/largest_load`` (busiest expert of any layer over an even
        share), ``moe/mean_largest_load`` (the same, mean over layers), and under router replay ``moe/replay_agreement`` (the
        part of the choices that the routers would have made themselves); nan where nothing was routed."""
        agreement = (
            {} if self.agreed_LE is None else {"moe/replay_agreement": float(self.agreed_LE.sum() / self.choices_LE.sum())}
        )
        choices_LE = self.choices_LE[self.choices_LE.sum(1) > 0]
        if not len(choices_LE):
            return dict.fromkeys(("moe/aux_loss", "moe/largest_load", "moe/mean_largest_load"), math.nan) | agreement
        load_LE = choices_LE / choices_LE.mean(1, keepdim=True)
        probability_LE = self.probability_LE[self.choices_LE.sum(1) > 0] / self.num_tokens
        return {
            "moe/aux_loss": float((load_LE * probability_LE).sum(1).mean()),
            "moe/largest_load": float(load_LE.max()),
            "moe/mean_largest_load": float(load_LE.amax(1).mean()),
        } | agreement


@dataclass
class RouterWatch:
    """Follows the routers of this rank through one pass over its micro-batches.

    Attributes:
        coefficient: weight of the load-balancing loss.
        whole: the load of the global batch, where the pass is to have the loss's gradient.
        records: where the routers' choices are noted for another model.
        replays: the choices of another model, which the routers take in place of their own.
        seen: (micro-batch number, layer) -> [3, E], choices, probabilities, and of the choices the routers' own; a layer
            computed again (recomputation) finds itself there and is not counted twice.
    """

    num_layers: int
    num_experts: int
    per_token: int
    device: torch.device
    coefficient: float = 0.0
    whole: Load | None = None
    records: Routes | None = None
    replays: Routes | None = None
    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _load: Load | None = None

    def load(self) -> Load:
        """The load over all ranks, when the pass has ended: each token is routed in a layer on one rank only. The first call
        is collective over the world."""
        if self._load is not None:
            return self._load
        table = torch.zeros(3, self.num_layers, self.num_experts, dtype=torch.float64, device=self.device)
        for (_, layer), sums in self.seen.items():
            table[:, layer] += sums
        dist.all_reduce(table)
        self._load = Load(table[0], table[1], self.per_token, None if self.replays is None else table[2])
        return self._load


def move_correction_biases(biases: Biases, watch: RouterWatch | None, rate: float) -> None:
    """Auxiliary-loss-free load balancing (arXiv:2408.15664, algorithm 1): the bias of each expert that had less than an even
    share of the global batch goes up by `rate`, that of each that had more goes down. Collective over the world, unless
    `rate` is 0.

    Args:
        biases: float32 [E] of layers of this rank.
        watch: of the pass with gradients; None of a dense model.
    """
    if watch is None or rate == 0:
        return
    load = watch.load()
    with torch.no_grad():
        for name, (bias_E, _) in biases.items():
            choices_E = load.choices_LE[int(name.split(".")[2])]
            bias_E.add_((choices_E.mean() - choices_E).sign().to(bias_E), alpha=rate)


def balance_metrics(biases: Biases, watch: RouterWatch | None, rate: float) -> dict[str, float]:
    """`Load.metrics` of a pass, and, where correction biases move, ``moe/largest_bias``: the largest of any expert of any
    layer, without its sign. Collective over the world."""
    if watch is None:
        return {}
    if rate == 0:
        return watch.load().metrics()
    largest = torch.zeros((), device=watch.device)
    for bias_E, _ in biases.values():
        largest = torch.maximum(largest, bias_E.detach().abs().max())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return watch.load().metrics() | {"moe/largest_bias": float(largest)}


def watch_of(
    config: Any,
    device: torch.device,
    coefficient: float = 0.0,
    records: Routes | None = None,
    replays: Routes | None = None,
) -> RouterWatch | None:
    """A watch for a pass over a model with this TransformerConfig; None without experts."""
    if config.num_moe_experts is None:
        return None
    sizes = config.num_layers, config.num_moe_experts, config.moe_router_topk
    return RouterWatch(*sizes, device, coefficient, records=records, replays=replays)


def watch_step(
    config: Any,
    device: torch.device,
    coefficient: float,
    count: Callable[[RouterWatch], object],
    replays: Routes | None = None,
) -> RouterWatch | None:
    """What follows the routers through a step's forward and backward passes.

    Args:
        count: runs the global batch forward without gradients, followed by the watch it is given; called where the
            load-balancing loss needs the load first.
        replays: the choices that the routers take.
    """
    watch = watch_of(config, device, coefficient, replays=replays)
    if watch is not None and coefficient > 0:
        counting = watch_of(config, device, coefficient, replays=replays)
        assert counting is not None
        count(counting)
        watch.whole = counting.load()
    return watch


def token_weights(micro_batch: MicroBatch) -> Tensor:
    """float32 [T]: how often each token held would be there if every response had its own copy of its prompt; padding 0."""
    segments = micro_batch.segments
    prompts = {(s.prompt_start, s.prompt_end) for s in segments if s.prompt_end > s.prompt_start}
    weight_T = torch.zeros(len(micro_batch.tokens_T))
    for segment in segments:
        if (segment.start, segment.end) not in prompts:
            weight_T[segment.start : segment.end] += 1
        weight_T[segment.prompt_start : segment.prompt_end] += 1
    weight_T[len(weight_T) - micro_batch.num_padding :] = 0
    weight_T, shard = weight_T.to(micro_batch.tokens_T.device), micro_batch.shard
    if shard is None:
        return weight_T
    places_T = shard.order - shard.first
    is_held_T = (places_T >= 0) & (places_T < len(shard.tokens_T))
    held_T = weight_T.new_zeros(len(shard.tokens_T))
    held_T[places_T[is_held_T]] = weight_T[is_held_T]
    return held_T
