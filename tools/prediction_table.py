"""Makes the tables of docs/many_gpus.md by benchmarks/predict.py, in half a minute: ``python -m tools.prediction_table
--write`` (a test compares)."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "many_gpus.md"
BEGIN = "<!-- Between these marks: what `python -m benchmarks predict` prints. -->\n"
END = "<!-- end of the tables -->\n"


def render() -> str:
    """The tables of the command without options."""
    from benchmarks import predict
    from benchmarks.__main__ import parser_of

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        predict.run(parser_of("predict", predict).parse_args([]), {})
    return printed.getvalue()


def written_in(page: str) -> str:
    """What stands between the marks."""
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(BEGIN + written_in(text) + END, BEGIN + render() + END), encoding="utf-8")
    else:
        print(render())
