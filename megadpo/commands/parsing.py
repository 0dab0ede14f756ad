"""What the commands share: arguments that several of them take, and errors of argparse in the form of all others."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from megadpo.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with errors in the form of every other error of megadpo, and options allowed between positionals."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        # `train CONFIG --nproc 2 key=value`: plain argparse has closed the list of overrides when it meets --nproc.
        namespace, unknown = super().parse_known_args(args, namespace)
        if hasattr(namespace, "override"):
            late = [argument for argument in unknown if "=" in argument and not argument.startswith("-")]
            namespace.override = [*namespace.override, *late]
            unknown = [argument for argument in unknown if argument not in late]
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if dashed := re.search(r"unrecognized arguments: .*?--([\w.]+\.\w+)(=\S*)?", message):
            message += f": an option of the configuration is written {dashed[1]}{dashed[2] or '=VALUE'}, without dashes"
        raise UserError(f"{message.replace(', key.sub=value', '')}; see {self.prog} --help")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`arguments.override`: any number of ``key.sub=value``."""
    parser.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """`arguments.nproc`: how many processes to start here, or None."""
    parser.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine")


def report_written(path: Path | str) -> None:
    """Tells the user once, whatever the number of processes, where the result is."""
    if os.environ.get("RANK", "0") == "0":
        print(f"megadpo: wrote {path}", file=sys.stderr)
