"""The same rows read as pairs, labelled answers, scored lists or examples; rows of another kind are told what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.data.rows.dataset import prepare_groups
from megadpo.data.rows.formats import Reading, recognise
from megadpo.data.rows.row import Row
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.errors import UserError

USER = {"role": "user", "content": "Colour of the sky?"}
BLUE, GREEN, RED = ({"role": "assistant", "content": text} for text in ("Blue.", "Green.", "Red."))
TEXT_PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}
LISTED = {"prompt": "Sky?", "responses": [" Red.", " Blue.", " Green."]}
LABELS, LISTS, EXAMPLES = Reading("labels"), Reading("lists"), Reading("examples")


def refusal(row: dict[str, Any], reading: Reading) -> str:
    with pytest.raises(UserError) as caught:
        recognise(row, "f:9", reading)
    return str(caught.value)


# Labelled answers


@pytest.mark.parametrize(("label", "number"), [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0)])
def test_an_answer_and_its_label(label: object, number: float) -> None:
    row = recognise({"prompt": "Sky?", "completion": " Blue.", "label": label}, "f:1", LABELS)
    assert row == Row(("Sky?",), (" Blue.",), conversational=False, row_values={"label": (number,)})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BLUE]},
        {"conversations": [{"from": "human", "value": "Colour of the sky?"}, {"from": "gpt", "value": "Blue."}]},
        {"prompt": [USER], "completion": [BLUE]},
        {"prompt": [USER], "completion": "Blue."},
        {"prompt": "Colour of the sky?", "completion": [BLUE]},
        {"prompt": [USER], "completion": [USER, BLUE]},
        {"messages": [USER], "completion": BLUE},
        {"prompt": "Colour of the sky?", "messages": [USER, BLUE], "completion": None, "chosen": None},
    ],
)
@pytest.mark.parametrize("reading", [LABELS, EXAMPLES], ids=lambda reading: reading.kind)
def test_every_form_of_a_conversation_is_the_same_answer(row: dict[str, Any], reading: Reading) -> None:
    recognised = recognise(row | {"label": False}, "f:1", reading)
    assert (recognised.prompts, recognised.completions, recognised.conversational) == (([USER],), ([BLUE],), True)
    assert recognised.row_values == ({"label": (0.0,)} if reading is LABELS else {})


def test_of_a_longer_conversation_the_last_turn_is_the_answer_and_a_system_column_comes_first() -> None:
    turns = [{"from": role, "value": text} for role, text in (("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))]
    row = recognise({"conversations": turns, "system": "Be kind.", "label": True}, "f:1", LABELS)
    assert [message["content"] for message in row.prompts[0]] == ["Be kind.", "a", "b", "c"]
    assert row.completions == ([{"role": "assistant", "content": "d"}],)


def test_a_pair_is_a_desirable_and_an_undesirable_answer_to_one_prompt() -> None:
    row = recognise(TEXT_PAIR | {"label": "stray"}, "f:1", LABELS)
    assert row == Row(("Sky?",), (" Blue.", " Green."), conversational=False, row_values={"label": (1.0, 0.0)})


@pytest.mark.parametrize("label", ["true", "desirable", 2, -1, 0.5, float("nan"), [True], {}])
def test_what_is_no_label_is_refused(label: object) -> None:
    message = refusal({"prompt": "a", "completion": "b", "label": label}, LABELS)
    assert message == f"f:9: `label` is {label!r}; it must be true (a desirable answer) or false"


@pytest.mark.parametrize("label", ["missing", None])
def test_an_answer_without_a_label_is_refused(label: object) -> None:
    row = {"messages": [USER, BLUE]} | ({} if label == "missing" else {"label": label})
    assert refusal(row, LABELS).startswith("f:9: the row lacks `label`; it has messages")


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([USER, BLUE, USER], "ends with a turn of user; its last turn must be the assistant's answer"),
        ([USER, {"role": "tool", "content": "3"}], "ends with a turn of tool; its last turn must be the assistant's"),
        ([BLUE], "has less than two turns"),
        ([], "has less than two turns"),
        ("Blue.", "must be a list of messages, it is text"),
    ],
)
@pytest.mark.parametrize("reading", [LABELS, EXAMPLES], ids=lambda reading: reading.kind)
def test_a_conversation_that_does_not_end_with_an_answer_is_refused(turns: Any, problem: str, reading: Reading) -> None:
    assert refusal({"messages": turns, "label": True}, reading).startswith(f"f:9: `messages` {problem}")


def test_a_completion_without_a_prompt_is_refused() -> None:
    assert refusal({"completion": "b", "label": True}, LABELS).startswith("f:9: the row lacks `prompt`, which `completion`")
    assert "`prompt` is empty" in refusal({"prompt": [], "completion": [BLUE]}, EXAMPLES)


# Lists


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ({"scores": [-1, 2.5, 0]}, (2.5, 0.0, -1.0)),
        ({"ranks": [3, 1, 2]}, (-1.0, -2.0, -3.0)),
        ({"ranks": [2.5, 1, 2.5], "scores": None}, (-1.0, -2.5, -2.5)),
    ],
)
def test_responses_are_sorted_best_first_and_ranks_become_scores(said: dict[str, Any], scores: tuple[float, ...]) -> None:
    row = recognise(LISTED | said, "f:1", LISTS)
    best, *others = row.completions
    assert row.prompts == ("Sky?",) and best == " Blue." and row.row_values == {"score": scores}
    assert others == ([" Green.", " Red."] if scores[1] > scores[2] else [" Red.", " Green."])  # ties keep their order


def test_lists_may_be_conversations_and_are_also_called_completions() -> None:
    expected = ([BLUE], [GREEN], [RED])
    for responses in (["Red.", "Blue.", "Green."], [RED, BLUE, GREEN], [[RED], [BLUE], [GREEN]]):
        row = recognise({"prompt": [USER], "completions": responses, "ranks": [3, 1, 2]}, "f:1", LISTS)
        assert (row.prompts, row.completions, row.conversational) == (([USER],), expected, True)


@pytest.mark.parametrize(
    ("fields", "scores"),
    [({}, (1.0, 0.0)), ({"score_chosen": 8, "rejected_rating": 2.5}, (8.0, 2.5)), ({"chosen_score": None}, (1.0, 0.0))],
)
def test_a_pair_is_a_list_of_two(fields: dict[str, Any], scores: tuple[float, ...]) -> None:
    row = recognise(TEXT_PAIR | fields, "f:1", LISTS)
    assert row.completions == (" Blue.", " Green.") and row.row_values == {"score": scores}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (LISTED, "the row lacks `scores` and `ranks`; it has prompt, responses."),
        (LISTED | {"scores": [1, 2]}, "`scores` has 2 values for 3 responses; give each response one number"),
        (LISTED | {"scores": 3}, "`scores` has 3 for 3 responses; give each response one number"),
        (LISTED | {"scores": [1, float("nan"), 3]}, "`scores[1]` is nan; it must be a finite number"),
        (LISTED | {"scores": [1, 2, None]}, "`scores[2]` is None; it must be a finite number"),
        (LISTED | {"scores": [1, 2, "3"]}, "`scores[2]` is '3'; it must be a finite number"),
        (LISTED | {"scores": [1, 2, True]}, "`scores[2]` is True; it must be a finite number"),
        (LISTED | {"ranks": [0, 1, 2]}, "`ranks[0]` is 0; it must be a finite number, 1 for the best"),
        (LISTED | {"scores": [1, 2, 3], "ranks": [1, 2, 3]}, "the row has `scores` and `ranks`; name the one"),
        (LISTED | {"responses": ["a"], "scores": [1]}, "`responses` has 1; a list needs at least 2 responses"),
        (LISTED | {"responses": [], "scores": []}, "`responses` has 0; a list needs at least 2 responses"),
        (LISTED | {"responses": "ab", "scores": [1, 2]}, "`responses` is 'ab'; a list needs at least 2 responses"),
        (LISTED | {"responses": ["a", [BLUE]], "scores": [1, 2]}, "`responses` must be all text or all messages"),
        (LISTED | {"responses": ["a", 5], "scores": [1, 2]}, "`responses` must be text or a list of messages, it is int"),
        (LISTED | {"prompt": None, "scores": [1, 2, 3]}, "the row lacks `prompt`, which `responses` answers"),
        (TEXT_PAIR | {"chosen_score": 1}, "the row lacks `rejected_score` or `score_rejected` or `rejected_rating`"),
        (TEXT_PAIR | {"chosen_score": 1, "rejected_score": 2}, "`chosen_score` is 1 and `rejected_score` is 2; the chosen"),
        ({"prompt": "a"}, "the row lacks `responses`; it has prompt. A list needs `prompt`, `responses`, and"),
    ],
)
def test_lists_that_do_not_say_how_good_each_response_is_are_refused(row: dict[str, Any], message: str) -> None:
    assert refusal(row, LISTS).startswith(f"f:9: {message}")


@pytest.mark.parametrize(
    ("responses", "scores", "reason"),
    [
        (["a", "b", "c"], [2, 2, 2], "all scores equal"),
        (["a", "a", "a"], [1, 2, 3], "identical responses"),
        (["a", " ", "c"], [1, 2, 3], "empty completion"),
        (["a", "a", "c"], [1, 2, 2], None),
    ],
)
def test_lists_that_teach_nothing_have_a_reason_to_be_dropped(
    responses: list[str], scores: list[float], reason: str | None
) -> None:
    assert recognise({"prompt": "p", "responses": responses, "scores": scores}, "f:1", LISTS).reason_to_drop() == reason


def test_equal_scores_of_a_pair_drop_it_from_lists_only() -> None:
    row = TEXT_PAIR | {"chosen_score": 3, "rejected_score": 3}
    assert recognise(row, "f:1", LISTS).reason_to_drop() == "all scores equal"
    assert recognise(row, "f:1", Reading("pairs", frozenset({"score"}))).reason_to_drop() is None


# Examples


def test_examples_are_answers_texts_and_the_chosen_side_of_pairs() -> None:
    answer = recognise({"prompt": "Sky?", "completion": " Blue.", "label": False}, "f:1", EXAMPLES)
    assert answer == recognise(TEXT_PAIR, "f:1", EXAMPLES) == Row(("Sky?",), (" Blue.",), conversational=False)
    assert recognise({"text": "Blue sky."}, "f:1", EXAMPLES) == Row(("",), ("Blue sky.",), conversational=False)
    talk = recognise({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "f:1", EXAMPLES)
    assert talk == recognise({"messages": [USER, BLUE], "text": "ignored"}, "f:1", EXAMPLES)


def test_a_row_without_anything_to_learn_from_is_no_example() -> None:
    assert refusal({"prompt": "a"}, EXAMPLES).startswith("f:9: the row lacks `completion`; it has prompt. An example needs")
    assert refusal({"text": [BLUE]}, EXAMPLES).startswith("f:9: `text` must be text, it is list")


# Rows of another kind

LABELLED, UNLABELLED = {"messages": [USER, BLUE], "label": True}, {"prompt": "a", "completion": "b"}
SCORED = LISTED | {"scores": [1, 2, 3]}


@pytest.mark.parametrize(
    ("row", "kind", "sentence"),
    [
        (
            LABELLED,
            "pairs",
            "one labelled answer; a pair loss needs `chosen` and `rejected`; kto, bco and apo_zero_unpaired read such rows",
        ),
        (LABELLED, "lists", "one labelled answer; a list loss needs `responses` with `scores` or `ranks`; kto, bco and"),
        (UNLABELLED, "pairs", "one answer without a label; a pair loss needs `chosen` and `rejected`; sft reads such rows"),
        (
            SCORED,
            "pairs",
            "a list of 3 responses; a pair loss needs `chosen` and `rejected`; plackett_luce, all_pairs and best_vs_rest "
            "read such rows",
        ),
        (
            SCORED,
            "labels",
            "a list of 3 responses; a loss of labelled answers needs `label` with `completion` or `messages`",
        ),
        (SCORED, "examples", "a list of 3 responses; sft needs `completion`, `messages` or `text`; plackett_luce,"),
        ({"text": "a"}, "pairs", "one text; a pair loss needs `chosen` and `rejected`; sft reads such rows"),
        ({"text": "a", "label": 1}, "labels", "one text; a loss of labelled answers needs `label` with"),
        ({"text": "a"}, "lists", "one text; a list loss needs `responses`"),
    ],
)
def test_a_row_of_another_kind_is_told_what_it_is_and_who_reads_it(row: dict[str, Any], kind: str, sentence: str) -> None:
    assert refusal(row, Reading(kind)).startswith(f"f:9: the row is {sentence}")


# From files to groups


@pytest.mark.parametrize("kind", ["pairs", "labels", "lists", "examples"])
@pytest.mark.slow
def test_real_hh_pairs_are_read_in_every_kind(
    kind: str,
    options: DataConfig,
    hh_rows: list[dict[str, str]],
    hh_pairs: Any,
    bpe_dir: str,
    tmp_path: Path,
    write_jsonl: Any,
) -> None:
    file, pairs = write_jsonl(tmp_path / "hh.jsonl", hh_rows), hh_pairs
    prepared = prepare_groups(options, file, bpe_dir, Reading(kind))
    groups, report = prepared.groups, prepared.report
    assert set(groups.row_values) == {"pairs": set(), "labels": {"label"}, "lists": {"score"}, "examples": set()}[kind]
    if kind == "examples":
        assert {len(group.responses) for group in groups} == {1} and len(groups) >= len(pairs)
        by_row = {group.row: group for group in groups}
        assert report.sentence().startswith(f"{len(groups):,} of 2,312 examples kept, ")
        for pair in pairs[:200]:
            if pair.num_stream_tokens(False) < options.max_length:  # the longer side of a pair decides where both are cut
                example = by_row[pair.row]
                whole, expected = ((*g.prompts[0], *g.responses[0]) for g in (example, pair))
                assert whole == expected
        return
    assert len(groups) == len(pairs) == 2308 and groups.num_tokens(True).sum() == pairs.num_tokens(True).sum()
    if kind == "labels":
        assert report.sentence().startswith("2,308 of 2,312 rows kept, 2,308 desirable, 2,308 undesirable, 4 dropped (empty")
    if kind != "pairs":
        (labels,) = groups.row_values.values()
        assert labels.tolist() == [1.0, 0.0] * 2308


@pytest.mark.slow
def test_real_chinese_pairs_are_read_in_every_kind(
    options: DataConfig, sharegpt_rows: list[dict[str, Any]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "zh.jsonl", sharegpt_rows)
    kept = {}
    for kind in ("pairs", "labels", "lists", "examples"):
        prepared = prepare_groups(options, file, bpe_dir, Reading(kind))
        kept[kind] = [len(group.responses) for group in prepared.groups]
        assert prepared.report.num_rows == len(sharegpt_rows) == len(kept[kind])
    assert kept["pairs"] == kept["labels"] == kept["lists"] == [2] * len(sharegpt_rows)
    assert kept["examples"] == [1] * len(sharegpt_rows)


@pytest.mark.slow
def test_real_labelled_conversations_are_read_as_they_are(
    options: DataConfig, labelled_rows: list[dict[str, Any]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    options.max_length = None
    file = write_jsonl(tmp_path / "kto.jsonl", labelled_rows)
    prepared = prepare_groups(options, file, bpe_dir, LABELS)
    assert prepared.report.sentence() == "300 of 300 labelled answers kept, 150 desirable, 150 undesirable"
    assert prepared.groups.row_values["label"].tolist() == [float(row["label"]) for row in labelled_rows]
    tokenizer = load_tokenizer(bpe_dir)
    examples = prepare_groups(options, file, bpe_dir, EXAMPLES).groups
    for row, group, example in zip(labelled_rows, prepared.groups, examples, strict=True):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert [*group.prompts[0], *group.responses[0]] == ids == [*example.prompts[0], *example.responses[0]]
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert group.prompts[0].tolist() == asked
    with pytest.raises(UserError, match=r"kto.jsonl:1: the row is one labelled answer; a pair loss needs"):
        prepare_groups(options, file, bpe_dir)


@pytest.mark.parametrize(("label", "which"), [(True, "desirable"), (False, "undesirable")])
def test_labels_that_are_all_the_same_are_refused_and_not_cached(
    label: bool, which: str, options: DataConfig, labelled_rows: list[dict[str, Any]], bpe_dir: str, tmp_path: Path,
    write_jsonl: Any,
) -> None:  # fmt: skip
    file = write_jsonl(tmp_path / "kto.jsonl", [row for row in labelled_rows if row["label"] is label])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"data: all 150 rows are {which} .*kto.jsonl; .*needs both desirable and"):
            prepare_groups(options, file, bpe_dir, LABELS)


def test_lists_of_any_length_become_groups_with_their_scores(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    rows = [
        LISTED | {"scores": [1, 3, 2]},
        TEXT_PAIR,
        LISTED | {"responses": [" A.", " B.", " C.", " D."], "ranks": [2, 1, 4, 3]},
        LISTED | {"scores": [5, 5, 5]},
    ]
    prepared = prepare_groups(options, write_jsonl(tmp_path / "a.jsonl", rows), bpe_dir, LISTS)
    groups, tokenizer = prepared.groups, load_tokenizer(bpe_dir)
    assert prepared.report.sentence() == "3 of 4 lists kept, 1 dropped (all scores equal)"
    assert groups.response_offsets_G.tolist() == [0, 3, 5, 9] and all(group.shares_prompt for group in groups)
    assert groups.row_values["score"].tolist() == [3, 2, 1, 1, 0, -1, -2, -3, -4]
    answers = [tokenizer.decode(response) for group in groups for response in group.responses]
    letters = "".join(answer[1] for answer in answers)
    assert letters == "BGRBGBADC" and all(answer.endswith("</s>") for answer in answers)


def test_text_alone_is_learned_whole_but_for_its_first_token(
    options: DataConfig, bpe_dir: str, bos_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "The sky is blue."}])
    for directory in (bpe_dir, bos_dir):
        (group,) = prepare_groups(options, file, directory, EXAMPLES).groups
        assert len(group.prompts[0]) == 1
        ids = [*group.prompts[0], *group.responses[0]]
        assert ids == load_tokenizer(directory)("The sky is blue.</s>")["input_ids"]


def test_nothing_left_is_said_in_the_words_of_the_kind(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [LISTED | {"scores": [5, 5, 5]}] * 2)
    with pytest.raises(UserError, match=r"no list is left of .*a.jsonl: 2 rows read, dropped: 2 all scores equal"):
        prepare_groups(options, file, bpe_dir, LISTS)
