"""`megadpo report RUN [RUN …]`: a page with curves and findings, and the curves as PNGs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadpo.errors import UserError
from megadpo.files import make_writable_directory

HELP = "curves and findings of runs, as one HTML page and PNGs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="+", help="the output_dir of a run; several are compared")
    parser.add_argument("--out", metavar="DIR", help="where to write (RUN itself; of several runs: report)")
    parser.add_argument("--json", action="store_true", help="print what the report says as one JSON object")
    parser.add_argument(
        "--fail-on",
        metavar="LEVEL",
        choices=("problem", "warning"),
        help="exit with status 1 where a finding is that grave: problem or warning",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    from megadpo.pages.page import finite_json
    from megadpo.report.document import as_json
    from megadpo.report.pictures import can_draw, write_pictures
    from megadpo.report.run_files import read_runs
    from megadpo.report.write import PICTURES, write_page

    runs = read_runs(Path(path) for path in arguments.run)
    out = Path(arguments.out) if arguments.out else runs[0].directory if len(runs) == 1 else Path("report")
    make_writable_directory(out, "--out")
    try:
        written = [write_page(runs, out)]
        if can_draw():
            written += write_pictures(runs, out / PICTURES)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another directory") from error
    if not can_draw():
        print("megadpo: no PNGs, for matplotlib is not installed: pip install 'megadpo[report]'", file=sys.stderr)
    said = as_json(runs) | {"written": [str(path) for path in written]}
    if arguments.json:
        print(json.dumps(finite_json(said), allow_nan=False))
    else:
        _show(said, written)
    levels = {finding["level"] for one in said["runs"] for finding in one["findings"]}
    grave = {"problem": {"problem"}, "warning": {"problem", "warning"}}.get(arguments.fail_on or "", set())
    return 1 if levels & grave else 0


def _show(said: dict[str, Any], written: Sequence[Path]) -> None:
    """Each run in a line, its findings under it, and where the page is."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    colours = {"problem": "bold red", "warning": "yellow", "note": "cyan"}
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    for one in said["runs"]:
        steps = f"{one['steps']}" if one["num_steps"] is None else f"{one['steps']} of {one['num_steps']}"
        console.print(Text(f"{one['name']}: {one['status']}, {steps} steps", style="bold"))
        for finding in one["findings"]:
            at = "" if finding["step"] is None else f" (step {finding['step']})"
            line = Text(finding["level"], style=colours[finding["level"]]) + Text(f"  {finding['title']}{at}", style="bold")
            console.print(Padding(line, (0, 0, 0, 2)) if console.is_terminal else Text("  ") + line)
            for text in (finding["what"], finding["advice"]):
                console.print(Padding(Text(text), (0, 0, 0, 4)) if console.is_terminal else Text("    " + text))
        for sentence in one["damaged"]:
            console.print(Text(f"  damaged: {sentence}"))
        if not one["findings"]:
            console.print(Text("  nothing stands out"))
    pictures = len(written) - 1
    console.print(Text(f"{os.path.relpath(written[0])}" + (f", and {pictures} PNGs beside it" if pictures else "")))
