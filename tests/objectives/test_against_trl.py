"""Every loss and option that TRL 1.16 has: loss and gradient per token equal those of TRL's own code on random inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadpo.config import ObjectiveConfig, load_config
from megadpo.data.groups import Group
from megadpo.data.micro_batch import lay_out
from megadpo.objectives.evaluate import evaluate
from megadpo.objectives.statistics import response_statistics, response_sums
from megadpo.objectives.terms import Normalisers

NUM_PAIRS, BETA = 5, 0.3
PROMPT = 4

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # ours, TRL's
    ({"loss_type": "sigmoid"}, {}),
    ({"loss_type": "sigmoid_norm"}, {}),
    ({"loss_type": "hinge"}, {}),
    ({"loss_type": "ipo"}, {}),
    ({"loss_type": "exo_pair", "label_smoothing": 0.1}, {}),
    ({"loss_type": "robust", "label_smoothing": 0.2}, {}),
    ({"loss_type": "nca_pair"}, {}),
    ({"loss_type": "bco_pair"}, {}),
    ({"loss_type": "sppo_hard"}, {}),
    ({"loss_type": "aot", "label_smoothing": 0.1}, {}),
    ({"loss_type": "aot_unpaired"}, {}),
    ({"loss_type": "apo_zero"}, {}),
    ({"loss_type": "apo_down"}, {}),
    ({"loss_type": "discopop", "discopop_tau": 0.07}, {}),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {}),
    ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
    ({"loss_type": "sigmoid", "ld_alpha": 0.4}, {}),
    ({"loss_type": "ipo", "ld_alpha": 0.0}, {}),
    ({"loss_type": "sigmoid", "wpo": True}, {"use_weighting": True}),
    ({"loss_type": "ipo", "wpo": True}, {"use_weighting": True}),
    *(
        ({"loss_type": loss, "f_divergence": ours, **extra}, {"f_divergence_type": theirs})
        for loss in ("sigmoid", "ipo", "sigmoid_norm", "hinge", "discopop")
        for ours, theirs, extra in (
            ("forward_kl", "forward_kl", {}),
            ("js", "js_divergence", {}),
            ("alpha", "alpha_divergence", {"f_alpha": 0.7}),
        )
    ),
]


def _batch() -> tuple[list[Group], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random lengths; per-token log-probs of policy and reference and log sum p^2 as TRL lays them out: chosen, then
    rejected, prompts first, padded at the right; and the completion mask."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (2, NUM_PAIRS), generator=generator)
    width = PROMPT + int(lengths.max())
    mask = torch.zeros(2 * NUM_PAIRS, width, dtype=torch.long)
    for side in range(2):
        for pair in range(NUM_PAIRS):
            mask[side * NUM_PAIRS + pair, PROMPT : PROMPT + lengths[side, pair]] = 1
    shape = (2 * NUM_PAIRS, width - 1)
    policy = -torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    reference = policy + 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
    squares = -torch.rand(shape, generator=generator, dtype=torch.float64)
    groups = []
    for pair in range(NUM_PAIRS):
        sizes = [int(lengths[side, pair]) for side in range(2)]
        ids = [torch.arange(size).int().numpy() for size in (PROMPT, *sizes)]
        groups.append(Group((ids[0],), (ids[1], ids[2]), pair))
    shifted = mask[:, 1:].double()
    return groups, policy * shifted, reference * shifted, squares * shifted, mask


def _trl(options: ObjectiveConfig, extra: dict[str, Any], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """TRL's `_compute_loss` on a model that answers with given log-probs; loss, and gradient per token."""
    from trl import DPOTrainer

    _, policy, reference, squares, mask = (
        x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in _batch()
    )
    policy.requires_grad_()

    def model(log_probs: torch.Tensor) -> Any:
        answer = SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=squares,
            entropy=torch.zeros_like(policy),
            mean_logits=torch.zeros_like(policy),
            is_top1=torch.zeros_like(policy, dtype=torch.bool),
        )

        class Model(torch.nn.Module):
            is_gradient_checkpointing = False

            def forward(self, **inputs: Any) -> Any:
                return answer

        return Model()

    trainer = object.__new__(DPOTrainer)
    settings = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        "aux_loss_enabled": False,
        "ld_alpha": options.ld_alpha,
        "precompute_ref_logps": False,
        "ref_model": model(reference),
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": options.f_alpha,
        "loss_types": options.loss_types,
        "loss_weights": options.weights,
        "beta": BETA,
        "label_smoothing": options.label_smoothing,
        "use_weighting": False,
        "args": SimpleNamespace(
            gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=options.discopop_tau
        ),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        **extra,
    }
    for name, value in settings.items():
        object.__setattr__(trainer, name, value)
    trainer.model = model(policy)
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trainer._compute_loss(model(policy), inputs, False)
    loss.backward()
    assert policy.grad is not None
    return float(loss.detach()), policy.grad * mask[:, 1:]  # TRL's head gives masked tokens no gradient


def _ours(options: ObjectiveConfig) -> tuple[float, torch.Tensor]:
    groups, policy, reference, squares, mask = _batch()
    batch = lay_out(groups, range(NUM_PAIRS))
    rows = torch.cat([torch.tensor([i, NUM_PAIRS + i]) for i in range(NUM_PAIRS)])  # ours: chosen, rejected, chosen, …
    places = mask[rows][:, 1:].bool()

    def tokens(values: torch.Tensor) -> torch.Tensor:
        return values[rows][places]

    logps = tokens(policy).requires_grad_()
    zeros = torch.zeros_like(logps)
    table = torch.stack([logps, zeros, zeros, zeros, tokens(squares)], -1)[None]
    sums = response_sums(table, batch, options.ld_alpha)
    others = torch.stack([tokens(reference), zeros, zeros, zeros, zeros], -1)[None]
    reference_sums = response_sums(others, batch, options.ld_alpha)
    statistics = response_statistics(sums.detach(), reference_sums[:, 0], batch)
    num_chosen = int(mask[:NUM_PAIRS].sum())
    found = evaluate(statistics, Normalisers(NUM_PAIRS, num_chosen), options)
    (sums[:, : found.gradient_RD.shape[1]] * found.gradient_RD).sum().backward()
    gradient = torch.zeros_like(policy)
    gradient_rows = gradient[rows]
    gradient_rows[places] = logps.grad
    gradient[rows] = gradient_rows
    return float(found.loss), gradient


@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()) or "-")
def test_loss_and_gradient_equal_trl(ours, theirs):
    options = load_config({"objective": {"beta": BETA, **ours}}).objective
    # TRL clamps the alpha-divergence by dtype and knows no float64.
    is_alpha = theirs.get("f_divergence_type") == "alpha_divergence"
    expected, expected_gradient = _trl(options, theirs, torch.float32 if is_alpha else torch.float64)
    tolerance = 1e-5 if is_alpha else 1e-7
    found, gradient = _ours(options)
    assert found == pytest.approx(expected, rel=tolerance)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < tolerance
    assert math.isfinite(found) and float(expected_gradient.norm()) > 0
