"""Rows, files and configurations that are not what they seem: refused in one sentence, or read as they are meant.

Each case is drawn from its number alone. It begins with a good row of some format, damages it (a value of another type or
size, a key renamed, doubled or dropped, another role, a user's words in an answer, a picture) or the bytes of its file, and
reads it as a run does. Whatever is no UserError is a traceback, and a failure.

Nonsense is told by the words. Every word of a row begins with two letters that say what it is: qq of the question, ss of the
system's text, cc of the chosen (or only) answer, rr of the rejected one, uu of a user inside an answer, xx of columns that
nobody reads. Of what was accepted, in the decoded token ids:

* an answer has no word of the question, the system, a user or an unread column; the chosen one none of the rejected and the
  reverse; a prompt none of an answer: nothing is learned that the assistant did not say, or on the wrong side;
* every word of the question and the system that is still in the row is in a prompt, or in a column that the report lists
  as unread: no answer is learned without its question in silence; a prompt without a word is counted as empty;
* there is no digit, brace, bracket, quote, None, True, False or nan: the words have none, so they would be Python's or
  JSON's picture of a value that is no text (not asked of rows into which the damage puts such texts);
* turns are those of user, assistant, system, developer and tool;
* rows kept and dropped add up to the rows read, no answer is empty, and the answers of a pair differ;
* what must be refused (a key twice, a picture, a whole number of 5,000 digits) was.

Of a configuration: every value has its option's type, no number is nan, and 010, 1:30, no and the like are what YAML 1.2
says and not what YAML 1.1 did.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import random
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megadpo.config import strict
from megadpo.config.schema import Config
from megadpo.config.sources import parse_sources
from megadpo.data.rows import dataset
from megadpo.data.rows.formats import KINDS, Reading
from megadpo.data.rows.report import DataReport
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.validation.load import load_config
from tests.helpers.models import save_tokenizer

NUM_FAST, NUM_EXHAUSTIVE = 400, 10_000
TEMPLATE = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ ' call ' ~ call.name }}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROLES = {"user", "assistant", "system", "developer", "tool", "end"}


@dataclasses.dataclass
class Case:
    """A damaged row: as a value, or as the text of an object where no value has it (a key twice)."""

    row: Any
    kind: str
    rng: random.Random
    text: str | None = None
    must_refuse: bool = False
    what: str = "unchanged"


def words(rng: random.Random, prefix: str) -> str:
    letters = "abdefghijklmnoptvwyz"
    return " ".join(prefix + "".join(rng.choices(letters, k=rng.randint(3, 6))) for _ in range(rng.randint(2, 5)))


# Good rows


def good_row(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A row of some format and the kind that it is read as."""
    q, c, r, s = (words(rng, prefix) for prefix in ("qq", "cc", "rr", "ss"))
    q += "?"  # which no tokenizer joins with the answer's first letters
    user, better, worse = message("user", q), message("assistant", c), message("assistant", r)
    sides = {"chosen": c, "rejected": r}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {}}]}
    pairs: list[dict[str, Any]] = [
        {"prompt": q, **sides},
        {"prompt": [user], "chosen": [better], "rejected": [worse]},
        {"prompt": [message("system", s), user], "chosen": [better], "rejected": [worse]},
        {"chosen": [user, better], "rejected": [user, worse]},
        {"prompt": q, "chosen": [user, better], "rejected": [user, worse], "score_chosen": 8.5, "score_rejected": 3},
        {"chosen": f"{q} {c}", "rejected": f"{q} {r}"},
        {"chosen": f"\n\nHuman: {q}\n\nAssistant: {c}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {r}"},
        {"conversations": [turn("human", q)], "chosen": turn("gpt", c), "rejected": turn("gpt", r), "system": s},
        {"instruction": q, "input": words(rng, "qq") + "?", **sides},
        {"system": s, "question": q, **sides, "source": words(rng, "xx")},
        {"prompt": q, "response_1": r, "response_2": c, "preference_strength": 2},
        {"context": [user], "response1": c, "response2": r, "overall_preference": -1},
        {"prompt": [user, call, message("tool", "found")], "chosen": [better], "rejected": [worse], "tools": []},
        {"prompt": [user, message("assistant", "begun")], "chosen": [better], "rejected": [worse]},
        {"prompt": json.dumps([user]), "chosen": json.dumps([better]), "rejected": json.dumps([worse])},
        {"prompt": [{"role": "User", "content": [{"type": "text", "text": q}]}], "chosen": [better], "rejected": [worse]},
    ]
    singles: list[dict[str, Any]] = [
        {"prompt": q, "completion": c, "label": True},
        {"messages": [user, better], "label": False},
        {"conversations": [turn("human", q), turn("gpt", c)], "label": 1},
        {"prompt": [user], "completion": [better], "label": True},
        {"instruction": q, "output": c, "label": True},
    ]
    lists: list[dict[str, Any]] = [
        {"prompt": q, "responses": [c, words(rng, "cc"), words(rng, "cc")], "scores": [1, 2.5, 0]},
        {"prompt": [user], "responses": [[better], [message("assistant", words(rng, "cc"))]], "ranks": [2, 1]},
        {
            "instruction": q,
            "completions": [{"response": c, "overall_score": 3}, {"response": f"{c} cc", "overall_score": 1}],
        },
    ]
    kind = rng.choice(("pairs", "pairs", *KINDS))
    rows = {"pairs": pairs, "labels": singles + pairs, "lists": lists + pairs, "examples": singles + pairs}[kind]
    return copy.deepcopy(rng.choice(rows)), kind


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def turn(said_by: str, value: str) -> dict[str, Any]:
    return {"from": said_by, "value": value}


