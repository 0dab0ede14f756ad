"""Adapters put into a stage's models, and switched on and off there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megadpo.model.adapters.linear import OFF, POLICY, REFERENCE, AdapterSwitch, LinearAdapter
from megadpo.model.adapters.shards import LayerAdapter
from megadpo.model.adapters.spec import AdapterSpec
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
    for linear, layer in _linear_layers(model, layers, global_name):
        for name, shard in layer.shards.items():
            linear.register_parameter(name, torch.nn.Parameter(_empty(linear, name, shard)))
            if shard.partition_dim is None and linear.sequence_parallel and not linear.is_expert:
                setattr(getattr(linear, name), "sequence_parallel", True)  # noqa: B010 - an attribute Megatron reads
        linear.use_adapter(POLICY, _linear_adapter(layer, spec), switch)


def attach_reference_adapters(
    model: Any, layers: Sequence[LayerAdapter], spec: AdapterSpec, global_name: Callable[[str], str]
) -> Iterator[tuple[Tensor, ParameterShard]]:
    """Give layers of a chunk a second, frozen set of adapters: buffers, each with where its values lie in PEFT's tensors."""
    for linear, layer in _linear_layers(model, layers, global_name):
        for name, shard in layer.shards.items():
            buffer = _empty(linear, name, shard)
            linear.register_buffer(REFERENCE_PREFIX + name, buffer, persistent=False)
            yield buffer, shard
        linear.use_adapter(REFERENCE, _linear_adapter(layer, spec, REFERENCE_PREFIX), model.adapter_switch)


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


def _linear_layers(
    model: Any, layers: Sequence[LayerAdapter], global_name: Callable[[str], str]
) -> Iterator[tuple[Any, LayerAdapter]]:
    by_name = {
        global_name(f"{name}.weight").removesuffix(".weight"): module
        for name, module in model.named_modules()
        if isinstance(module, ColumnLinear | RowLinear)
    }
    for layer in layers:
        yield by_name[layer.layer], layer


def _linear_adapter(layer: LayerAdapter, spec: AdapterSpec, prefix: str = "") -> LinearAdapter:
    dropout = 0.0 if prefix else spec.dropout
    return LinearAdapter(layer.projections, layer.is_row_parallel, dropout, spec.use_dora, prefix)


def _empty(linear: Any, name: str, shard: ParameterShard) -> Tensor:
    # A magnitude is compared with a norm, of which bfloat16 knows two digits.
    weight = linear.weight if linear.four_bit is None else linear.four_bit
    dtype = torch.float32 if name.startswith("magnitude") else weight.dtype
    return torch.empty(shard.shape, dtype=dtype, device=weight.device)
