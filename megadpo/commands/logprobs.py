"""`megadpo logprobs --model DIR --data FILE --out FILE`: the log-probs of chosen and rejected, a JSON line a pair."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megadpo.commands.parsing import add_nproc, add_overrides, report_written
from megadpo.config.schema import Config
from megadpo.console.activity import activity
from megadpo.launch.launchers import Request, start_processes
from megadpo.validation.load import load_config

HELP = "write the log-probs of chosen and rejected, a line a pair"

DEFAULTS = ("reference.mode=precomputed",)
"""The command is the precomputed reference on its own, so its options (larger micro-batches) apply."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument("--data", required=True, metavar="FILE", help="preference pairs")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument("--force", action="store_true", help="replace the file of --out")
    add_overrides(parser)
    add_nproc(parser)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config = load_config(Config(), [*DEFAULTS, *arguments.override])
    status = start_processes(Request(nproc=arguments.nproc), argv)
    if status is not None:
        return status
    with activity("loading torch"):
        from megadpo.training.logprobs import run_logprobs
    report_written(run_logprobs(arguments.model, arguments.data, arguments.out, config, arguments.force))
    return 0
