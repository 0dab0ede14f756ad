"""What was seen of a data set as one self-contained page."""

from __future__ import annotations

from megadpo.inspect.data import Side
from megadpo.inspect.findings import Finding
from megadpo.inspect.samples import Part, Piece, Sample
from megadpo.inspect.summary import Summary, side_summary
from megadpo.pages.charts import Mark, bars, histogram
from megadpo.pages.html import Html, element, joined
from megadpo.pages.page import Section, charts, facts, folded, notice, page, table

MOST_TOKENS_OF_A_PART = 600
MOST_ROWS = 200
"""Of a finding, in the page."""
COLOURS = {"prompt": "90,140,200", "rejected": "210,80,80", "undesirable": "210,80,80"}
GREEN = "60,160,90"


def inspect_page(summary: Summary) -> str:
    """The document."""
    inspected = summary.inspected
    sections = [
        Section("Findings", *[_finding(one) for one in summary.findings] or [notice("good", "Nothing odd was found")]),
        *[_rows(summary, side) for side in inspected.sides],
    ]
    packed = inspected.packed
    if packed is not None:
        sections.append(
            Section(
                "Micro-batches",
                facts(
                    {
                        "rows a step": inspected.config.train.pairs_per_step,
                        "steps": packed.num_all_steps,
                        "steps that were packed": packed.num_steps,
                        "micro-batches a step": packed.per_step,
                        "most tokens of one": inspected.config.train.tokens_per_micro_batch,
                        "full": f"{packed.fill:.1%}",
                        "rows in one": packed.pairs_per_micro_batch,
                        "layout": str(inspected.layout),
                    }
                ),
            )
        )
    template: list[object] = [element("p", inspected.template)]
    if summary.rendered is not None:
        template += [element("p", f"{summary.rendered[0]}, as it is rendered:"), element("pre", summary.rendered[1])]
    sections.append(Section("Chat template", *template))
    if summary.samples:
        sections.append(Section("Samples", _legend(), *map(_sample, summary.samples)))
    subtitle = f"{inspected.config.model.path}, {', '.join(inspected.config.objective.loss_types)}"
    return page("What the trainer sees", sections, summary.to_dict(), subtitle)


def _finding(finding: Finding) -> Html:
    parts: list[object] = [finding.advice] if finding.advice else []
    if finding.rows:
        shown = ", ".join(finding.rows[:MOST_ROWS])
        more = f" and {finding.count - MOST_ROWS:,} more" if finding.count > MOST_ROWS else ""
        rows = element("p", f"{shown}{more}", class_="weak")
        parts.append(rows if finding.count <= 3 else folded(f"{finding.count:,} rows", rows))
    return notice(finding.level, joined(f"{finding.side}: {finding.sentence}"), *parts)


def _rows(summary: Summary, side: Side) -> Section:
    found = side_summary(side)
    parts: list[object] = [element("p", found["sentence"])]
    if found["tokens"]:
        names = ("mean", "median", "90_percent", "99_percent", "longest")
        headings = ("tokens", "mean", "median", "90 %", "99 %", "longest")
        rows = [(role, *(of.get(name) for name in names)) for role, of in found["tokens"].items()]
        longest = summary.inspected.config.data.max_length
        marks = [] if longest is None else [Mark(longest, f"data.max_length {longest}")]
        values = {role: lengths.tolist() for role, lengths in side.tokens().items()}
        answers = {role: lengths for role, lengths in values.items() if role != "prompt"}
        parts.append(table(headings, rows))
        per_row = found["tokens_per_row"]
        parts.append(
            charts(
                histogram("Prompts", {"prompt": values["prompt"]}, "tokens", marks=marks),
                histogram("Answers", answers, "tokens", marks=marks),
                bars(
                    "Tokens a row",
                    {"a prompt for each answer": per_row["each_with_its_prompt"], "prompt shared": per_row["prompt_shared"]},
                    note=f"{per_row['saved']:.0%} less is computed",
                ),
                *(
                    bars(f"Language of {which}", dict(list(counts.items())[:8]), note="a guess by script and common words")
                    for which, counts in found["languages"].items()
                ),
            )
        )
    return Section(f"Rows of data.{side.name.replace(' ', '.')}", *parts)


def _legend() -> Html:
    examples = [
        _piece(Piece("prompt", (0,), False, False), "prompt"),
        _piece(Piece("chosen, learned", (0,), False, True), "chosen"),
        _piece(Piece("rejected, learned", (0,), False, True), "rejected"),
        _piece(Piece("special token", (0,), True, False), "prompt"),
    ]
    words = " a box a token; underlined: its log-prob is part of the loss; its id shows under the pointer"
    return element("p", *(joined(example, " ") for example in examples), words)


def _sample(sample: Sample) -> Html:
    parts = [joined(element("h3", sample.location))]
    for part in sample.parts:
        learned = sum(len(piece.ids) for piece in part.pieces if piece.is_learned)
        parts.append(element("p", f"{part.role}: {part.num_tokens:,} tokens, {learned:,} learned", class_="weak"))
        parts.append(element("div", *_pieces(part), style="line-height:1.9; white-space:pre-wrap"))
    return element("article", *parts, style="margin:18px 0")


def _pieces(part: Part) -> list[Html]:
    shown = list(part.pieces)
    if len(shown) <= MOST_TOKENS_OF_A_PART:
        return [_piece(piece, part.role) for piece in shown]
    half = MOST_TOKENS_OF_A_PART // 2
    first, last = ([_piece(piece, part.role) for piece in some] for some in (shown[:half], shown[-half:]))
    return [*first, element("span", f" … {len(shown) - 2 * half:,} more … ", class_="weak"), *last]


def _piece(piece: Piece, role: str) -> Html:
    colour = COLOURS.get(role.split(" ")[0], GREEN)
    style = f"background:rgba({colour},{0.16 if role.startswith('prompt') else 0.22}); border-radius:3px; padding:1px 2px; "
    style += "margin-right:1px; "
    if piece.is_special:
        style += "background:rgba(160,80,190,.3); font-weight:600; font-size:13px; "
    if piece.is_learned:
        style += f"border-bottom:2px solid rgb({colour}); "
    words = piece.text.replace("\n", "⏎\n")
    return element("span", words, style=style, title=f"token {', '.join(map(str, piece.ids))}")
