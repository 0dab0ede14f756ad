"""Options of adapters that contradict each other, and which reference `reference.mode: auto` stands for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.objectives.specs import SPECS, needs_reference

if TYPE_CHECKING:
    from megadpo.config.schema import Config

SAID_BY_PATH = (
    *("rank", "alpha", "use_rslora", "use_dora", "target_modules", "layers_to_transform", "modules_to_save", "init"),
)
"""Options of an adapter that `adapter.path` goes on training: its adapter_config.json says them."""


def choose_reference_mode(config: Config) -> None:
    """Put the mode that `reference.mode: auto` stands for in its place."""
    reference = config.reference
    if reference.mode != "auto":
        return
    has_model_of_its_own = reference.path not in (None, config.model.path)
    if not needs_reference([name for name in config.objective.loss_types if name in SPECS]):
        reference.mode = "none"
    elif config.adapter.kind == "lora" and not has_model_of_its_own:
        reference.mode = "adapter"
    else:
        reference.mode = "resident"


def check_adapter_options(config: Config) -> None:
    """Refuse options of adapters that would have no effect, contradict each other or are out of range.

    Raises:
        UserError: in one sentence.
    """
    adapter, defaults = config.adapter, type(config.adapter)()
    _check_reference(config)
    changed = [field.name for field in dataclasses.fields(adapter) if _differs(adapter, defaults, field.name)]
    if adapter.kind == "none":
        if changed:
            raise UserError(
                f"adapter.{changed[0]} has no effect with adapter.kind none; set adapter.kind to lora or remove it"
            )
        return
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"adapter.dropout must be in [0, 1), got {adapter.dropout!r}")
    _check_layers(config)
    _check_decomposed(config)
    said = [name for name in changed if name in SAID_BY_PATH]
    if adapter.path is not None and said:
        raise UserError(
            f"adapter.{said[0]} is {getattr(adapter, said[0])!r}, but the adapter of {adapter.path} says what that is; "
            "remove the option, or begin a new adapter"
        )


def _differs(adapter: object, defaults: object, name: str) -> bool:
    return name != "kind" and getattr(adapter, name) != getattr(defaults, name)


def _check_decomposed(config: Config) -> None:
    adapter, reference = config.adapter, config.reference
    if adapter.init not in DECOMPOSED:
        return
    if adapter.use_dora:
        raise UserError(
            f"adapter.init is {adapter.init} with adapter.use_dora, whose magnitudes are the lengths of the model's own "
            f"rows, and {adapter.init} takes a part of these away; remove one of them"
        )
    if config.model.quantization != "none":
        raise UserError(
            f"adapter.init is {adapter.init} with model.quantization {config.model.quantization}: what is left of the "
            "weights would be quantised, and the adapter that is exported would fit neither the model nor its 4 bits; "
            "remove one of them"
        )
    if reference.adapter is not None:
        raise UserError(
            f"reference.adapter is {reference.adapter}, an adapter of the whole model, but adapter.init {adapter.init} "
            "takes a part of its weights away; set reference.path to that adapter and reference.mode to resident"
        )


def _check_layers(config: Config) -> None:
    layers, targets = config.adapter.layers_to_transform, config.adapter.target_modules
    if layers is None:
        return
    if not layers or len(set(layers)) < len(layers) or min(layers) < 0:
        raise UserError(
            f"adapter.layers_to_transform is {layers}; give each layer's number once, from 0, or null for all layers"
        )
    if isinstance(targets, str) and targets.lower() != "all-linear":
        raise UserError(
            f"adapter.layers_to_transform has no effect on the pattern {targets!r}, which whole names have to match; put "
            "the layers into the pattern or give adapter.target_modules as a list"
        )


def _check_reference(config: Config) -> None:
    reference, has_adapters = config.reference, config.adapter.kind != "none"
    if reference.mode == "adapter" and not has_adapters:
        raise UserError(
            "reference.mode is adapter, which is the model without the adapters that are trained, but adapter.kind is none; "
            "use resident, or set adapter.kind to lora"
        )
    if reference.mode == "adapter" and reference.path not in (None, config.model.path):
        raise UserError(
            f"reference.path is {reference.path}, but reference.mode adapter is model.path without its adapters; remove it, "
            "or set reference.mode to resident"
        )
    if reference.adapter is not None and reference.mode != "adapter":
        raise UserError(
            f"reference.adapter is {reference.adapter}, which only reference.mode adapter reads, not {reference.mode}; "
            "remove it"
        )
    if reference.router_replay and reference.mode == "none":
        raise UserError(
            "reference.router_replay is true, but there is no reference (reference.mode none) whose routes could be taken; "
            "remove it"
        )