# Damage


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield value, key
        yield from places(item)


JUNK: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice((None, True, False, 0, 3, -1, 10**30, 1.5, math.inf, -math.inf, math.nan)),
    lambda rng: rng.choice(
        ("", " ", "\n\t", "\u200b", "\ufeff", "\u202eabc", "Ａ", "a\u0301", "\U0001f600", "a\u0000b", "\u2028")
    ),
    lambda rng: rng.choice(([], {}, [None], [[]], [{}], ["a", "b"], [3], {"a": 1}, {"role": "user"}, [{"content": "a"}])),
    lambda rng: functools.reduce(lambda inner, _: rng.choice(([inner], {"a": inner})), range(rng.choice((3, 60, 400))), "a"),
    lambda rng: "a" * rng.choice((10, 10_000)),
    lambda rng: [{"type": "image", "image": "a.png"}],
    lambda rng: [{"type": "text", "text": words(rng, "xx")}, {"type": "image_url", "image_url": {"url": "a"}}],
    lambda rng: {"answer": words(rng, "xx"), "score": 1},
)


def replace_value(case: Case) -> None:
    container, key = case.rng.choice(list(places(case.row)))
    container[key] = case.rng.choice(JUNK)(case.rng)


def drop_key(case: Case) -> None:
    container, key = case.rng.choice(list(places(case.row)))
    del container[key]


def rename_key(case: Case) -> None:
    found = [(container, key) for container, key in places(case.row) if isinstance(container, dict)]
    container, key = case.rng.choice(found)
    spellings = (key.upper(), key.capitalize(), f" {key}", f"{key}s", key[:-1], f"{key}_text", "", "null", key + "\u0000")
    container[case.rng.choice(spellings)] = container.pop(key)


def double_key(case: Case) -> None:
    key = case.rng.choice(list(case.row))
    pairs = [*case.row.items(), (key, case.rng.choice((case.row[key], None, words(case.rng, "xx"))))]
    case.rng.shuffle(pairs)
    case.text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"


def wrap_value(case: Case) -> None:
    container, key = case.rng.choice(list(places(case.row)))
    container[key] = case.rng.choice(
        ([container[key]], {"text": container[key]}, {"value": container[key]}, [container[key]] * 2)
    )


def change_role(case: Case) -> None:
    names = [(c, key) for c, key in places(case.row) if key in ("role", "from")]
    if names:
        container, key = case.rng.choice(names)
        container[key] = case.rng.choice(NAMES)


NAMES = ("user", "system", "tool", "human", "gpt", "critic", "function_call", "", "ASSISTANT", "developer", None, 1)


MEDIA = ("images", "image", "videos", "audio")


