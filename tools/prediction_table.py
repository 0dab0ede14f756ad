"""Makes the tables of docs/many_gpus.md by benchmarks/predict.py, in half a minute: ``python -m tools.prediction_table
--write`` (a test compares)."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from tools.generated import Part

PART = Part(
    Path(__file__).parents[1] / "docs" / "many_gpus.md",
    "<!-- Between these marks: what `python -m benchmarks predict` prints. -->\n",
    "<!-- end of the tables -->\n",
)


def render(*options: str) -> str:
    """The tables of the command; those of the page are without options."""
    from benchmarks import predict
    from benchmarks.__main__ import parser_of

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predict.run(parser_of("predict", predict).parse_args(options), {})
    return printed.getvalue()


if __name__ == "__main__":
    PART.main(render)
