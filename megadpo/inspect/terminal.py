"""What was seen of a data set, on a terminal: in colours where there are some, readable without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megadpo.data.rows.report import counted
from megadpo.inspect.samples import Part, Piece, Sample
from megadpo.inspect.summary import QUANTILES, Summary, side_summary

MOST_TOKENS_OF_A_PART = 160
"""Shown of a prompt or an answer: half of them from its beginning, half from its end."""
BAR_WIDTH = 24
COLOURS = {"prompt": "cyan", "chosen": "green", "rejected": "red", "desirable": "green", "undesirable": "red"}
LEVELS = {"problem": ("PROBLEM", "bold red"), "warning": ("warning", "bold yellow"), "note": ("note", "bold blue")}
WIDTH_WITHOUT_TERMINAL = 110


def show(summary: Summary, stream: IO[str]) -> None:
    """Print it all, what is odd first of all at the end, where one looks."""
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH_WITHOUT_TERMINAL)
    for side in summary.inspected.sides:
        _heading(console, f"{side.name}: {', '.join(side.groups.source_names)}")
        found = side_summary(side)
        console.print(Text(found["sentence"]))
        for line in found["splits"]:
            console.print(Text(line))
        if found["tokens"]:
            console.print(_lengths(found["tokens"]))
            _counts(console, found)
    _packing(console, summary)
    _heading(console, "chat template")
    console.print(Text(summary.inspected.template))
    if summary.rendered is not None:
        console.print(Text(f"{summary.rendered[0]}, as it is rendered:"))
        console.print(Text(_indented(summary.rendered[1]), style="dim"))
    if summary.samples:
        _heading(console, "samples of train")
        console.print(legend())
        for sample in summary.samples:
            _sample(console, sample)
    _findings(console, summary)


def legend() -> Text:
    """What the signs and colours of tokens mean."""
    text = Text("a | stands between two tokens; ")
    text.append("learned", "underline")
    text.append(" (in colours underlined), ~not learned~; ")
    text.append("<<special token>>", "bold magenta")
    text.append("; ⏎ line end; colours: ")
    for place, role in enumerate(("prompt", "chosen", "rejected")):
        text.append(", " * bool(place)).append(role, COLOURS[role])
    return text


def _sample(console: Console, sample: Sample) -> None:
    console.print()
    console.print(Text(sample.location, "bold"))
    for part in sample.parts:
        learned = sum(len(piece.ids) for piece in part.pieces if piece.is_learned)
        words = "all learned" if learned == part.num_tokens else f"{learned} learned" if learned else "not learned"
        console.print(Text(f"  {part.role}: {part.num_tokens} tokens, {words}", "dim"))
        console.print(Padding(tokens(part), (0, 0, 0, 4)))


def tokens(part: Part) -> Text:
    """The tokens of a prompt or an answer in a row."""
    colour = COLOURS.get(part.role.split(" ")[0], "green")
    shown, left_out = list(part.pieces), len(part.pieces) - MOST_TOKENS_OF_A_PART
    half, text = MOST_TOKENS_OF_A_PART // 2, Text()
    has_mask = any(piece.is_learned for piece in shown)
    for place, piece in enumerate(shown):
        if left_out > 0 and half <= place < len(shown) - half:
            if place == half:
                text.append(f" … {left_out:,} more … ", "dim")
            continue
        if place:
            text.append("|", "dim")
        text.append_text(_token(piece, colour, has_mask and not piece.is_learned))
    return text


def _token(piece: Piece, colour: str, is_masked: bool) -> Text:
    words = f"<<{piece.text}>>" if piece.is_special else piece.text.replace("\n", "⏎")
    style = "bold magenta" if piece.is_special else colour
    style += " underline" if piece.is_learned else ""
    return Text(f"~{words}~" if is_masked else words, style)


def _lengths(tokens_of: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("tokens", "mean", "median", "90 %", "99 %", "longest"):
        table.add_column(name, justify="left" if name == "tokens" else "right")
    edges = next(iter(tokens_of.values()))["histogram"]["edges"]
    table.add_column(f"how many: 0 to {edges[-1]} and more, in {len(edges)} bins")
    for role, found in tokens_of.items():
        numbers = [f"{found[name]:,.0f}" if name in found else "" for name in ("mean", *QUANTILES, "longest")]
        table.add_row(role, *numbers, Text(_blocks(found["histogram"]["counts"]), COLOURS.get(role, "green")))
    return table


def _blocks(counts: list[int]) -> str:
    """A histogram in a line: of each bin its height in eighths."""
    most = max(max(counts), 1)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // most)] * (BAR_WIDTH // len(counts)) for count in counts)


def _counts(console: Console, found: Mapping[str, Any]) -> None:
    per_row = found["tokens_per_row"]
    console.print(
        Text(
            f"tokens a row: {per_row['each_with_its_prompt']:,.1f} with its prompt for each answer, "
            f"{per_row['prompt_shared']:,.1f} with the prompt shared ({per_row['saved']:.0%} less)"
        )
    )
    for which, counts in found["languages"].items():
        total = sum(counts.values()) or 1
        words = ", ".join(f"{name} {count / total:.1%}" for name, count in list(counts.items())[:6])
        console.print(Text(f"language of {which} (a guess): {words}"))


def _packing(console: Console, summary: Summary) -> None:
    packed, inspected = summary.inspected.packed, summary.inspected
    if packed is None:
        return
    _heading(console, "micro-batches")
    console.print(
        Text(
            f"{inspected.config.train.pairs_per_step} rows a step, {counted(packed.num_all_steps, 'step')}; of the first "
            f"{counted(packed.num_steps, 'step')}: {packed.per_step:.1f} micro-batches of at most "
            f"{inspected.config.train.tokens_per_micro_batch:,} tokens each, {packed.fill:.1%} full, "
            f"{packed.pairs_per_micro_batch:.1f} rows in one ({inspected.layout})"
        )
    )


def _findings(console: Console, summary: Summary) -> None:
    _heading(console, "findings")
    if not summary.findings:
        console.print(Text("none", "bold green"))
    for finding in summary.findings:
        word, style = LEVELS[finding.level]
        line = Text(f"{word} ", style)
        line.append(f"[{finding.side}] ", "not bold dim default").append(finding.sentence, "not bold default")
        console.print(line)
        if finding.rows:
            console.print(Padding(Text(finding.places(), "dim"), (0, 0, 0, 4)))
        if finding.advice:
            console.print(Padding(Text(finding.advice), (0, 0, 0, 4)))


def _heading(console: Console, words: str) -> None:
    console.print()
    console.print(Text(f"== {words}", "bold"))


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
