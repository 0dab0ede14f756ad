"""An objective of the user's own, `objective.loss_type: custom`: what `objective.module` names, or a function from Python.

The file is named by the user's own YAML or command line and is run as it is; nothing read from a model or a checkpoint can
name one.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from megadpo.errors import UserError
from megadpo.objectives.pairwise import PairLoss
from megadpo.objectives.terms import Normalisers, Pairs


@functools.cache
def load_custom(module: str) -> PairLoss:
    """The function that `module` ("path.py:function") names.

    Raises:
        UserError: no such file or function, or the file cannot be imported.
    """
    path, _, name = module.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"objective.module: {module!r} is not of the form path.py:function")
    if not Path(path).is_file():
        raise UserError(f"objective.module: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"megadpo_custom_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise UserError(f"objective.module: {path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise UserError(f"objective.module: {path} has no function {name}")
    return function


def custom(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    """One loss a pair from the function that `objective.module` names.

    Raises:
        UserError: the function gives something else than one differentiable loss a pair.
    """
    module = pairs.options.module
    assert module is not None
    return _checked(load_custom(module), f"objective.module: {module}", pairs, normalisers)


def own_loss(function: PairLoss) -> PairLoss:
    """A function given in Python as a loss; it raises what `custom` raises."""
    return functools.partial(_checked, function, f"objective: {words_of(function)}")


def words_of(function: PairLoss) -> str:
    """What a function given in Python is called: its module and name."""
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"


def _checked(function: PairLoss, name: str, pairs: Pairs, normalisers: Normalisers) -> Tensor:
    losses_P = function(pairs, normalisers)
    num_pairs = len(pairs.statistics.chosen_P)
    if not isinstance(losses_P, torch.Tensor) or losses_P.shape != (num_pairs,) or not losses_P.requires_grad:
        found = f"a tensor of shape {list(losses_P.shape)}" if isinstance(losses_P, torch.Tensor) else repr(losses_P)[:80]
        raise UserError(
            f"{name} must give one loss a pair, shape [{num_pairs}], that depends on the policy's log-probs; it gave {found}"
        )
    return losses_P
