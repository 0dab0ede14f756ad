"""What a rank does for test_recompute.py: what stages keep for their backward pass, and the gradients that come of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadpo.data.groups import Group
from megadpo.parallel.layout import Layout


@dataclass(frozen=True)
class Case:
    """A Qwen3 of so many layers, and how it is computed."""

    recompute: str
    num_layers: int
    dtype: torch.dtype = torch.float32
    small_ops: str = "torch"


@dataclass
class Kept:
    """Attributes:
    num_bytes: of all storages that wait for the backward pass, parameters and the caller's sums left out.
    num_recomputed: operations computed again.
    num_joined: norms that had been computed with the add before them.
    """

    num_tokens: int
    num_bytes: int
    num_recomputed: int
    num_joined: int
    gradients: dict[str, Tensor]


def kept(settings: dict[str, Any], groups: list[Group], cases: list[Case]) -> list[Kept]:
    """Of each case, after one forward and backward of all groups in one stream."""
    from megadpo.parallel.world import joined_world

    with joined_world(Layout(), seed=0):
        return [_kept(settings, groups, case) for case in cases]


def _kept(settings: dict[str, Any], groups: list[Group], case: Case) -> Kept:
    from transformers import Qwen3Config

    from megadpo.config.schema import ModelConfig
    from megadpo.data.batches.collate import collate_groups
    from megadpo.model.activations import Activations
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.pipeline.megatron_schedule import MegatronSchedule

    config = Qwen3Config(num_hidden_layers=case.num_layers, **settings)
    options = ModelConfig(small_ops=case.small_ops)
    stage = build_stage(shape_of(config), Layout(), case.dtype, Activations(case.recompute), options=options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else parameter.normal_(1.0, 0.1)
    stage.train()
    parameters = {parameter.untyped_storage()._cdata for parameter in stage.model.parameters()}
    waiting: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            waiting[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if stage.recomputer is None:
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    else:
        stage.recomputer.keep = note
    micro_batch, num_bytes = collate_groups(groups, range(len(groups))), 0

    def forward_is_over(number: int, sums_RS: Tensor) -> Tensor:
        nonlocal num_bytes
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in waiting.values())
        waiting.clear()
        return torch.ones(len(sums_RS), 1, dtype=torch.float64)

    with hooks:
        MegatronSchedule().forward_backward(stage.models, [micro_batch], forward_is_over)
    gradients = {name: parameter.grad.clone() for name, parameter in stage.model.named_parameters()}
    num_recomputed = 0 if stage.recomputer is None else stage.recomputer.num_recomputed
    num_joined = sum(getattr(module, "num_joined", 0) for module in stage.model.modules())
    return Kept(len(micro_batch.tokens_T), num_bytes, num_recomputed, num_joined, gradients)
