"""What is odd about a data set, each in a plain sentence with its rows and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megadpo.data.rows.report import MUCH_TRUNCATION
from megadpo.data.rows.row import EMPTY, EQUAL_SCORES, IDENTICAL, IDENTICAL_LIST, NO_PREFERENCE
from megadpo.data.rows.tokenise import IDENTICAL_TRUNCATED, TRUNCATED_AWAY
from megadpo.inspect.data import Inspected, Side
from megadpo.inspect.languages import differ
from megadpo.inspect.rows import RowLook
from megadpo.training.console import balance

MOST_ROWS_NAMED = 5
MUCH_OF_LENGTH = 0.65
"""Of the pairs with answers of unlike length, those whose chosen one is the longer (or the shorter): beyond this part,
length alone tells them apart better than a fair preference would."""
FEWEST_PAIRS_FOR_LENGTH = 30
STANDARD_ERRORS = 4.0
"""How surely the part is above one half."""
MUCH_PADDING = 0.75
"""Micro-batches less full than this cost time."""
FEWEST_BINS = 4


@dataclass(frozen=True)
class Finding:
    """Something that the user should know.

    Attributes:
        name: for scripts, such as "identical".
        level: "problem" (training stops, or learns something wrong), "warning" or "note".
        side: the name of a `Side`.
        sentence: what was found.
        advice: what to do.
        count: rows it is about.
        rows: where these are, all of them.
    """

    name: str
    level: str
    side: str
    sentence: str
    advice: str
    rows: Sequence[str] = ()

    @property
    def count(self) -> int:
        return len(self.rows)

    def places(self) -> str:
        """The first rows, and how many more there are."""
        more = f" and {self.count - MOST_ROWS_NAMED:,} more" if self.count > MOST_ROWS_NAMED else ""
        return ", ".join(self.rows[:MOST_ROWS_NAMED]) + more


LEVELS = ("problem", "warning", "note")


def findings(inspected: Inspected) -> list[Finding]:
    """All findings, the gravest first."""
    found: list[Finding] = []
    for side in inspected.sides:
        for check in CHECKS:
            found += [one for one in check(inspected, side) if one is not None]
    train, *held_out = inspected.sides
    for side in held_out:
        found += leaked(train, side)
    found += room_left(inspected)
    return sorted(found, key=lambda one: LEVELS.index(one.level))


def refused(inspected: Inspected, side: Side) -> Iterable[Finding]:
    if side.refused is not None:
        yield Finding("refused", "problem", side.name, f"Training would stop here: {side.refused}.", "")


DROPPED = {
    EMPTY: ("empty", "an answer is empty", "Fill the answer in, or remove the row."),
    IDENTICAL: ("identical", "chosen and rejected are the same", "Correct the row, or remove it: it teaches nothing."),
    IDENTICAL_LIST: ("identical", "all answers are the same", "Correct the row, or remove it: it teaches nothing."),
    EQUAL_SCORES: ("equal_scores", "all scores are equal", "Give scores that differ, or remove the row."),
    NO_PREFERENCE: ("no_preference", "neither answer is preferred", "Remove the row: it says nothing about a preference."),
    IDENTICAL_TRUNCATED: (
        *("difference_cut_away", "the answers differ only beyond data.max_length {max_length}, and that was cut away"),
        "Raise data.max_length, shorten the prompt, or choose another data.truncation.",
    ),
    TRUNCATED_AWAY: (
        *("answer_cut_away", "nothing of an answer is left of data.max_length {max_length}"),
        "Raise data.max_length, shorten the prompt, or set data.truncation to prompt_left.",
    ),
}


def dropped(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Rows that are not trained on."""
    for reason in dict.fromkeys(row.dropped for row in side.looks if row.dropped is not None):
        name, words, advice = DROPPED.get(reason, ("dropped", reason, "Correct the row, or remove it."))
        words = words.format(max_length=inspected.config.data.max_length)
        rows = _rows(side, lambda row, reason=reason: row.dropped == reason)  # type: ignore[misc]
        yield Finding(name, "warning", side.name, f"{_counted(rows, side)} left out: {words}.", advice, rows)


