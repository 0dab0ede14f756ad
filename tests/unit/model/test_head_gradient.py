"""The matrix gradient goes straight into the engine's buffer, and ends as it would through autograd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig, ParallelConfig, TrainConfig
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world

WAYS = ("autograd", "buffer", "buffer, overlapped")


def _gradients(model: Path, groups: Sequence[Group], way: str, dtype: torch.dtype, layout: Layout) -> dict[str, Tensor]:
    """Of a step's mean log-prob, in a joined world; the second step's, when the overlap knows the order of gradients."""
    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.heads import logprob as head
    from megadpo.model.heads.logprob import through_autograd
    from megadpo.model.weights import load_weights
    from megadpo.objectives.coupled import RunningMean
    from megadpo.objectives.objective import Objective
    from megadpo.training.global_batch import pack_global_batch
    from megadpo.training.reference import NoReference
    from megadpo.training.step import optimizer_step

    head.TILE_ROWS = 64
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=400,
            num_data_parallel=layout.data,
            hidden_size=64,
        ),
    )
    stage = build_stage(shape_of(read_hf_config(model)), layout, dtype)
    load_weights(stage, open_hf(model))
    stage.train()
    engine = MegatronEngine(stage, TrainConfig(), ParallelConfig(overlap=way == "buffer, overlapped"))
    if way == "autograd":
        stage.configure_head(gradient_buffer=through_autograd)
    objective, gradients = Objective.of(ObjectiveConfig(loss_type="sft")), {}
    batch = pack_global_batch(packing, np.arange(len(groups)), objective)
    assert len(batch.micro_batches) > 1

    def keep_gradients() -> None:
        gradients.update({name: tensor.clone() for name, tensor in engine.gradients()})

    for _ in range(2):
        optimizer_step(engine, NoReference(), batch, objective, RunningMean(), 0.0, on_gradients=keep_gradients)
    return gradients


def _all_ways(
    models: Sequence[Path], groups: Sequence[Group], layout: Layout
) -> list[tuple[Path, torch.dtype, dict[str, dict[str, Tensor]]]]:
    from megadpo.parallel.world import joined_world

    with joined_world(layout, seed=1):
        return [
            (model, dtype, {way: _gradients(model, groups, way, dtype, layout) for way in WAYS})
            for model in models
            for dtype in (torch.float32, torch.bfloat16)
        ]


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(pipeline=2)], ids=str)
@pytest.mark.slow
def test_the_engine_ends_with_the_gradients_that_autograd_would_have_given_it(tmp_path, layout):
    models = [
        save_model(tmp_path / "apart", num_hidden_layers=2, tokenizer=False),
        save_model(tmp_path / "tied", "qwen3", num_hidden_layers=2, tie_word_embeddings=True, tokenizer=False),
    ]
    for rank in run_world(2, _all_ways, models, random_groups(24), layout):
        for model, dtype, gradients in rank:
            for way in WAYS[1:]:
                for name, gradient in gradients[way].items():
                    plain = gradients["autograd"][name]
                    # bfloat16: a product is rounded before it is added to the buffer; autograd rounds the tiles' sum.
                    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
                    error = float((gradient - plain).norm() / plain.norm())
                    assert error <= tolerance, f"{model.name}, {dtype}, {way}, {name}: {error:.1e}"
