"""The report's files: the page and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megadpo.errors import UserError
from megadpo.files import replacing
from megadpo.report.document import render
from megadpo.report.run_files import RunFiles, read_run

PAGE = "report.html"
PICTURES = "plots"
"""The folder of the PNGs, beside the page."""


def write_page(runs: Sequence[RunFiles], directory: Path) -> Path:
    """The page of some runs as `report.html` in `directory`, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / PAGE
    with replacing(path) as partial:
        partial.write_text(render(runs), encoding="utf-8")
    return path


def write_own_page(output_dir: Path) -> Path:
    """The page of the run in `output_dir`, beside its other files.

    Raises:
        UserError: the run cannot be read, or the page not be written.
    """
    try:
        return write_page([read_run(output_dir)], output_dir)
    except OSError as error:
        raise UserError(f"{output_dir / PAGE} cannot be written: {error.strerror or error}") from error
