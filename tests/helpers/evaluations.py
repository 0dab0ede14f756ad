"""`megadpo eval` in the processes of a world, and what it says."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any


def evaluate_each(commands: list[list[str]], cache: str) -> list[Any]:
    """The command with each of these arguments and ``--json``: the object on rank 0's stdout, None on others; of wrong
    input its sentence."""
    from megadpo.cli import main
    from megadpo.errors import UserError

    os.environ["MEGADPO_CACHE"] = cache
    said: list[Any] = []
    for arguments in commands:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                assert main(["eval", *arguments, "--json"]) == 0
        except UserError as error:
            said.append(str(error))
            continue
        said.append(json.loads(printed.getvalue()) if printed.getvalue() else None)
    return said


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
