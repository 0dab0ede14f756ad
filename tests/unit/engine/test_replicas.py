"""Gradients are summed and weights gathered over the replicas that there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megadpo.config.schema import TrainConfig
from megadpo.data.store import GroupStore
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world

OVER_REPLICAS = {"reduce_scatter", "all_gather", "allgather"}


def _collectives_over_replicas(model: Path, layout: Layout) -> list[str]:
    """Names of those that end a step, in a joined world."""
    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights
    from megadpo.parallel.context import local_micro_batches
    from megadpo.parallel.world import joined_world

    groups = random_groups(8)
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=400,
            num_data_parallel=layout.data,
            hidden_size=64,
        ),
    )
    with joined_world(layout, seed=1):
        stage = build_stage(shape_of(read_hf_config(model)), layout, torch.float32)
        load_weights(stage, open_hf(model))
        engine = MegatronEngine(stage, TrainConfig())
        before = {name: tensor.clone() for name, tensor in engine.parameters()}
        engine.forward_backward(
            local_micro_batches(packing, np.arange(len(groups))),
            lambda number, sums_RS: torch.ones(len(sums_RS), 1, dtype=torch.float64),
        )
        with torch.profiler.profile() as profile:
            engine.finish_gradients()
            engine.step(1e-3)
        assert any(not torch.equal(before[name], tensor) for name, tensor in engine.parameters())
        names = {event.key for event in profile.key_averages()}
        return sorted(name for name in names if any(part in name for part in OVER_REPLICAS))


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(tensor=2)], ids=str)
def test_a_single_replica_copies_nothing_to_itself(tmp_path, layout):
    model = save_model(tmp_path / "model", num_hidden_layers=2, tokenizer=False)
    for names in run_world(2, _collectives_over_replicas, model, layout):
        assert bool(names) == (layout.data > 1), names
