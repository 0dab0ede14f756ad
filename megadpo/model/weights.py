"""Weights into the parameters of a stage: each rank reads only its own part of every tensor."""

from __future__ import annotations

import torch

from megadpo.console.activity import activity
from megadpo.model.adapters.attach import switch_of
from megadpo.model.adapters.shards import is_adapters
from megadpo.model.build import Stage
from megadpo.model.families import ParameterShard, TensorSource
from megadpo.model.families.fill import fill_shard
from megadpo.parallel.zero3 import is_partitioned, own_part, set_whole


def load_weights(stage: Stage, source: TensorSource, trained: TensorSource | None = None) -> None:
    """Read every parameter of the stage from `source`, only the part that this rank holds.

    Args:
        trained: where `stage.parameters` are read from instead, of a stage with adapters.
    """
    if trained is not None:
        _fill(stage.parameters, trained)
        _fill(stage.base | stage.correction_biases, source)
    else:
        _fill(stage.base | stage.parameters | stage.correction_biases, source)


def keep_originals(stage: Stage, source: TensorSource, reference: TensorSource | None = None) -> None:
    """Keep the values that parameters trained whole beside adapters have for the reference: what `reference` says where it
    says anything, else what the model of `source` has."""
    known = frozenset(() if reference is None else reference.names())
    for parameter, shard in stage.parameters.values():
        if not is_adapters(shard):
            values = torch.empty_like(parameter)
            has_own = reference is not None and all(piece.logical_name in known for piece in shard.pieces)
            fill_shard(shard, reference if has_own and reference is not None else source, values)
            switch_of(stage.models).originals.append((parameter, values))
    source.release()


def _fill(parameters: dict[str, tuple[torch.nn.Parameter, ParameterShard]], source: TensorSource) -> None:
    with torch.no_grad(), activity("loading weights", len(parameters), "tensors") as loading:
        for parameter, shard in parameters.values():
            loading.advance()
            four_bit = getattr(parameter, "four_bit", None)
            if four_bit is not None:
                four_bit.fill(shard, source)
                continue
            if not is_partitioned(parameter):
                fill_shard(shard, source, parameter.data)
                continue
            values = torch.empty(shard.shape, dtype=own_part(parameter).dtype, device=own_part(parameter).device)
            fill_shard(shard, source, values)
            set_whole(parameter, values)
    source.release()
