"""The options of runs: flat, those that are not the defaults, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megadpo.config.schema import Config
from megadpo.report.run_files import RunFiles

_MISSING = object()
NOT_COMPARED = {"output_dir"}
"""Of every two runs different."""


def flat_options(run: RunFiles) -> dict[str, Any]:
    """Every option as `section.name`."""
    return _flat(run.config)


def unusual_options(run: RunFiles) -> dict[str, Any]:
    """Those that are not the defaults."""
    defaults = _flat(Config().to_dict())
    return {
        key: value
        for key, value in flat_options(run).items()
        if key not in defaults or _plain(value) != _plain(defaults[key])
    }


def differences(runs: Sequence[RunFiles]) -> dict[str, dict[str, Any]]:
    """Option -> run -> value, of those in which the runs are not all alike; None where a run does not have it."""
    options = {run.name: flat_options(run) for run in runs}
    found = {}
    for key in dict.fromkeys(key for some in options.values() for key in some):
        values = [some.get(key, _MISSING) for some in options.values()]
        if key not in NOT_COMPARED and any(_plain(value) != _plain(values[0]) for value in values):
            found[key] = {run.name: options[run.name].get(key) for run in runs}
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Tuples as the lists that a file makes of them."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
