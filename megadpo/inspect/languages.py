"""Which script a text is written in, and of Latin ones which language its commonest words are of. A guess, and quick."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

MOST_CHARACTERS = 400
"""Of a text that are looked at."""
FEWEST_LETTERS = 8
"""Fewer say nothing."""
FEWEST_WORDS = 3
"""Common words of a language that a text must have, and it must have more of them than of any other."""
NOTHING = "no letters"
LATIN = "Latin script"

_SCRIPTS = {
    "Japanese": "\u3040-\u30ff",  # kana, before Han: Japanese has both
    "Korean": "\uac00-\ud7af\u1100-\u11ff",
    "Chinese": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002ffff",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
    LATIN: "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
}
_PATTERNS = {name: re.compile(f"[{characters}]") for name, characters in _SCRIPTS.items()}
_COMMON = {
    "English": "the and you that for with are this have not your what they from would which their can about",
    "German": "der die und das nicht ist ich sie ein eine mit für auf dem den sich auch wie wenn sind",
    "French": "les des est une que pour dans qui vous pas sur avec plus sont cette mais être nous votre ces",
    "Spanish": "los las que una por para con del como más pero sus está muy puede esto son hay también ser",
    "Italian": "che della una per non con sono gli del più come anche questo alla nel delle essere può dei ma",
    "Portuguese": "que uma para não com os dos mais como por são você pode das isso mas seu também está ser",
    "Dutch": "het een van dat niet zijn voor met ook als maar bij naar kan deze wordt hebben door dit aan",
}
_LANGUAGES: dict[str, list[str]] = {}
for _name, _words in _COMMON.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_name)
_WORD = re.compile(r"[^\W\d_]+")


def language_of(text: str) -> str:
    """A language, a script where that is all that shows, or `NOTHING`."""
    text = text[:MOST_CHARACTERS]
    script = LATIN if text.isascii() else _script_of(text)
    if script != LATIN:
        return script
    words = _WORD.findall(text.lower())
    if len("".join(words)) < FEWEST_LETTERS:
        return NOTHING
    counts = Counter(chain.from_iterable(_LANGUAGES[word] for word in words if word in _LANGUAGES))
    (best, count), (_, second) = [*counts.most_common(2), (LATIN, 0), (LATIN, 0)][:2]
    return best if count >= FEWEST_WORDS and count > second else LATIN


def _script_of(text: str) -> str:
    counts = {name: len(pattern.findall(text)) for name, pattern in _PATTERNS.items()}
    if sum(counts.values()) < FEWEST_LETTERS:
        return NOTHING
    if counts["Japanese"] and counts["Japanese"] >= 0.1 * counts["Chinese"]:
        return "Japanese"
    return max(counts, key=lambda name: counts[name])


def differ(one: str, other: str) -> bool:
    """Whether two texts are surely not in the same language: a script alone may be any of its languages."""
    if NOTHING in (one, other) or one == other:
        return False
    latin = {LATIN, *_COMMON}
    return not (LATIN in (one, other) and {one, other} <= latin)
