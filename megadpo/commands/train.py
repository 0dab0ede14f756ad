"""`megadpo train CONFIG key.sub=value …`: starts the processes of a run where that is asked for; one of them trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadpo.commands.parsing import add_nproc, add_overrides
from megadpo.console.activity import activity
from megadpo.console.heartbeat import is_rank_0, write_line
from megadpo.errors import UserError
from megadpo.launch.launchers import LAUNCHERS, Request, start_processes
from megadpo.validation.load import load_config

HELP = "train on pairs, lists, labelled answers or examples as a YAML file says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file; every key: docs/configuration.md")
    add_overrides(parser)
    add_nproc(parser)
    parser.add_argument("--launcher", choices=LAUNCHERS, help="who starts the processes (default: megadpo)")
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines, each with --nproc processes")
    parser.add_argument("--node-rank", type=int, metavar="R", help="which of them this one is, from 0")
    parser.add_argument("--master", metavar="HOST[:PORT]", help="machine 0, as the others reach it (port 29500)")
    parser.add_argument("--port", type=int, metavar="PORT", help="where the processes meet on machine 0")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="the machines, a line `HOST slots=N` each")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config = load_config(arguments.config, arguments.override)
    config.require_for_training()
    request = Request(**{name: getattr(arguments, name) for name in Request.__dataclass_fields__})
    status = start_processes(request, ["train", arguments.config, *arguments.override])
    if status is not None:
        return status
    if is_rank_0():
        write_line(f"training {config.model.path} on {_data(config.data.train)}, into {config.output_dir}")
    with activity("loading torch"):
        from megadpo.training.trainer import run_training

    result = run_training(config)
    if config.hub.push is not None and result.pushed_to is None and is_rank_0():
        raise UserError(f"the run is finished, but its model was not pushed to {config.hub.push}, see above")
    return 0


def _data(sources: Any) -> str:
    """Where rows come from, in a few words."""
    first, *more = sources if isinstance(sources, list) else [sources]
    name = first.get("path", first) if isinstance(first, dict) else first
    return f"{name} and {len(more)} more" if more else str(name)
