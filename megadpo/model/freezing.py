"""Parameters of a stage that are not trained, because a pattern of `train.freeze` names them."""

from __future__ import annotations

from collections.abc import Callable

from megadpo.model.build import Stage, needs_gradient
from megadpo.model.families import names_in


def freeze(stage: Stage, is_frozen: Callable[[str], bool]) -> None:
    """Take out of `stage.parameters` those of which every part is frozen: they get no gradient and no optimizer state.

    A parameter that holds several Hugging Face tensors (`linear_qkv`) of which some are frozen stays; the engine leaves
    these parts as they are. Correction biases of routers that are frozen are taken out of `stage.correction_biases`, which
    a step moves.

    Args:
        is_frozen: asked with Hugging Face names.
    """
    for name, (parameter, shard) in list(stage.parameters.items()):
        if all(is_frozen(logical) for logical in names_in(shard)):
            parameter.requires_grad_(False)
            del stage.parameters[name]
    for name, (_, shard) in list(stage.correction_biases.items()):
        if is_frozen(names_in(shard)[0]):
            del stage.correction_biases[name]
    first = stage.models[0]
    if first.pre_process and not any(p.requires_grad for p in first.embedding.parameters()):
        # What a stage puts out must need a gradient though all of it may be frozen, and a checkpointed layer whose input
        # needs none gives none to its parameters either.
        first.embedding.register_forward_hook(needs_gradient)
