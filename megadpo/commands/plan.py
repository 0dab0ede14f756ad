"""`megadpo plan CONFIG --devices N --memory 80GiB` reckons memory and time of every way to run it, `--layouts [N …]` lists
layouts, `--schedule [FILE]` draws the pipeline's schedule; starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megadpo.errors import UserError
from megadpo.validation.load import load_config

HELP = "memory and time on so many devices, list layouts, or draw the pipeline's schedule; starts nothing"


OF_DEVICES = (
    *("memory", "card", "peak", "share_of_peak", "intra_node", "inter_node", "devices_per_node"),
    *("prompt_tokens", "response_tokens", "top", "json"),
)
"""Arguments that go with --devices."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file; every key: docs/configuration.md")
    parser.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")
    parser.add_argument(
        "--layouts", metavar="N", nargs="*", help="list every layout for numbers of processes; none: 1, 2, 4 and 8"
    )
    parser.add_argument(
        "--schedule", metavar="FILE", nargs="?", const="schedule.svg", help="draw the pipeline's schedule (schedule.svg)"
    )
    parser.add_argument("--devices", metavar="N", type=int, help="plan for so many: what fits, fastest first")
    parser.add_argument("--memory", metavar="SIZE", help="of a device, as 80GiB (default: the card's)")
    parser.add_argument("--card", metavar="NAME", help="H100 (default), H200, A100, …: whose rates are taken")
    parser.add_argument("--peak", metavar="FLOPS", type=float, help="FLOP/s of dense bf16, in place of the card's")
    parser.add_argument("--share-of-peak", metavar="X", type=float, help="that large products reach (0.81, as an H100 did)")
    parser.add_argument("--intra-node", metavar="BYTES", type=float, help="bytes/s a rank sends inside a node")
    parser.add_argument("--inter-node", metavar="BYTES", type=float, help="bytes/s a rank sends to other nodes (40e9)")
    parser.add_argument("--devices-per-node", metavar="N", type=int, help="(8)")
    parser.add_argument("--prompt-tokens", metavar="N", type=float, help="median of prompts, in place of the data's")
    parser.add_argument("--response-tokens", metavar="N", type=float, help="median of responses, in place of the data's")
    parser.add_argument("--top", metavar="K", type=int, help="ways to show (5)")
    parser.add_argument("--json", action="store_true", help="one JSON object, with --devices")
    parser.add_argument("--micro-batches", metavar="N", type=int, help="of a step, for --schedule; four for each stage")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.micro_batches is not None and arguments.schedule is None:
        raise UserError("--micro-batches has no effect without --schedule; give both")
    asked = [name for name in ("devices", "layouts", "schedule") if getattr(arguments, name) is not None]
    if len(asked) > 1:
        raise UserError(f"plan takes --layouts or --schedule or --devices, not both --{asked[0]} and --{asked[1]}")
    if arguments.devices is not None:
        return _devices(arguments)
    for name in OF_DEVICES:
        if getattr(arguments, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} has no effect without --devices; give both")
    if arguments.schedule is not None:
        print(_schedule(arguments), end="")
    elif arguments.layouts is not None:
        print(_layouts(arguments), end="")
    else:
        raise UserError(
            "plan reckons for devices, lists layouts or draws a schedule: --devices, --layouts or --schedule is missing; "
            "for example megadpo plan run.yaml --devices 8 --memory 80GiB"
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


def _devices(arguments: argparse.Namespace) -> int:
    if arguments.config is None:
        raise UserError("plan needs the configuration file CONFIG; for example megadpo plan run.yaml --devices 8")
    config = load_config(arguments.config, arguments.override)
    from megadpo.commands.plan_devices import plan_devices

    held = [text.partition("=")[0].strip() for text in arguments.override]
    return plan_devices(config, held, arguments)
