"""Real preference rows, read from a directory and cut into a training and a held-out part.

    hh-rlhf-harmless-test.jsonl.gz   anthropics/hh-rlhf: pairs of raw dialogues
    kto_en_demo.json                 hiyouga/LLaMA-Factory: messages with a boolean label
    dpo_zh_demo.json                 hiyouga/LLaMA-Factory: ShareGPT pairs, Chinese

Rows stay as they are in the files. Only those whose text is short are taken, so that a small run is quick.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FILES = {"hh": "hh-rlhf-harmless-test.jsonl.gz", "kto": "kto_en_demo.json", "zh": "dpo_zh_demo.json"}
LONGEST = {"hh": 800, "kto": 900, "zh": 450}
"""Characters of a row's text: prompt and answers together."""
ASSISTANT = "\n\nAssistant:"


def read_rows(directory: Path, name: str) -> list[Row]:
    """The short rows of a file, in its order; those of hh-rlhf that do not differ in the last answer only are left out."""
    path = directory / FILES[name]
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if sum(map(len, texts_of(row))) <= LONGEST[name]]
    return [row for row in rows if as_pair(row) is not None] if name == "hh" else rows


def texts_of(value: object) -> Iterator[str]:
    """Every text inside a row, for its length and for the tokenizer."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_of(item)


def as_pair(row: Row) -> Row | None:
    """A raw hh-rlhf row as prompt, chosen and rejected; None where the two dialogues differ before the last answer."""
    sides = [row[side].rpartition(ASSISTANT) for side in ("chosen", "rejected")]
    (prompt, _, chosen), (other, _, rejected) = sides
    usable = prompt == other and chosen.strip() and rejected.strip() and chosen != rejected
    return {"prompt": prompt + ASSISTANT, "chosen": chosen, "rejected": rejected} if usable else None


def as_lists(rows: list[Row]) -> list[Row]:
    """Ranked lists of three or four answers from pairs, in turn: hh-rlhf has no longer lists of its own.

    The order is what the pairs say and one thing more: an answer to this prompt is better than one to another prompt. So
    the list is chosen, rejected, the next row's chosen answer, the next row's rejected answer.
    """
    pairs = [pair for row in rows if (pair := as_pair(row))]
    lists = []
    for number, (pair, other) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True)):
        responses = [pair["chosen"], pair["rejected"], other["chosen"], other["rejected"]][: 3 + number % 2]
        lists.append({"prompt": pair["prompt"], "responses": responses, "scores": [3, 2, 1, 0][: len(responses)]})
    return lists


def data_sets(rows: dict[str, list[Row]], num_train: int, num_held_out: int) -> dict[str, list[Row]]:
    """What the recipes read, "NAME.train" and "NAME.held_out": each source, the lists, and for SFT all good answers.

    No row is in both parts; lists are made within a part, so that no held-out answer is in a list that is trained.
    """
    sets: dict[str, list[Row]] = {"answers.train": [], "answers.held_out": []}
    for name, source_rows in rows.items():
        parts = {"train": source_rows[:-num_held_out][:num_train], "held_out": source_rows[-num_held_out:]}
        for part, part_rows in parts.items():
            sets[f"{name}.{part}"] = part_rows
            sets[f"answers.{part}"] += [row for row in part_rows if row.get("label", True)]
            if name == "hh":
                sets[f"lists.{part}"] = as_lists(part_rows)
    return sets


def write_rows(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
