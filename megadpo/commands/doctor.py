"""`megadpo doctor [CONFIG] [key.sub=value …]`: whether a machine and a run have what they need; each lack with its fix."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megadpo.commands.parsing import add_nproc
from megadpo.config.schema import Config
from megadpo.doctor.check import Check, has_failed
from megadpo.errors import UserError
from megadpo.launch.launchers import Request, is_worker
from megadpo.validation.load import load_config

HELP = "check this machine, and what a run needs, with the fix of what is missing"
RANKS = "--ranks-of-doctor"
"""In a process that `doctor --nproc` has started: where to write what the processes found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the run that is meant")
    parser.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")
    add_nproc(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    parser.add_argument(RANKS, dest="ranks", metavar="FILE", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config = None if arguments.config is None else load_config(arguments.config, arguments.override)
    if arguments.ranks is not None:
        return _as_rank(config, arguments.ranks)
    if arguments.nproc is not None and arguments.nproc < 1:
        raise UserError(f"--nproc must be at least 1, got {arguments.nproc}")
    is_one_of_many = is_worker(Request(nproc=arguments.nproc)) and os.environ["WORLD_SIZE"] != "1"
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say
        from megadpo.doctor.examine import examine, examine_ranks

        of_ranks = []
        if is_one_of_many:
            from megadpo.doctor.ranks import check_ranks

            of_ranks = check_ranks("" if config is None else config.output_dir)
            if os.environ["RANK"] != "0":
                return 0
        checks = list(examine(config))
        if (arguments.nproc or 1) > 1 and not is_one_of_many:
            worker = ["doctor", *([] if arguments.config is None else [arguments.config, *arguments.override]), RANKS]
            of_ranks = examine_ranks(arguments.nproc, worker)
        checks += of_ranks
    if arguments.json:
        print(json.dumps({"ok": not has_failed(checks), "checks": [asdict(check) for check in checks]}))
    else:
        _show(checks)
    return int(has_failed(checks))


def _show(checks: Sequence[Check]) -> None:
    try:
        from megadpo.doctor.terminal import show
    except ImportError:  # of rich, too, it is said that it is missing
        print("\n".join(f"{check.status} {check.name}: {check.found}  {check.fix}".rstrip() for check in checks))
    else:
        show(checks, sys.stdout)


def _as_rank(config: Config | None, path: Path) -> int:
    from megadpo.doctor.ranks import check_ranks, write_checks

    checks = check_ranks("" if config is None else config.output_dir)
    if checks:
        write_checks(checks, path)
    return 0
