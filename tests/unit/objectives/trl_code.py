"""TRL 1.16's own loss code and ours on the same models: loss, and its gradient with respect to every parameter.

A "model" is either a table of random logits (`Told`), whose parameters are these logits, or a Hugging Face model.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megadpo.config.schema import ObjectiveConfig
from megadpo.data.batches.collate import collate_groups
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.objectives.specs import SPECS, scores_prompt
from megadpo.objectives.statistics import DIFFERENTIABLE, RESPONSE_SUMS, response_statistics, response_sums
from megadpo.objectives.terms import normalisers_of
from tests.helpers.statistics import evaluate

TRAINERS = {
    "DPO": ("trl", "DPOTrainer"),
    "KTO": ("trl", "KTOTrainer"),
    "SFT": ("trl", "SFTTrainer"),
    "reward": ("trl", "RewardTrainer"),
    "ORPO": ("trl.experimental.orpo", "ORPOTrainer"),
    "CPO": ("trl.experimental.cpo", "CPOTrainer"),
}
FUSED = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Measured:
    """Relative errors of one comparison: of the loss, and of the worst parameter's gradient (norm-wise)."""

    loss: float
    gradient: float
    gradient_norm: float

    @property
    def worst(self) -> float:
        return max(self.loss, self.gradient)


