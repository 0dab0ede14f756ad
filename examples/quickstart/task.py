"""The quickstart's task: write a word backwards. The right answer is known, so answers can be checked.

A row is `{"prompt": "reverse kqzf =", "chosen": " fzqk", "rejected": " fzkq"}`: the rejected answer is right
but for one slip.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable
from pathlib import Path

LETTERS = string.ascii_lowercase[:16]
SHORTEST, LONGEST = 4, 7

Row = dict[str, str]


def prompt_of(word: str) -> str:
    return f"reverse {word} ="


def right_answer(prompt: str) -> str:
    return " " + prompt.split()[1][::-1]


def wrong_answer(answer: str, generator: random.Random) -> str:
    """A plausible slip: one letter dropped, doubled or replaced, or two neighbours swapped.

    Slips that change the length matter: without them nothing in the pairs speaks against answers of a wrong length.
    """
    letters = list(answer.strip())
    i = generator.randrange(len(letters))
    slip = generator.choice(["drop", "double", "replace", "swap"])
    if slip == "drop":
        del letters[i]
    elif slip == "double":
        letters.insert(i, letters[i])
    elif slip == "swap" and letters[i] != letters[i - 1]:
        letters[i - 1], letters[i] = letters[i], letters[i - 1]
    else:
        letters[i] = generator.choice([letter for letter in LETTERS if letter != letters[i]])
    return " " + "".join(letters)


def make_rows(num_train: int, num_held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Preference pairs for training and for evaluation; no prompt occurs twice, so none is in both."""
    generator = random.Random(seed)
    words: dict[str, None] = {}  # a dict and not a set: its order is reproducible
    while len(words) < num_train + num_held_out:
        words["".join(generator.choices(LETTERS, k=generator.randint(SHORTEST, LONGEST)))] = None
    rows = []
    for word in words:
        prompt = prompt_of(word)
        chosen = right_answer(prompt)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": wrong_answer(chosen, generator)})
    return rows[:num_train], rows[num_train:]


def write_rows(rows: Iterable[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
