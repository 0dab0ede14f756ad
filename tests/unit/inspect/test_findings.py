"""Each fault that can be planted in a data set is found, with its row; of clean rows nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config.schema import Config
from megadpo.inspect.data import read_data
from megadpo.inspect.findings import Finding, findings
from megadpo.inspect.languages import differ, language_of
from megadpo.inspect.summary import Summary, look_at_all
from megadpo.validation.load import load_config
from tests.helpers.models import save_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
OPEN_TEMPLATE = TEMPLATE.replace("</s>", "\n")
WORDS = (
    *("the", "and", "you", "that", "for", "with", "are", "this", "have", "not", "what", "they", "from"),
    *("would", "which", "can", "about", "river", "stone", "lamp", "green"),
)
LONG = " ".join(["for the river and you would have this from that stone"] * 12)


def text(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, count))


def pair(random: np.random.Generator) -> dict[str, str]:
    """A row with nothing odd about it."""
    prompt = f"Question: {text(random, 12)}?\n"
    return {
        "prompt": prompt,
        "chosen": text(random, random.integers(6, 14)),
        "rejected": text(random, random.integers(6, 14)),
    }


def clean(count: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [pair(random) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("inspect") / "model", num_hidden_layers=1)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(
    tmp_path: Path, model: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, **data: Any
) -> Config:
    options: dict[str, Any] = {"train": write(tmp_path / "train.jsonl", rows), "cache_dir": str(tmp_path / "cache"), **data}
    if held_out is not None:
        options["eval"] = write(tmp_path / "eval.jsonl", held_out)
    objective = options.pop("objective", {})
    train = {"tokens_per_micro_batch": 2048, "pairs_per_step": 32}
    return load_config({"model": {"path": str(model)}, "data": options, "train": train, "objective": objective})


def found(tmp_path: Path, model: Path, rows: list[dict[str, Any]], *args: Any, **data: Any) -> list[Finding]:
    return findings(read_data(config(tmp_path, model, rows, *args, **data)))


def test_of_clean_rows_nothing_is_said(tmp_path: Path, model: Path) -> None:
    assert found(tmp_path, model, clean(80), clean(10, seed=1), max_length=256) == []


def test_each_held_out_set_is_looked_at_under_its_name(tmp_path: Path, model: Path) -> None:
    options = config(tmp_path, model, rows := clean(40), max_length=256)
    sets = {"good": clean(5, seed=1), "leaky": [*clean(4, seed=2), rows[7]]}
    options.data.eval = {name: write(tmp_path / f"{name}.jsonl", some) for name, some in sets.items()}
    inspected = read_data(options)
    assert [(side.name, len(side.groups)) for side in inspected.sides] == [
        ("train", 40),
        ("eval good", 5),
        ("eval leaky", 5),
    ]
    (one,) = findings(inspected)
    assert (one.name, one.side, [Path(place.split()[0]).name for place in one.rows]) == (
        *("leaked_row", "eval leaky"),
        ["leaky.jsonl:5"],
    )


CLEAN = 40
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "identical": ({"rejected": "the same answer", "chosen": "the same answer"}, "warning"),
    "empty": ({"rejected": "  "}, "warning"),
    "difference_cut_away": ({"chosen": f"{LONG} river", "rejected": f"{LONG} stone"}, "warning"),
    "truncated": ({"chosen": f"{LONG} river"}, "warning"),
    "empty_prompt": ({"prompt": ""}, "warning"),
    "moved_boundary": ({"prompt": "Question: which river? Answer: th", "chosen": "e river"}, "note"),
    "special_token": ({"chosen": "the river</s> and you have that"}, "warning"),
    "answers_in_other_languages": ({"chosen": "这是一个关于河流的回答，河流在山谷中流动"}, "warning"),
    "other_language": ({"prompt": "Почему река течёт через долину?\n"}, "note"),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[Finding]:
    """One row for each fault after the clean ones; then a repetition, a contradiction, and held-out rows that leak."""
    directory, random = tmp_path_factory.mktemp("planted"), np.random.default_rng(7)
    rows = clean(CLEAN) + [{**pair(random), **fault} for fault, _ in FAULTS.values()]
    rows += [rows[2], {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}]
    held_out = [*clean(5, seed=3), rows[5], {**pair(random), "prompt": rows[6]["prompt"]}]
    return found(directory, model, rows, held_out, max_length=128)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_its_row_and_in_no_other(planted: list[Finding], name: str) -> None:
    (one,) = [one for one in planted if one.name == name]
    row = CLEAN + list(FAULTS).index(name) + 1
    assert [Path(place).name for place in one.rows] == [f"train.jsonl:{row}"]
    assert (one.level, one.side) == (FAULTS[name][1], "train") and one.advice
    assert one.sentence.startswith(f"1 of {CLEAN + len(FAULTS) + 2} pairs ")


@pytest.mark.parametrize(
    ("name", "level", "side", "row"),
    [
        ("duplicate", "warning", "train", f"train.jsonl:{CLEAN + len(FAULTS) + 1} (as train.jsonl:3)"),
        ("contradiction", "problem", "train", f"train.jsonl:{CLEAN + len(FAULTS) + 2} (against train.jsonl:4)"),
        ("leaked_row", "problem", "eval", "eval.jsonl:6 (as train.jsonl:6)"),
        ("leaked_prompt", "warning", "eval", "eval.jsonl:7 (as train.jsonl:7)"),
    ],
)
def test_rows_that_say_what_another_one_says_name_both(
    planted: list[Finding], name: str, level: str, side: str, row: str
) -> None:
    (one,) = [one for one in planted if one.name == name]
    assert (one.level, one.side, [" ".join(_names(place)) for place in one.rows]) == (level, side, [row])


def _names(place: str) -> list[str]:
    head, word, tail = place.split(" ")
    return [Path(head).name, word, Path(tail).name]


def test_nothing_else_is_said_of_the_planted_rows_and_the_gravest_comes_first(planted: list[Finding]) -> None:
    assert {one.name for one in planted} == {*FAULTS, "duplicate", "contradiction", "leaked_row", "leaked_prompt"}
    levels = [one.level for one in planted]
    assert levels == sorted(levels, key=["problem", "warning", "note"].index)


def test_the_moved_boundary_shows_both_tokens(planted: list[Finding]) -> None:
    (one,) = [one for one in planted if one.name == "moved_boundary"]
    assert "the prompt alone ends in ' th', and with its answer there is ' the" in one.sentence


def test_the_advised_max_length_keeps_rows_whole(tmp_path: Path, model: Path) -> None:
    rows = [*clean(20), {**clean(1)[0], **FAULTS["truncated"][0]}]
    (one,) = found(tmp_path, model, rows, max_length=128)
    assert "an answer's end of 1" in one.sentence and "data.max_length 128" in one.sentence
    advised = int(one.advice.split("data.max_length=")[1].split(" ")[0])
    assert found(tmp_path, model, rows, max_length=advised) == []
    assert [one.name for one in found(tmp_path, model, rows, max_length=advised - 1)] == ["truncated"]


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in clean(count)
    ]


def test_a_template_that_leaves_turns_open_is_found_and_one_that_closes_them_is_not(tmp_path: Path, model: Path) -> None:
    for template, names in ((TEMPLATE, []), (TEMPLATE.replace("</s>", "</s>\n"), []), (OPEN_TEMPLATE, ["no_end"])):
        looked = look_at_all(config(tmp_path, model, conversations(40), chat_template=template), 1)
        assert [one.name for one in looked.findings] == names
        assert (
            looked.rendered is not None
            and "user:\nQuestion: " in looked.rendered[1]
            and looked.inspected.template.endswith("text")
        )


@pytest.mark.parametrize(("side", "word"), [("chosen", "longer"), ("rejected", "shorter")])
def test_answers_that_length_tells_apart_are_found(tmp_path: Path, model: Path, side: str, word: str) -> None:
    rows = [{**row, side: f"{row[side]} and this river that you have"} for row in clean(60)]
    (one,) = found(tmp_path, model, rows)
    assert one.name == "length_bias" and f"the chosen one is the {word} one in " in one.sentence


def test_labelled_answers_lists_and_examples_are_looked_at_as_what_they_are(tmp_path: Path, model: Path) -> None:
    rows = clean(40)
    labelled = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0} for place, row in enumerate(rows)
    ]
    listed = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]], "scores": [1, 0]} for row in rows]
    examples = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    roles = {"kto": ["desirable", "undesirable"], "plackett_luce": ["best", "others"], "sft": ["answer"]}
    for (loss, answers), some in zip(roles.items(), (labelled, listed, examples), strict=True):
        broken = [*some, {**some[0], **({"responses": ["", "x"]} if loss == "plackett_luce" else {"completion": " "})}]
        looked = look_at_all(config(tmp_path, model, broken, objective={"loss_type": loss}), 1)
        assert [one.name for one in looked.findings] == ["empty"]
        assert list(looked.to_dict()["data"]["train"]["tokens"]) == ["prompt", *answers]
        assert looked.samples[0].parts[1].pieces[-1].text == "</s>"


def test_labels_out_of_balance_are_told_with_the_trainer_s_own_advice(tmp_path: Path, model: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": place % 4 == 0}
        for place, row in enumerate(clean(40))
    ]
    (one,) = found(tmp_path, model, rows, objective={"loss_type": "kto"})
    assert (
        one.name == "label_balance"
        and "weigh 0.333 times" in one.sentence
        and "(10 desirable, 30 undesirable)" in one.sentence
    )
    assert "objective.desirable_weight 3 to 4" in one.advice


def test_rows_longer_than_the_model_s_positions_are_told(tmp_path: Path, model: Path) -> None:
    options = config(tmp_path, model, [*clean(8), {**clean(1)[0], "prompt": "river " * 3000 + "?\n"}], max_length=None)
    options.train.tokens_per_micro_batch = 40_000
    (one,) = findings(read_data(options))
    assert (one.name, one.rows) == ("too_long", [f"{tmp_path}/train.jsonl:9"]) and "2,048 positions" in one.sentence


def test_what_the_trainer_would_refuse_is_said_with_its_sentence(tmp_path: Path, model: Path) -> None:
    options = config(tmp_path, model, clean(40))
    options.train.tokens_per_micro_batch = 40
    looked = look_at_all(options, 1)
    assert (
        looked.findings[0].name == "refused" and "more than train.tokens_per_micro_batch = 40" in looked.findings[0].sentence
    )
    assert looked.inspected.packed is None and len(looked.samples) == 1
    identical = [{**row, "chosen": row["rejected"]} for row in clean(5)]
    names = [one.name for one in found(tmp_path, model, identical)]
    assert names == ["refused", "identical"]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Summary:
    return look_at_all(config(tmp_path_factory.mktemp("clean"), model, clean(40), clean(8, seed=1)), 2)


def test_the_cache_holds_what_was_looked_at_so_that_training_reads_it(looked: Summary) -> None:
    from megadpo.data.rows.dataset import prepare_groups

    options = looked.inspected.config.data
    entries = {
        path.name: path.stat().st_ino for path in (Path(options.cache_dir or "") / "groups").glob("*") if path.is_dir()
    }
    prepared = prepare_groups(options, options.train, str(looked.inspected.model.huggingface))
    assert prepared.groups.digest == looked.train.groups.digest and len(entries) == 2
    assert {name: (Path(options.cache_dir or "") / "groups" / name).stat().st_ino for name in entries} == entries


def test_micro_batches_are_as_full_as_those_that_training_makes(looked: Summary) -> None:
    packing, packed = looked.train.packing, looked.inspected.packed
    assert packing is not None and packed is not None and packed.num_steps == 2
    from megadpo.training.setup import step_sampler

    sampler = step_sampler(looked.inspected.config, packing)
    made = [one for step in range(2) for one in packing.micro_batches(sampler.group_ids(step), 0)]
    assert packed.per_step == len(made) / 2
    assert packed.fill == pytest.approx(sum(one.num_tokens for one in made) / (2048 * len(made)))


def test_tokens_a_row_are_those_with_and_without_sharing(looked: Summary) -> None:
    per_row, groups = looked.to_dict()["data"]["train"]["tokens_per_row"], looked.train.groups
    assert per_row["prompt_shared"] == np.mean([group.num_stream_tokens(True) for group in groups])
    assert per_row["each_with_its_prompt"] == np.mean([group.num_stream_tokens(False) for group in groups])


@pytest.mark.parametrize(
    ("words", "language"),
    [
        ("What would you do with this if you had the time for that?", "English"),
        ("Das ist nicht die Antwort, die ich für das Problem mit dem Haus suche.", "German"),
        ("Les enfants sont dans la maison avec une amie qui est très gentille.", "French"),
        ("El perro y los gatos son muy grandes, pero también está en la casa.", "Spanish"),
        ("Почему река течёт через долину?", "Cyrillic"),
        ("这是一个关于河流的问题", "Chinese"),
        ("これは川についての質問です", "Japanese"),
        ("이것은 강에 대한 질문입니다", "Korean"),
        ("print(x ** 2 + zq) # qwx", "Latin script"),
        ("3.14 + 2 = ?", "no letters"),
    ],
)
def test_languages_are_told_by_script_and_common_words(words: str, language: str) -> None:
    assert language_of(words) == language


def test_a_script_alone_is_no_other_language_than_one_of_its_own() -> None:
    assert not differ("English", "Latin script") and not differ("no letters", "Chinese")
    assert differ("English", "German") and differ("Latin script", "Chinese")
