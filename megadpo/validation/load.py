"""A configuration from YAML, a dict or ``key.sub=value``, read strictly and checked whole.

    config = load_config("run.yaml", ["train.learning_rate=5e-7", "parallel.tensor=2"])

An unknown key, a wrong type, a value out of range, a contradiction or a feature that this version does not have is one
UserError; no option is ever ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadpo.config import foreign, strict
from megadpo.config.schema import PATHS, Config
from megadpo.config.sources import check_eval_sets, check_sources
from megadpo.errors import UserError
from megadpo.files import expanded
from megadpo.validation.adapters import choose_reference_mode
from megadpo.validation.values import replace_spellings, validate


def load_config(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
    own_objective: str | None = None,
) -> Config:
    """A validated Config from a YAML path, a (nested) dict or a Config, with ``key.sub=value`` overrides applied.

    An override of `train.steps` displaces the source's `train.epochs`, and the reverse.

    Args:
        data: options of the section `data` in place of the source's: rows from Python.
        own_objective: how a function is called that the loss `custom` is, in place of one that `objective.module` names.

    Raises:
        UserError: file missing or not YAML, unknown or repeated key, wrong type, anything that `validate` refuses.
    """
    places: strict.Places = {}
    values: Mapping[str, Any]
    if isinstance(source, Config):
        values = _shallow(source)
    elif isinstance(source, Mapping):
        values = source
    else:
        values, places = strict.read_yaml(Path(source))
    if data:
        values = {**values, "data": {**(values.get("data") or {}), **data}}
    overrides = _displacing(overrides)
    try:
        config = strict.build(Config, strict.apply_overrides(Config, values, overrides, places), places)
    except strict.UnknownKey as error:
        raise _in_our_words(error) from None
    if own_objective is not None:
        _take_own_objective(config, own_objective)
    config.data.train = check_sources(config.data.train, "data.train")
    config.data.eval = check_eval_sets(config.data.eval, "data.eval")
    replace_spellings(config)
    _expand_paths(config)
    choose_reference_mode(config)
    validate(config)
    return config


def _take_own_objective(config: Config, name: str) -> None:
    options = config.objective
    if "custom" not in options.loss_types:
        raise UserError(f"objective={name} was given, but objective.loss_type is {options.loss_type}; set it to custom")
    if options.module is not None:
        raise UserError(f"objective={name} was given, and objective.module is {options.module}; leave one of them out")
    options.module = name


def _in_our_words(error: strict.UnknownKey) -> UserError:
    """Another trainer's name is answered with ours; a key that is misspelt, or in the wrong section, with the nearest."""
    answer = foreign.answer(error.dotted)
    if answer is None or answer.name in error.leaves:
        return error
    return UserError(f"{error.place}unknown key {error.dotted}: {answer.sentence()}")


def _expand_paths(config: Config) -> None:
    for dotted in PATHS:
        *section, name = dotted.split(".")
        at = getattr(config, section[0]) if section else config
        value = getattr(at, name)
        if isinstance(value, str) and ("~" in value or "$" in value):
            setattr(at, name, str(expanded(value, dotted)))


LENGTHS = ("train.steps", "train.epochs")
"""Options that say the same thing in two ways."""


def _displacing(overrides: Sequence[str]) -> Sequence[str]:
    """`overrides`, with the other one of LENGTHS nulled first where only one of them is given a value."""
    given = {name.strip(): text.strip() for name, _, text in (override.partition("=") for override in overrides)}
    for name, other in (LENGTHS, LENGTHS[::-1]):
        if given.get(name) not in (None, "", "null", "~") and other not in given:
            return [f"{other}=null", *overrides]
    return overrides


def _shallow(config: Config) -> dict[str, Any]:
    """A Config as nested dicts whose leaves are the very same objects."""
    sections = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
    return {
        name: {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
        if dataclasses.is_dataclass(value)
        else value
        for name, value in sections.items()
    }
