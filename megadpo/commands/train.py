"""`megadpo train CONFIG key.sub=value …`: starts the processes of a run where that is asked for; one of them trains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megadpo.commands.parsing import add_nproc, add_overrides
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
    from megadpo.training.trainer import run_training

    run_training(config)
    return 0