class Told(nn.Module):
    """A model of random logits for given sequences; `reward` models give one number a sequence instead."""

    is_gradient_checkpointing = False

    def __init__(self, sequences: Sequence[Tensor], vocab_size: int, seed: int, reward: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.places = {tuple(ids.tolist()): i for i, ids in enumerate(sequences)}
        shapes = [() if reward else (len(ids), vocab_size) for ids in self.places]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.values = nn.ParameterList(nn.Parameter(value) for value in values)

    def near(self, distance: float, seed: int) -> Told:
        """The same model a random step of size `distance` away."""
        other = Told([torch.tensor(ids) for ids in self.places], 2, seed)
        generator = torch.Generator().manual_seed(seed)
        other.values = nn.ParameterList(
            nn.Parameter(v.detach() + distance * torch.randn(v.shape, generator=generator, dtype=v.dtype))
            for v in self.values
        )
        return other

    def of(self, ids: Tensor) -> Tensor:
        return self.values[self.places[tuple(ids.tolist())]]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **rest: Any) -> Any:
        rows = [self.of(ids[: int(mask.sum())]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        if rows[0].ndim == 0:
            return SimpleNamespace(logits=torch.stack(rows)[:, None])
        logits = torch.stack([nn.functional.pad(row, (0, 0, 0, input_ids.shape[1] - len(row))) for row in rows])
        if labels is None:
            return SimpleNamespace(logits=logits)
        log_p, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
        is_scored = targets != -100
        zeros = torch.zeros_like(log_p[..., 0])
        return SimpleNamespace(
            log_probs=log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * is_scored,
            log_sum_sq_probs=(2 * log_p).logsumexp(-1) * is_scored,
            label_mask=is_scored,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[T, V] of one sequence; of a reward model its number."""
    if isinstance(model, Told):
        return model.of(ids)
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]
    return logits[0] if logits.shape == (1,) else logits


def sequence(group: Group, response: int) -> Tensor:
    """Prompt and completion as one."""
    return torch.from_numpy(np.concatenate([group.prompt_of(response), group.responses[response]])).long()


def mismatched(groups: Sequence[Group]) -> list[Group]:
    """Every prompt with the completion before it: what KTO's KL is measured on."""
    return [replace(group, responses=groups[i - 1].responses) for i, group in enumerate(groups)]


def trl_loss(
    trainer_name: str,
    groups: Sequence[Group],
    policy: nn.Module,
    reference: nn.Module | None,
    options: ObjectiveConfig,
    settings: dict[str, Any],
) -> Tensor:
    """The loss by TRL's own code, called on a trainer that was given its settings without being set up."""
    module, name = TRAINERS[trainer_name]
    trainer = object.__new__(getattr(importlib.import_module(module), name))
    arguments = {
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": None,
        "discopop_tau": options.discopop_tau,
        "center_rewards_coefficient": options.reward_center_coef or None,
        "average_tokens_across_devices": False,
        "loss_type": "nll",
    }
    defaults = {
        "accelerator": SimpleNamespace(
            device=torch.device("cpu"), gather=_same, gather_for_metrics=_same, parallelism_config=None, num_processes=1
        ),
        "args": SimpleNamespace(**arguments),
        "model": policy,
        "ref_model": reference,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "beta": options.beta,
        "label_smoothing": options.label_smoothing,
        "ld_alpha": options.ld_alpha,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": options.f_alpha,
        "loss_types": options.loss_types,
        "loss_weights": options.weights,
        "use_weighting": options.wpo,
        "desirable_weight": options.desirable_weight,
        "undesirable_weight": options.undesirable_weight,
        "cpo_alpha": options.nll_coef,
        "simpo_gamma": options.simpo_gamma,
        "alpha": options.alphapo_alpha,
        "compute_loss_func": None,
        "label_smoother": None,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    if trainer_name == "KTO":
        defaults |= {"loss_type": options.loss_type, "calculate_KL": options.loss_type == "kto"}
    for key, value in (defaults | settings).items():
        object.__setattr__(trainer, key, value)
    return _INPUTS[trainer_name](trainer, policy, groups)


def _same(value: Any) -> Any:
    return value


def _padded(sequences: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
    """(prompt, completion) of every row, padded at the right."""
    pad = nn.utils.rnn.pad_sequence
    ids = [torch.from_numpy(np.concatenate(row)).long() for row in sequences]
    completion = [torch.cat([torch.zeros(len(p)), torch.ones(len(c))]).long() for p, c in sequences]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad(completion, batch_first=True),
    }


def _side(groups: Sequence[Group], response: int) -> list[tuple[Any, Any]]:
    return [(group.prompt_of(response), group.responses[response]) for group in groups]


def _labels(rows: dict[str, Tensor]) -> Tensor:
    return rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)


def _dpo(trainer: Any, policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    return trainer._compute_loss(policy, _padded(_side(groups, 0) + _side(groups, 1)), False)


def _kto(trainer: Any, policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    kl = {f"KL_{name}": tensor for name, tensor in _padded(_side(mismatched(groups), 0)).items()}
    label = torch.tensor([group.row_values["label"][0] > 0 for group in groups])
    return trainer._compute_loss(policy, {**_padded(_side(groups, 0)), **kl, "label": label}, False)


def _without_reference(trainer: Any, policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    inputs = {}
    for response, side in enumerate(("chosen", "rejected")):
        rows = _padded(_side(groups, response))
        inputs |= {f"{side}_{name}": rows[name] for name in ("input_ids", "attention_mask")}
        inputs[f"{side}_labels"] = _labels(rows)
    loss, _ = trainer.get_batch_loss_metrics(policy, inputs)
    return loss


def _sft(trainer: Any, policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    rows = _padded(_side(groups, 0))
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "labels": _labels(rows)}
    return trainer.compute_loss(policy, inputs)


def _reward(trainer: Any, policy: nn.Module, groups: Sequence[Group]) -> Tensor:
    rows = _padded(_side(groups, 0) + _side(groups, 1))
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    if "margin" in groups[0].row_values:
        inputs["margin"] = torch.tensor([group.row_values["margin"][0] for group in groups], dtype=torch.float64)
    return trainer.compute_loss(policy, inputs)


_INPUTS: dict[str, Callable[[Any, nn.Module, Sequence[Group]], Tensor]] = {
    "DPO": _dpo,
    "KTO": _kto,
    "SFT": _sft,
    "reward": _reward,
    "ORPO": _without_reference,
    "CPO": _without_reference,
}


def our_loss(groups: Sequence[Group], policy: nn.Module, reference: nn.Module | None, options: ObjectiveConfig) -> Tensor:
    """The loss by our objectives, differentiable with respect to the policy."""
    batch = collate_groups(groups, range(len(groups)), False, score_prompts=scores_prompt(options.loss_types))
    sums = _sums(policy, groups, batch, options)
    reference_logps = None
    if reference is not None:
        reference_logps = _sums(reference, groups, batch, options)[:, 0].detach()
    normalisers = normalisers_of(GroupStore.of(groups), range(len(groups)))
    if any(SPECS[name].measures_kl for name in options.loss_types):
        assert reference is not None
        others = mismatched(groups)
        stream = collate_groups(others, range(len(others)), False)
        kl = (_sums(policy, others, stream, options) - _sums(reference, others, stream, options))[:, 0].mean()
        normalisers = replace(normalisers, kl=float(kl.detach().clamp(min=0)))
    found = evaluate(response_statistics(sums.detach(), reference_logps, batch), normalisers, options)
    surrogate = (sums[:, : len(DIFFERENTIABLE)] * found.gradient_RD).sum()
    return surrogate - surrogate.detach() + found.loss


def _sums(model: nn.Module, groups: Sequence[Group], batch: MicroBatch, options: ObjectiveConfig) -> Tensor:
    """[R, len(RESPONSE_SUMS)] of the groups as `batch` has laid them out, every response with its own prompt."""
    outputs = [logits_of(model, sequence(group, i)) for group in groups for i in range(len(group.responses))]
    if outputs[0].ndim == 0:
        columns = torch.zeros(len(outputs), len(RESPONSE_SUMS), dtype=torch.float64)
        return columns.index_add(1, torch.tensor([RESPONSE_SUMS.index("reward")]), torch.stack(outputs).double()[:, None])
    log_p_NV = torch.cat(outputs)[batch.scored_N].log_softmax(-1)
    zeros_N = torch.zeros(len(log_p_NV), dtype=log_p_NV.dtype)
    columns_N = [log_p_NV.gather(-1, batch.targets_N[:, None])[:, 0], *[zeros_N] * 3, (2 * log_p_NV).logsumexp(-1)]
    return response_sums(torch.stack(columns_N, -1)[None], batch, options.ld_alpha)


def compare(
    trainer_name: str,
    groups: Sequence[Group],
    policy: nn.Module,
    reference: nn.Module | None,
    options: ObjectiveConfig,
    settings: dict[str, Any],
) -> Measured:
    """Both sides once, and how far ours is from TRL's."""
    expected, expected_gradients = _differentiated(
        policy, trl_loss(trainer_name, groups, policy, reference, options, settings)
    )
    found, gradients = _differentiated(policy, our_loss(groups, policy, reference, options))
    norms = torch.stack([gradient.norm() for gradient in expected_gradients])
    errors = torch.stack([(a - b).norm() for a, b in zip(gradients, expected_gradients, strict=True)])
    # A tensor with next to no gradient is measured against the largest one.
    scale = torch.where(norms > 1e-4 * norms.max(), norms, norms.max())
    return Measured(abs(found / expected - 1), float((errors / scale).max()), float(norms.norm()))


def _differentiated(model: nn.Module, loss: Tensor) -> tuple[float, list[Tensor]]:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return float(loss.detach()), [gradient.double() for gradient in whole]