def speak_in_answer(case: Case) -> None:
    answers = [
        value for name in ("chosen", "rejected", "completion", "messages") if isinstance(value := case.row.get(name), list)
    ]
    if answers:
        said = message(case.rng.choice(("user", "system", "human")), words(case.rng, "uu"))
        answer = case.rng.choice(answers)
        answer.insert(case.rng.randint(max(len(answer) - 1, 0), len(answer)), said)


def add_media(case: Case) -> None:
    case.row[case.rng.choice(MEDIA)] = case.rng.choice((["a.png"], "a.png", [b"a".hex()], {"path": "a"}))


def add_column(case: Case) -> None:
    name = case.rng.choice(
        ("text", "note", "id", "prompt_id", "meta", "label", "tools", "chat_template_kwargs", "history", "weight")
    )
    values = (words(case.rng, "xx"), None, 3, {}, [], [["a", "b"]], {"tokenize": False}, {"enable": True}, "[]", "{")
    case.row.setdefault(name, case.rng.choice(values))


def break_unicode(case: Case) -> None:
    texts = [(container, key) for container, key in places(case.row) if isinstance(container[key], str)]
    container, key = case.rng.choice(texts)
    container[key] += case.rng.choice(("\ud800", "\udfff"))


def long_number(case: Case) -> None:
    name = case.rng.choice(("score_chosen", "id", "weight"))
    case.text = json.dumps(case.row | {name: 0}).removesuffix("0}") + "9" * 5000 + "}"


def swap_rows(case: Case) -> None:
    case.row = case.rng.choice(([case.row], "a", 3, None, True, [], {}))


DAMAGES = (
    *(replace_value, replace_value, replace_value, drop_key, rename_key, rename_key, double_key, wrap_value, change_role),
    *(
        change_role,
        speak_in_answer,
        speak_in_answer,
        add_media,
        add_column,
        add_column,
        break_unicode,
        long_number,
        swap_rows,
    ),
)


def damaged_case(number: int) -> Case:
    rng = random.Random(number)
    row, kind = good_row(rng)
    case = Case(row, kind, rng)
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))):
        if isinstance(case.row, dict) and case.row and case.text is None:
            damage = rng.choice(DAMAGES)
            damage(case)
            case.what += f", {damage.__name__}"
    has_media = isinstance(case.row, dict) and any(case.row.get(name) for name in MEDIA)
    case.must_refuse = case.text is not None or has_media
    return case


# Files


def write_case(case: Case, directory: Path) -> tuple[Path, int]:
    """The damaged row in a file, perhaps between good ones, and how many rows there are."""
    around = [good_text_row(case.rng, case.kind) for _ in range(case.rng.choice((0, 0, 1, 2)))]
    rows = [*around, case.row]
    suffixes = [".jsonl", ".jsonl", ".json", ".jsonl.gz"]
    if case.text is None:
        suffixes += [".parquet", ".parquet"] + [".csv"] * fits_csv(case.row)
    file = directory / f"rows{case.rng.choice(suffixes)}"
    content = encoded(file.name, rows, case.text)
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return file, len(rows)


