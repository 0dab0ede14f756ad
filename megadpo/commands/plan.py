"""`megadpo plan CONFIG --layouts [N …]` lists layouts, `--schedule [FILE]` draws the pipeline's schedule; starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megadpo.errors import UserError
from megadpo.validation.load import load_config

HELP = "list layouts, or draw the pipeline's schedule; starts nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file; every key: docs/configuration.md")
    parser.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")
    parser.add_argument(
        "--layouts", metavar="N", nargs="*", help="list every layout for numbers of processes; none: 1, 2, 4 and 8"
    )
    parser.add_argument(
        "--schedule", metavar="FILE", nargs="?", const="schedule.svg", help="draw the pipeline's schedule (schedule.svg)"
    )
    parser.add_argument("--micro-batches", metavar="N", type=int, help="of a step, for --schedule; four for each stage")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.micro_batches is not None and arguments.schedule is None:
        raise UserError("--micro-batches has no effect without --schedule; give both")
    if arguments.schedule is not None and arguments.layouts is not None:
        raise UserError("plan takes --layouts or --schedule, not both")
    if arguments.schedule is not None:
        print(_schedule(arguments), end="")
    elif arguments.layouts is not None:
        print(_layouts(arguments), end="")
    else:
        raise UserError(
            "plan lists layouts or draws a schedule: --layouts or --schedule is missing; for example "
            "megadpo plan run.yaml --layouts 4 8"
        )
    return 0


def _layouts(arguments: argparse.Namespace) -> str:
    overrides = [text for text in arguments.layouts if "=" in text]
    counts = [text for text in arguments.layouts if "=" not in text]
    path = arguments.config
    if path is None:  # `plan --layouts 4 CONFIG`: --layouts has taken it
        path = next((text for text in counts if not text.isdecimal()), None)
        if path is None:
            raise UserError("plan needs the configuration file CONFIG; for example megadpo plan run.yaml --layouts 4 8")
        counts.remove(path)
    if wrong := next((text for text in counts if not text.isdecimal()), None):
        raise UserError(f"--layouts takes numbers of processes, got {wrong!r}; for example --layouts 4 8")
    config = load_config(path, [*arguments.override, *overrides])
    from megadpo.commands.plan_layouts import list_layouts

    return list_layouts(config, [int(text) for text in counts])


def _schedule(arguments: argparse.Namespace) -> str:
    if arguments.config is None:
        raise UserError("plan needs the configuration file CONFIG; for example megadpo plan run.yaml --schedule out.svg")
    path, overrides = arguments.schedule, arguments.override
    if "=" in path:  # an override that stands where the file would
        path, overrides = "schedule.svg", [*overrides, path]
    config = load_config(arguments.config, overrides)
    from megadpo.commands.plan_schedule import draw_schedule

    return draw_schedule(config, path, arguments.micro_batches)
