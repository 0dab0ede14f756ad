"""Columns of well-known data sets are read under our names; what nothing reads is said, media are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.data.rows.dataset import look_at, prepare_groups
from megadpo.data.rows.formats import Reading, recognise
from megadpo.data.rows.row import NO_PREFERENCE, Row
from megadpo.data.rows.tokenise import GroupTokens, load_tokenizer, tokenise_rows
from megadpo.errors import UserError

SIDES = {"chosen": "Blue.", "rejected": "Green."}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BOTH = ([assistant("Blue.")], [assistant("Green.")])


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"instruction": "Which colour?", "input": ""}, "Which colour?"),
        ({"instruction": "Which colour?"}, "Which colour?"),
        ({"instruction": "Add the numbers.", "input": "3 and 4"}, "Add the numbers.\n3 and 4"),
        ({"question": "Which colour?"}, "Which colour?"),
        ({"query": "Which colour?", "prompt": None}, "Which colour?"),
        ({"input": "Which colour?"}, "Which colour?"),
    ],
)
def test_the_question_is_read_from_the_columns_of_alpaca_and_orca(columns: dict[str, Any], prompt: str) -> None:
    row = recognise(columns | SIDES, "f:1")
    assert row == Row(([user(prompt)],), BOTH, conversational=True)
    assert row.plain == Row((f"{prompt}\n",), ("Blue.", "Green."), conversational=False)


def test_an_input_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="f:9: `input` must be text, it is dict"):
        recognise({"instruction": "Q", "input": {"text": "a"}, **SIDES}, "f:9")


def test_our_own_prompt_wins_and_is_the_text_that_it_is() -> None:
    row = recognise({"prompt": "Which colour?", "instruction": "Be brief."} | SIDES, "f:1")
    assert row == Row(("Which colour?",), ("Blue.", "Green."), conversational=False) and row.unread == ("instruction",)


def test_a_question_is_a_message_where_there_is_a_template_and_a_line_where_there_is_none(
    bpe_dir: str, bos_dir: str
) -> None:
    row = recognise({"question": "Which colour?", **SIDES}, "f:1")
    for directory, prompt in ((bpe_dir, "<|user|>Which colour?<|end|>\n<|assistant|>"), (bos_dir, "<s>Which colour?\n")):
        tokenizer = load_tokenizer(directory)
        (tokens,) = tokenise_rows([("f:1", row)], tokenizer)
        assert isinstance(tokens, GroupTokens) and tokenizer.decode(tokens.prompts[0]) == prompt
    with pytest.raises(UserError, match="f:1: the row is conversational and the tokenizer has no chat template"):
        tokenise_rows([("f:1", recognise({"question": "Q", "system": "S", **SIDES}, "f:1"))], tokenizer)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("question", ["question", "input", "prompt", "instruction"])
def test_a_system_column_makes_messages_of_it_and_the_question(name: str, question: str) -> None:
    row = recognise({name: "Be brief.", question: "Which colour?"} | SIDES, "f:1")
    assert row == Row(([system("Be brief."), user("Which colour?")],), BOTH, conversational=True)
    for nothing in ("", None):  # all rows of a file are conversations, or none
        row = recognise({name: nothing, question: "Which colour?"} | SIDES, "f:1")
        assert row == Row(([user("Which colour?")],), BOTH, conversational=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("Q")], "chosen": BOTH[0], "rejected": BOTH[1]},
        {"prompt": [system("Be brief."), user("Q")], "chosen": BOTH[0], "rejected": BOTH[1]},
        {"messages": [user("Q")], "chosen": BOTH[0], "rejected": BOTH[1]},
        {"chosen": [user("Q"), *BOTH[0]], "rejected": [user("Q"), *BOTH[1]]},
        {"prompt": "Q", "chosen": [user("Q"), *BOTH[0]], "rejected": [user("Q"), *BOTH[1]]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": BOTH[0], "rejected": BOTH[1]},
    ],
)
def test_a_system_column_stands_before_every_form_of_a_conversation(row: dict[str, Any]) -> None:
    expected = Row(([system("Be brief."), user("Q")],), BOTH, conversational=True)
    assert recognise(row | {"system": "Be brief."}, "f:1") == expected


def test_two_system_messages_that_differ_are_refused() -> None:
    row = {"prompt": [system("Be long."), user("Q")], "chosen": "a", "rejected": "b", "system": "Be brief."}
    with pytest.raises(UserError, match="f:9: `system` is another text than the system message of the conversation"):
        recognise(row, "f:9")
    with pytest.raises(UserError, match="f:9: `system` must be text, it is int"):
        recognise(row | {"system": 3}, "f:9")


def test_alpaca_s_output_and_history_are_read() -> None:
    row = {"instruction": "Which?", "input": "sky", "output": "Blue.", "history": [["Hi", "Hello."]]}
    turns = [user("Hi"), assistant("Hello."), user("Which?\nsky")]
    assert recognise(row, "f:1", Reading("examples")) == Row((turns,), ([assistant("Blue.")],), conversational=True)
    labelled = recognise(row | {"history": [], "label": True}, "f:1", Reading("labels"))
    assert (labelled.prompts, labelled.completions) == (([user("Which?\nsky")],), ([assistant("Blue.")],))


def test_ultrafeedback_s_completions_are_a_list_with_scores() -> None:
    answers = [
        {"model": "a", "response": text, "overall_score": score} for text, score in (("B", 1.0), ("A", 7.5), ("C", 0))
    ]
    row = recognise({"instruction": "Q", "completions": answers, "models": ["a"]}, "f:1", Reading("lists"))
    expected = tuple([assistant(text)] for text in "ABC")
    assert row == Row(([user("Q")],), expected, True, row_values={"score": (7.5, 1.0, 0.0)}, ranked=True)
    with pytest.raises(UserError, match=r"f:9: `scores\[1\]` is None"):
        recognise({"instruction": "Q", "completions": [answers[0], {"response": "x"}]}, "f:9", Reading("lists"))
    binarized = {"instruction": "Q", "chosen_response": "a", "rejected_response": "b", "chosen_rating": 4.0}
    assert recognise(binarized, "f:1") == Row(([user("Q")],), ([assistant("a")], [assistant("b")]), conversational=True)


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -2}, "Q"),
        ({"prompt": "Q", "response_1": "b", "response_2": "a", "preference_strength": 1}, "Q"),
        ({"context": [user("Q")], "response1": "a", "response2": "b", "overall_preference": -1}, [user("Q")]),
        ({"context": [user("Q")], "response1": "b", "response2": "a", "overall_preference": 3}, [user("Q")]),
    ],
)
def test_helpsteer_s_comparisons_are_pairs(columns: dict[str, Any], prompt: Any) -> None:
    answers = ("a", "b") if isinstance(prompt, str) else ([assistant("a")], [assistant("b")])
    assert recognise(columns, "f:1") == Row((prompt,), answers, conversational=not isinstance(prompt, str))


def test_helpsteer_s_undecided_comparisons_teach_nothing_and_its_single_answers_are_examples() -> None:
    row = {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 0}
    assert recognise(row, "f:1").reason_to_drop() == NO_PREFERENCE
    for value in ("1", True, float("nan")):
        with pytest.raises(UserError, match=r"f:9: `preference_strength` is .*; it must be a number, below 0 where"):
            recognise(row | {"preference_strength": value}, "f:9")
    single = {"prompt": "Q", "response": "a", "helpfulness": 4}
    assert recognise(single, "f:1", Reading("examples")) == Row(("Q",), ("a",), conversational=False)
    with pytest.raises(UserError, match="f:9: the row is one answer without a label; a pair loss needs"):
        recognise(single, "f:9")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"chosen": 4, "rejected": 5}, "`chosen` must be text or a list of messages, it is int"),
        (
            {"chosen": {"answer": "4"}, "rejected": "5"},
            "`chosen` must be text or a list of messages, it is an object of",
        ),
        ({"chosen": ["pears", "plums"], "rejected": ["planks"]}, "`chosen` has a message without .*: it is a list of str"),
        ({"chosen": None, "rejected": "No."}, "the row lacks `chosen`; it has prompt, chosen, rejected"),
        ({"chosen": "a", "rejected": "b", "prompt": 3}, "`prompt` must be text or a list of messages, it is int"),
        ({"chosen": "a", "rejected": b"b"}, "`rejected` must be text or a list of messages, it is bytes"),
    ],
)
def test_what_is_no_answer_is_refused_with_what_it_must_be(row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^f:9: {sentence}"):
        recognise({"prompt": "2+2?"} | row, "f:9")


def test_columns_that_nothing_reads_are_listed_once(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Fine?", "chosen": "Yes.", "rejected": "No.", "id": 1},
        {"prompt": "B?", "chosen": "Yes.", "rejected": "No.", "source": "x", "score_chosen": 8.5},
        {"prompt": "C?", "chosen": "Yes.", "rejected": "No.", "source": None, "score_chosen": "9", "meta": {"a": 1}},
        {"prompt": "D?", "chosen": "Yes.", "rejected": "No.", "meta": "a", "source": "y"},
    ]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # made, and from the cache
        report = prepare_groups(options, file, bpe_dir).report
        assert report.sentence() == "4 of 4 pairs kept"
        assert report.remarks() == [
            "nothing reads the text in meta (1), source (2); data.columns renames, data.ignore_columns says it is meant"
        ]
    options.ignore_columns = ["meta", "source"]
    assert prepare_groups(options, file, bpe_dir).report.remarks() == []


def test_prompts_that_are_empty_or_taken_from_the_answers_are_counted(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    rows = [{"prompt": "", **SIDES}, {"chosen": "It is blue.", "rejected": "It is green."}, {"prompt": "Q", **SIDES}]
    report = prepare_groups(options, write_jsonl(tmp_path / "a.jsonl", rows), bpe_dir).report
    counted = "3 of 3 pairs kept, 1 with their common beginning as prompt, 1 with no prompt"
    assert report.sentence().startswith(counted)
    file = write_jsonl(tmp_path / "b.jsonl", [SIDES, rows[1]])
    with pytest.raises(UserError, match=r"b.jsonl:1: the row has no `prompt`"):
        prepare_groups(options, file, bpe_dir)
    options.allow_no_prompt = True
    assert prepare_groups(options, file, bpe_dir).report.num_empty_prompts == 1


@pytest.mark.parametrize(
    ("truncation", "cut"),
    [("prompt_left", "the prompt of 3"), ("keep_start", "an answer of 3"), ("keep_end", "the prompt of 3")],
)
def test_much_truncation_is_a_warning_that_says_which_side_was_cut(
    truncation: str, cut: str, options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    long = {"prompt": "Colour " * 40, "chosen": " blue" * 9, "rejected": " green" * 9}
    if truncation == "keep_start":
        long = {"prompt": "Colour", "chosen": " blue" * 99, "rejected": " green" * 99}
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", **SIDES}, long, long, long])
    options.max_length, options.truncation = 70, truncation
    report = prepare_groups(options, file, bpe_dir).report
    assert report.num_truncated == 3 and f"3 truncated ({cut})" in report.sentence()
    assert report.remarks() == [
        f"warning: 3 of 4 pairs are longer than data.max_length and lose tokens ({cut}); raise it if that matters"
    ]


def test_first_rows_are_looked_at_without_a_tokenizer(options: DataConfig, tmp_path: Path, write_jsonl: Any) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", **SIDES}])
    look_at(options, good)
    bad = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Q", "chosen": "a"}])
    for sources, sentence in (
        (bad, "b.jsonl:1: the row lacks `rejected`"),
        ([good, bad], "b.jsonl:1: the row lacks `rejected`"),
        (str(tmp_path / "c.jsonl"), "c.jsonl does not exist"),
        (str(tmp_path / "c/*.jsonl"), "no file fits"),
    ):
        with pytest.raises(UserError, match=sentence):
            look_at(options, sources)
    options.chat_template = "missing.jinja"
    with pytest.raises(UserError, match=r"data.chat_template: missing.jinja is neither"):
        look_at(options, good)