def good_text_row(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind == "lists":
        return {"prompt": words(rng, "qq") + "?", "responses": [words(rng, "cc"), words(rng, "cc")], "scores": [1, 0]}
    row: dict[str, Any] = {"prompt": words(rng, "qq") + "?", "chosen": words(rng, "cc"), "rejected": words(rng, "rr")}
    return row


def encoded(name: str, rows: list[Any], last: str | None) -> bytes:
    if name.endswith(".parquet"):
        content = parquet(rows)
        if content is not None:
            return content
        return b"PAR1" + json.dumps(str(rows)).encode("utf-8", "surrogatepass")  # Arrow has no such value: no parquet file
    if name.endswith(".csv"):
        stream = io.StringIO()
        names = list(dict.fromkeys(str(key) for row in rows for key in row))
        writer = csv.writer(stream)
        writer.writerow(names)
        writer.writerows([cell(row.get(name)) for name in names] for row in rows)
        return stream.getvalue().encode("utf-8", "surrogatepass")
    texts = [json.dumps(row, ensure_ascii=False) for row in rows[:-1]] + [last or json.dumps(rows[-1], ensure_ascii=False)]
    joined = "\n".join(texts) if ".jsonl" in name else "[" + ",\n".join(texts) + "]"
    return joined.encode("utf-8", "surrogatepass")


def fits_csv(row: Any) -> bool:
    """Whether text in the row's cells is text, and JSON in them messages: JSON of anything else cannot be told from text."""
    values = row.values() if isinstance(row, dict) else [row]
    turns = [turn for value in values for turn in (value if isinstance(value, list) else [value])]
    objects = [turn for turn in turns if isinstance(turn, dict | list)]
    keys = [set(item) if isinstance(item, dict) else set() for item in objects]
    return isinstance(row, dict) and all({"role", "content"} <= found or {"from", "value"} <= found for found in keys)


def cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


def parquet(rows: list[Any]) -> bytes | None:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    try:
        names = list(dict.fromkeys(key for row in rows for key in row))
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pyarrow.parquet.write_table(table, stream)
    except (pyarrow.ArrowException, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return stream.getvalue()


def flip_bytes(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        place = rng.randrange(len(content) + 1)
        what = rng.randrange(4)
        if what == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            content[place:place] = rng.randbytes(rng.randint(1, 9))
        elif what == 2:
            del content[place : place + rng.randint(1, 20)]
        else:
            del content[place:]
    file.write_bytes(bytes(content))


# What came of it


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dataset.TokeniseJob:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return dataset.TokeniseJob(str(directory), TEMPLATE, None, "prompt_left")


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """The tokenizer is loaded once: what is attacked are rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load_tokenizer", functools.cache(dataset.load_tokenizer))
        yield


def read_rows(file: Path, kind: str, job: dataset.TokeniseJob) -> tuple[GroupStore, DataReport] | str:
    """What a run reads of the file, or the sentence by which it is refused."""
    try:
        return dataset.make_groups(parse_sources(str(file)), dataclasses.replace(job, reading=Reading(kind)), 1)
    except UserError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence.replace("\\n", "") and "Traceback" not in sentence, sentence
        return sentence


ARTEFACT = re.compile(r"[0-9{}\[\]'\"]|\b(None|True|False|nan|null)\b")


def found_words(text: str, *prefixes: str) -> set[str]:
    return {word for word in re.findall(r"[a-z]+", text) if word[:2] in prefixes}


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for container, key in places(value):
        if isinstance(container[key], str):
            yield container[key]


def nonsense(
    groups: GroupStore, report: DataReport, job: dataset.TokeniseJob, row: Any, texts_are_sound: bool
) -> str | None:
    """What was accepted and must not be; None where all is well.

    Args:
        row: the damaged row, the last of its file.
        texts_are_sound: whether its texts can only have the characters of words, so that others were put there by a reader.
    """
    tokenizer = dataset.load_tokenizer(job.tokenizer_path, job.chat_template)
    if report.num_kept + sum(report.dropped.values()) != report.num_rows or report.num_kept != len(groups):
        return f"rows do not add up: {report}"
    prompts_seen = ""
    for group in groups:
        prompts, answers = ([tokenizer.decode(ids) for ids in side] for side in (group.prompts, group.responses))
        prompts_seen += " ".join(prompts)
        whole = [group.prompt_of(k).tolist() + answer.tolist() for k, answer in enumerate(group.responses)]
        if len(whole) > 1 and all(one == whole[0] for one in whole):
            return "the answers are the same"
        for k, answer in enumerate(answers):
            # Of a list any answer may be a chosen one, but none is of both.
            is_list_of_chosen = report.kind == "lists" and k and not found_words(answer, "rr")
            others = () if is_list_of_chosen else ("cc",) if k == 1 else ("rr",)
            if wrong := found_words(answer, "qq", "ss", "uu", "xx", *others):
                return f"answer {k} has {wrong}: {answer!r}"
        for prompt in prompts:
            if wrong := found_words(prompt, "cc", "rr", "xx"):
                return f"a prompt has {wrong}: {prompt!r}"
        for text in prompts + answers:
            if not set(re.findall(r"<\|(\w*)\|>", text)) <= ROLES:
                return f"an unknown role: {text!r}"
            if texts_are_sound and (artefact := ARTEFACT.search(text)):
                return f"{artefact.group()!r} is no word of a text: {text!r}"
            if "\ufffd" in text and texts_are_sound:
                return f"no Unicode text: {text!r}"
        blank = not any(character.isalpha() for character in re.sub(r"<\|\w+\|>|<s>", "", prompts[0]))
        if blank and report.kind != "examples" and not report.num_empty_prompts and len(prompts[0]) < 40:
            return f"an empty prompt that is not counted: {prompts[0]!r}"
    if isinstance(row, dict) and groups and groups[len(groups) - 1].row == report.num_rows - 1:
        listed = {word for name in report.unread for text in leaves(row.get(name)) for word in found_words(text, "qq", "ss")}
        asked = {word for text in leaves(row) for word in found_words(text, "qq", "ss")}
        if lost := asked - listed - found_words(prompts_seen, "qq", "ss"):
            return f"the question lost {lost}"
    return None


def attack_row(number: int, directory: Path, job: dataset.TokeniseJob) -> bool:
    """Reads the case's file; whether it was accepted."""
    case = damaged_case(number)
    about = f"case {number} ({case.what}) as {case.kind}: {(case.text or repr(case.row))[:600]}"
    file, num_rows = write_case(case, directory)
    try:
        result = read_rows(file, case.kind, job)
    except Exception as error:
        raise AssertionError(f"{about}: a traceback of {error!r}") from error
    finally:
        file.unlink()
    if isinstance(result, str):
        assert case.what != "unchanged" or "no " in result or "all 1 rows" in result or "all 2 rows" in result, (
            f"{about}: {result}"
        )
        return False
    assert not case.must_refuse, f"{about}: it must be refused, {file.suffix}"
    assert result[1].num_rows == num_rows or file.suffix == ".csv", about
    sound = not any(word in case.what for word in ("replace", "wrap", "column", "rename"))
    wrong = nonsense(*result, job, case.row, sound)
    assert wrong is None, f"{about} in {file.name}: {wrong}"
    return True


def attack_bytes(number: int, directory: Path, job: dataset.TokeniseJob) -> bool:
    rng = random.Random(f"bytes {number}")
    row, kind = good_row(rng)
    while set(row) == {"chosen", "rejected"} and isinstance(row["chosen"], str) and "\n" not in row["chosen"]:
        row, kind = good_row(rng)  # nobody can tell a damaged common beginning from two answers
    case = Case(row, kind, rng)
    file, _ = write_case(case, directory)
    flip_bytes(file, rng)
    content = file.read_bytes()
    try:
        result = read_rows(file, kind, job)
    except Exception as error:
        raise AssertionError(
            f"bytes {number}, {file.name} as {kind}: a traceback of {error!r}: {content[:500]!r}"
        ) from error
    finally:
        file.unlink()
    if isinstance(result, str):
        return False
    wrong = nonsense(*result, job, None, texts_are_sound=False)
    assert wrong is None, f"bytes {number}, {file.name} as {kind}: {wrong}: {content[:500]!r}"
    return True


# Configurations

SCALARS: dict[str, object] = {
    "010": 10,
    "0x1F": 31,
    "0o17": 15,
    "1e-6": 1e-6,
    "5E-7": 5e-7,
    ".5": 0.5,
    "1_000": 1000,
    "7": 7,
    "-3": -3,
    "+2": 2,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "1:30": "1:30",
    "12:30:45": "12:30:45",
    "no": "no",
    "On": "On",
    "2024-01-01": "2024-01-01",
    "0b11": "0b11",
    "abc": "abc",
    "'010'": "010",
    '"no"': "no",
    ".inf": math.inf,
    "1__0": "1__0",
}
OTHERS = (
    ".nan",
    "*a",
    "&a",
    "&a [*a]",
    "!!python/name:os.system",
    "!!binary aGk=",
    "[1, [2]]",
    "{a: 1}",
    "{<<: 3}",
    "[",
    "}",
    "%",
    "@",
)
MORE = (
    "\t",
    "- a",
    "!!set {a}",
    "!!int 1:30",
    "!!float x",
    "!!timestamp 2024-01-01",
    "? a",
    "'",
    "\u0000",
    "\ud800",
    "é",
    "9" * 5000,
)


def check_types(config: Config) -> str | None:
    """Values of another type than their option's, or nan."""
    for section in dataclasses.fields(Config):
        part = getattr(config, section.name)
        if not dataclasses.is_dataclass(part):
            continue
        for name, hint in typing.get_type_hints(type(part)).items():
            value = getattr(part, name)
            if hint is not Any and strict._converted(hint, value) is strict.MISSPELT:
                return f"{section.name}.{name} is {value!r}"
            if any(
                isinstance(item, float) and math.isnan(item)
                for item in (value if isinstance(value, tuple | list) else [value])
            ):
                return f"{section.name}.{name} is nan"
            if isinstance(value, str) and value.lower() in strict.WORDS:
                return f"{section.name}.{name} is the text {value!r}"
    return None


def attack_configuration(number: int, directory: Path) -> bool:
    rng = random.Random(f"yaml {number}")
    key = rng.choice([key for key in strict.all_keys(Config) if "." in key] + ["output_dir", "nonsense", "train.step", ""])
    scalar = rng.random() < 0.6
    text = rng.choice(list(SCALARS)) if scalar else rng.choice((*OTHERS, *MORE))
    section, _, name = key.partition(".")
    written = f"{section}:\n  {name}: {text}\n" if name else f"{section}: {text}\n"
    if rng.random() < 0.3:
        place = rng.randrange(len(written) + 1)
        written = (
            written[:place]
            + rng.choice(("\t", ":", "\n", " ", "#", "-", "\u0000", "\u0085", "'", "&b ", "*b"))
            + written[place:]
        )
        scalar = False
    file = directory / "run.yaml"
    file.write_bytes(written.encode("utf-8", "surrogatepass"))
    accepted = False
    for source, overrides in ((file, []), ({}, [f"{key}={text}"])):
        try:
            config = load_config(source, overrides)
        except UserError as error:
            assert "Traceback" not in str(error)
            continue
        except Exception as error:
            raise AssertionError(f"yaml {number}: {written!r}, {overrides}: a traceback of {error!r}") from error
        accepted = True
        wrong = check_types(config)
        assert wrong is None, f"yaml {number}: {written!r}, {overrides}: {wrong}"
        if scalar and name:
            value, expected = getattr(getattr(config, section), name), SCALARS[text]
            is_word = isinstance(value, bool) and isinstance(expected, str) and strict.WORDS[expected.lower()] is value
            is_text = isinstance(value, str) and value == text.strip("'\"" if source == file else "")
            is_number = isinstance(value, float) and isinstance(expected, str) and "'" in text and float(expected) == value
            is_path = isinstance(value, str) and isinstance(expected, str) and value.endswith(expected)
            assert value == expected or is_word or is_text or is_path or is_number, (
                f"yaml {number}: {key}={text} was read as {value!r}"
            )
    return accepted


# The attacks


def attack(number: int, directory: Path, job: dataset.TokeniseJob) -> bool:
    which = number % 10
    if which < 6:
        return attack_row(number, directory, job)
    return attack_bytes(number, directory, job) if which < 8 else attack_configuration(number, directory)


def test_damaged_rows_files_and_configurations_are_refused_or_read_as_they_are_meant(
    job: dataset.TokeniseJob, tmp_path: Path
) -> None:
    accepted = sum(attack(number, tmp_path, job) for number in range(NUM_FAST))
    assert 0.1 * NUM_FAST < accepted < 0.7 * NUM_FAST  # neither refuses everything nor takes it


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_of_them(part: int, job: dataset.TokeniseJob, tmp_path: Path) -> None:
    for number in range(NUM_FAST + part, NUM_FAST + NUM_EXHAUSTIVE, 10):
        attack(number, tmp_path, job)


@pytest.mark.parametrize("number", range(60))
def test_every_format_that_is_not_damaged_is_read_whole(number: int, job: dataset.TokeniseJob, tmp_path: Path) -> None:
    """The attacks begin with rows that are good: otherwise they would show nothing."""
    rng = random.Random(f"good {number}")
    row, kind = good_row(rng)
    if kind == "labels" and "chosen" not in row and "response_1" not in row and "response1" not in row:
        return  # one label alone is refused
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    result = read_rows(file, kind, job)
    assert not isinstance(result, str), (row, result)
    assert nonsense(*result, job, row, texts_are_sound=True) is None and result[1].num_kept == 1