def truncated(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Rows that lose tokens to `data.max_length`."""
    cut = [row for row in side.looks if row.lost_prompt or row.lost_answer]
    if not cut:
        return
    kept = [row for row in side.looks if row.dropped is None]
    longest = np.array([row.prompt_tokens + max(row.answer_tokens, default=0) for row in kept])
    prompts, answers = sum(row.lost_prompt > 0 for row in cut), sum(row.lost_answer > 0 for row in cut)
    sides = [f"the prompt of {prompts:,}"] * bool(prompts) + [f"an answer's end of {answers:,}"] * bool(answers)
    sentence = (
        f"{_counted(cut, side)} longer than data.max_length {inspected.config.data.max_length} and cut: "
        f"{' and '.join(sides)} (the longest row has {longest.max():,} tokens)."
    )
    level = "warning" if len(cut) > MUCH_TRUNCATION * len(kept) or answers else "note"
    enough = int(np.quantile(longest, 0.99, method="higher"))
    advice = f"data.max_length={enough} would keep 99 of 100 rows whole"
    advice += "; an answer that is cut has no end-of-turn token, so that its model may not learn to stop." * bool(answers)
    rows = [row.location for row in cut]
    yield Finding("truncated", level, side.name, sentence, advice.rstrip(".") + ".", rows)


def without_prompt(inspected: Inspected, side: Side) -> Iterable[Finding]:
    rows = _rows(side, lambda row: row.no_prompt)
    if rows:
        advice = "Name the prompt's column in data.columns, fill it in, or remove the row."
        yield Finding("empty_prompt", "warning", side.name, f"{_counted(rows, side)} without a prompt.", advice, rows)


def moved(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Prompts whose last tokens are others when an answer follows."""
    rows = _rows(side, lambda row: row.moved is not None and row.dropped is None)
    if not rows:
        return
    example = next((row for row in side.looks if isinstance(row.moved, tuple) and row.dropped is None), None)
    shown = ""
    if example is not None and isinstance(example.moved, tuple):
        alone, together = example.moved
        shown = f": in {example.location} the prompt alone ends in {alone!r}, and with its answer there is {together!r}"
    yield Finding(
        *("moved_boundary", "note", side.name),
        f"{_counted(rows, side)} tokenised otherwise as a whole than prompt and answer apart, so that the answer begins "
        f"earlier, at the first token that differs{shown}.",
        "Put white space at the beginning of answers, not at the end of prompts; of a template that opens the answer (such "
        "as with <think>) this is meant.",
        rows,
    )


def open_ends(inspected: Inspected, side: Side) -> Iterable[Finding]:
    rows = _rows(side, lambda row: bool(row.open_ends) and row.dropped is None)
    if rows:
        yield Finding(
            *("no_end", "problem", side.name),
            f"{_counted(rows, side, HAS)} an answer that ends in neither an end-of-turn nor an end-of-sequence token: "
            "a model that learns it does not learn to stop.",
            "Use a chat template that closes the assistant's turn (data.chat_template), or the template of this model.",
            rows,
        )


def special_tokens(inspected: Inspected, side: Side) -> Iterable[Finding]:
    rows = _rows(side, lambda row: bool(row.special_inside))
    if rows:
        names = ", ".join(dict.fromkeys(row.special_inside for row in side.looks if row.special_inside))
        yield Finding(
            *("special_token", "warning", side.name),
            f"{_counted(rows, side, HAS)} a special token as text ({names:.80}), which is read as that token.",
            "Remove it from the texts: template and tokenizer put special tokens where they belong.",
            rows,
        )


def repeated(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Rows that say what another one has said, or the opposite."""
    first: dict[tuple[int, ...], str] = {}
    again, against = [], []
    for row in side.looks:
        if row.dropped is not None:
            continue
        key = (row.prompt_key, *row.answer_keys)
        if key in first:
            again.append(f"{row.location} (as {first[key]})")
            continue
        opposite = (row.prompt_key, *row.answer_keys[::-1])
        if side.report.kind == "pairs" and opposite in first:
            against.append(f"{row.location} (against {first[opposite]})")
        first[key] = row.location
    if again:
        sentence = f"{_counted(again, side)} an exact repetition of an earlier one."
        advice = "Remove them, or say by the source's weight that some rows are to be seen more often."
        yield Finding("duplicate", "warning", side.name, sentence, advice, again)
    if against:
        sentence = f"{_counted(against, side)} the same as another one with chosen and rejected exchanged."
        yield Finding("contradiction", "problem", side.name, sentence, "Decide which of the two answers is better.", against)


def length_bias(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Whether the length of an answer tells whether it is the better one."""
    if side.report.kind not in ("pairs", "labels") or not len(side.groups):
        return
    tokens = side.tokens()
    if side.report.kind == "labels":
        one, other = tokens["desirable"], tokens["undesirable"]
        if min(len(one), len(other)) < FEWEST_PAIRS_FOR_LENGTH:
            return
        ranks = np.searchsorted(np.sort(other), one, "left") + np.searchsorted(np.sort(other), one, "right")
        share, number = float(ranks.mean() / 2 / len(other)), min(len(one), len(other))
        words = ("desirable", "undesirable", "of a desirable and an undesirable answer drawn at random, the former is")
    else:
        one, other = tokens["chosen"], tokens["rejected"]
        number = int((one != other).sum())
        if number < FEWEST_PAIRS_FOR_LENGTH:
            return
        share = float((one > other).sum() / number)
        words = ("chosen", "rejected", f"of the {number:,} pairs with answers of unlike length, the chosen one is")
    side_of, part = ("longer", share) if share >= 0.5 else ("shorter", 1 - share)
    if part < MUCH_OF_LENGTH or (part - 0.5) * 2 * number**0.5 < STANDARD_ERRORS:
        return
    yield Finding(
        *("length_bias", "warning", side.name),
        f"Length tells which answer is better: {words[2]} the {side_of} one in {part:.0%} (mean {one.mean():.0f} tokens "
        f"{words[0]}, {other.mean():.0f} {words[1]}); a model may learn to be {side_of} in place of better.",
        "Balance the lengths in the data, or use objective.length_penalty, objective.ld_alpha or a loss on means of tokens "
        "(ipo, simpo).",
    )


def languages(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Pairs whose answers are told apart by their language, and answers in another language than the prompt."""
    if side.report.kind in ("pairs", "lists"):
        rows = _rows(side, lambda row: row.dropped is None and any(differ(row.answer_languages[0], other)
                                                                    for other in row.answer_languages[1:]))  # fmt: skip
        if rows:
            sentence = f"{_counted(rows, side, HAS)} answers in different languages, so that the language tells them apart."
            advice = "Keep them only where the language is what is to be learned."
            yield Finding("answers_in_other_languages", "warning", side.name, sentence, advice, rows)
    rows = _rows(side, lambda row: row.dropped is None and all(differ(row.prompt_language, one)
                                                                for one in row.answer_languages))  # fmt: skip
    if rows:
        sentence = f"{_counted(rows, side)} answered in another language than the prompt's."
        advice = "Look at them: of translations this is meant (languages are guessed from scripts and common words)."
        yield Finding("other_language", "note", side.name, sentence, advice, rows)


def label_balance(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Whether desirable and undesirable answers weigh about the same, of those that are trained on."""
    report = side.report
    if side.name != "train" or report.kind != "labels" or not (report.num_desirable and report.num_undesirable):
        return
    words, advice = balance(inspected.config.objective, report)
    if advice:
        numbers = f"{report.num_desirable:,} desirable, {report.num_undesirable:,} undesirable"
        yield Finding("label_balance", "note", side.name, f"{words.capitalize()} ({numbers}).", f"{advice}.")


def too_long(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """Rows longer than what the model has seen."""
    positions, longest = inspected.model.shape.max_positions, inspected.config.data.max_length
    rows = []
    for row in side.looks:
        tokens = row.prompt_tokens + max(row.answer_tokens, default=0)
        if row.dropped is None and (tokens if longest is None else min(tokens, longest)) > positions:
            rows.append(row.location)
    if rows:
        sentence = f"{_counted(rows, side)} longer than the {positions:,} positions of the model (max_position_embeddings)."
        yield Finding("too_long", "warning", side.name, sentence, f"Set data.max_length to {positions} or less.", rows)


def remarks(inspected: Inspected, side: Side) -> Iterable[Finding]:
    """What the trainer itself remarks on the rows, but for what is said above in more words."""
    for line in side.report.remarks():
        if not line.startswith("warning: ") and line not in side.report.splits:
            yield Finding("unread", "note", side.name, f"{line[0].upper()}{line[1:]}.", "")


CHECKS: tuple[Callable[[Inspected, Side], Iterable[Finding]], ...] = (
    *(refused, dropped, truncated, without_prompt, moved, open_ends, special_tokens, repeated, length_bias, languages),
    *(label_balance, too_long, remarks),
)
"""Of one side each."""


def leaked(train: Side, held_out: Side) -> Iterable[Finding]:
    """Held-out rows that are trained on."""
    kept = [row for row in train.looks if row.dropped is None]
    prompts = {row.prompt_key: row.location for row in kept if not row.no_prompt}
    whole = {(row.prompt_key, *sorted(row.answer_keys)): row.location for row in kept}
    same, prompt_only = [], []
    for row in held_out.looks:
        key = (row.prompt_key, *sorted(row.answer_keys))
        if row.dropped is not None:
            continue
        if key in whole:
            same.append(f"{row.location} (as {whole[key]})")
        elif row.prompt_key in prompts and not row.no_prompt:
            prompt_only.append(f"{row.location} (as {prompts[row.prompt_key]})")
    if same:
        sentence = f"{_counted(same, held_out)} among the training rows, too: evaluation shows what was learned by heart."
        yield Finding("leaked_row", "problem", held_out.name, sentence, "Take them out of data.train or data.eval.", same)
    if prompt_only:
        sentence = f"{_counted(prompt_only, held_out, HAS)} a prompt that is trained on with other answers."
        yield Finding("leaked_prompt", "warning", held_out.name, sentence, "Split the data by prompts.", prompt_only)


def room_left(inspected: Inspected) -> Iterable[Finding]:
    packed = inspected.packed
    if packed is None or packed.fill >= MUCH_PADDING or packed.per_step * packed.num_steps < FEWEST_BINS:
        return
    tokens, pairs = inspected.config.train.tokens_per_micro_batch, packed.pairs_per_micro_batch
    yield Finding(
        *("room_left", "note", "train"),
        f"Micro-batches of train.tokens_per_micro_batch {tokens:,} are {packed.fill:.0%} full, with {pairs:.1f} rows each.",
        "Nothing is padded, so that this costs little; data.step_tokens_multiple_of, another train.pairs_per_step or "
        "train.tokens_per_micro_batch fills them better.",
    )


def _rows(side: Side, what: Callable[[RowLook], bool]) -> list[str]:
    return [row.location for row in side.looks if what(row)]


IS, HAS = ("is", "are"), ("has", "have")


def _counted(rows: Sequence[object], side: Side, verb: tuple[str, str] = IS) -> str:
    """ "1 of 20 pairs is", "3 of 20 pairs are"."""
    return f"{len(rows):,} of {len(side.looks):,} {side.report.noun}s {verb[len(rows) != 1]}"
