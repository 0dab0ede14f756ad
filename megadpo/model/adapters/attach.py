"""Adapters put into a stage's models, and switched on and off there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch import Tensor

from megadpo.model.adapters.linear import OFF, POLICY, REFERENCE, AdapterSwitch, LinearAdapter
from megadpo.model.adapters.shards import LayerAdapter
from megadpo.model.adapters.spec import AdapterSpec
from megadpo.model.adapters.vocabulary import VocabularyAdapter, adapt_embedding
from megadpo.model.families import ParameterShard
from megadpo.model.weight_gradients import ColumnLinear, RowLinear

REFERENCE_PREFIX = "reference_"


def attach_adapters(
    model: Any, layers: Sequence[LayerAdapter], spec: AdapterSpec, switch: AdapterSwitch, global_name: Callable[[str], str]
) -> None:
    """Give layers of a chunk the parameters of their adapters, and the switch; all else of the chunk is frozen.

    Args:
        global_name: of a parameter, from its name in `model`.
    """
    model.requires_grad_(False)
    model.adapter_switch = switch
    for module, layer in _adapted_modules(model, layers, global_name):
        for name, shard in layer.shards.items():
            module.register_parameter(name, torch.nn.Parameter(_empty(model, module, name, shard)))
            if shard.partition_dim is None and _has_part_of_sequence(module):
                setattr(getattr(module, name), "sequence_parallel", True)  # noqa: B010 - an attribute Megatron reads
        _use(POLICY, module, layer, spec, switch)


def attach_reference_adapters(
    model: Any, layers: Sequence[LayerAdapter], spec: AdapterSpec, global_name: Callable[[str], str]
) -> Iterator[tuple[Tensor, ParameterShard]]:
    """Give layers of a chunk a second, frozen set of adapters: buffers, each with where its values lie in PEFT's tensors."""
    for module, layer in _adapted_modules(model, layers, global_name):
        for name, shard in layer.shards.items():
            buffer = _empty(model, module, name, shard)
            module.register_buffer(REFERENCE_PREFIX + name, buffer, persistent=False)
            yield buffer, shard
        _use(REFERENCE, module, layer, spec, model.adapter_switch)


def begin_magnitudes(models: Sequence[Any]) -> None:
    """DoRA's magnitudes of new adapters: the norms of the rows, as the layers themselves compute them. Collective."""
    for model in models:
        for linear in _adapted(model):
            linear.adapters[POLICY].set_magnitudes(linear)


@contextlib.contextmanager
def adapters_off(models: Sequence[Any]) -> Iterator[None]:
    """Within the block the models of a stage compute what they do without adapters, bit for bit."""
    with switch_of(models).turned(OFF):
        yield


@contextlib.contextmanager
def reference_adapters(models: Sequence[Any]) -> Iterator[None]:
    """Within the block the models of a stage compute with their second, frozen adapters."""
    with switch_of(models).turned(REFERENCE):
        yield


@contextlib.contextmanager
def inputs_dropped(models: Sequence[Any]) -> Iterator[None]:
    """Within the block the adapters of a stage's models have their dropout, where there are any."""
    model = _unwrapped(models[0])
    if not hasattr(model, "adapter_switch"):
        yield
        return
    model.adapter_switch.drops = True
    try:
        yield
    finally:
        model.adapter_switch.drops = False


def switch_of(models: Sequence[Any]) -> AdapterSwitch:
    """The switch of a stage's models, which may be wrapped."""
    switch = _unwrapped(models[0]).adapter_switch
    assert isinstance(switch, AdapterSwitch)
    return switch


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _adapted(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, ColumnLinear | RowLinear) and module.adapters:
            yield module


def _adapted_modules(
    model: Any, layers: Sequence[LayerAdapter], global_name: Callable[[str], str]
) -> Iterator[tuple[Any, LayerAdapter]]:
    by_name = {
        global_name(f"{name}.weight").removesuffix(".weight"): module
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) or hasattr(module, "use_adapter")
    }
    for layer in layers:
        yield by_name[layer.layer], layer


def _has_part_of_sequence(module: Any) -> bool:
    """Whether what is whole in a module's adapter sees this tensor rank's tokens only."""
    if isinstance(module, VocabParallelEmbedding):
        return bool(module.reduce_scatter_embeddings)
    return bool(module.sequence_parallel and not getattr(module, "is_expert", False))


def _use(state: str, module: Any, layer: LayerAdapter, spec: AdapterSpec, switch: AdapterSwitch) -> None:
    """Have a module compute with an adapter where the switch is turned to `state`; the reference's drops no inputs."""
    prefix, dropout = (REFERENCE_PREFIX, 0.0) if state == REFERENCE else ("", spec.dropout)
    if isinstance(module, ColumnLinear | RowLinear):
        adapter = LinearAdapter(layer.projections, layer.is_row_parallel, dropout, spec.use_dora, prefix)
        module.use_adapter(state, adapter, switch)
        return
    (projection,) = layer.projections
    of_vocabulary = VocabularyAdapter(projection.scaling, dropout, prefix)
    if isinstance(module, VocabParallelEmbedding):
        adapt_embedding(module, state, of_vocabulary, switch)
    else:  # the log-prob head
        module.use_adapter(state, of_vocabulary, switch)


def _empty(model: Any, module: Any, name: str, shard: ParameterShard) -> Tensor:
    weight = module.weight if getattr(module, "four_bit", None) is None else module.four_bit
    if weight is None:  # a head that is tied to the embedding
        weight = model.embedding.word_embeddings.weight
    # A magnitude is compared with a norm, of which bfloat16 knows two digits.
    dtype = torch.float32 if name.startswith("magnitude") else weight.dtype
    return torch.empty(shard.shape, dtype=dtype, device=weight.device)
