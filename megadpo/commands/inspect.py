"""`megadpo inspect CONFIG [key.sub=value …]`: the rows as the trainer will see them, and what is odd about them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megadpo.commands.parsing import add_overrides, report_written
from megadpo.errors import UserError
from megadpo.files import replacing, require_new_file
from megadpo.validation.load import load_config

HELP = "show rows, tokens and what is odd about the data; starts nothing"
DEFAULT_ROWS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file; every key: docs/configuration.md")
    add_overrides(parser)
    parser.add_argument("--rows", type=int, metavar="N", default=DEFAULT_ROWS, help="sample rows to show (3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    parser.add_argument("--force", action="store_true", help="replace the file of --html")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.rows < 0:
        raise UserError(f"--rows must be at least 0, got {arguments.rows}")
    config = load_config(arguments.config, arguments.override)
    target = None if arguments.html is None else require_new_file(arguments.html, "--html", arguments.force)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say
        from megadpo.inspect.summary import look_at_all

        summary = look_at_all(config, arguments.rows)
    if target is not None:
        from megadpo.inspect.html import inspect_page

        write(target, inspect_page(summary))
    if arguments.json:
        json.dump(summary.to_dict(), sys.stdout, ensure_ascii=True)
        print()
    else:
        from megadpo.inspect.terminal import show

        show(summary, sys.stdout)
    if target is not None:
        report_written(arguments.html)
    return int(any(finding.level == "problem" for finding in summary.findings))


def write(target: Path, text: str) -> None:
    try:
        with replacing(target) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: {target} cannot be written: {error.strerror or error}") from error
