"""Every supported row format ends as the same Row; everything else is refused with its location."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadpo.data.rows.formats import recognise
from megadpo.data.rows.row import Row
from megadpo.errors import UserError

USER = {"role": "user", "content": "Colour of the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": text} for text in ("Blue.", "Green."))
CONVERSATION = Row(([USER],), ([BLUE], [GREEN]), conversational=True)


def test_explicit_text() -> None:
    row = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green.", "score": 3}
    assert recognise(row, "f:1") == Row(("Sky?",), (" Blue.", " Green."), conversational=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": BLUE, "rejected": GREEN},
        {"prompt": [USER], "chosen": "Blue.", "rejected": "Green."},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": "Colour of the sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": "Colour of the sky?", "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"messages": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"conversations": [USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [USER | {"tool_calls": None}], "chosen": [BLUE], "rejected": [GREEN | {"name": None}]},
        {
            "conversations": [{"from": "human", "value": "Colour of the sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": [{"from": "assistant", "value": "Green."}],
        },
    ],
)
def test_every_form_of_a_conversation_is_the_same_pair(row: dict[str, Any]) -> None:
    assert recognise(row, "f:1") == CONVERSATION


def test_a_sharegpt_system_column_and_turn_become_a_system_message() -> None:
    turns = [{"from": "human", "value": "Hi"}]
    sides = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    expected = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert recognise({"conversations": turns, "system": "Be kind.", **sides}, "f:1").prompts == (expected,)
    turns = [{"from": "system", "value": "Be kind."}, *turns]
    assert recognise({"conversations": turns, "system": "", **sides}, "f:1").prompts == (expected,)


def test_raw_hh_rlhf_text_is_split_after_the_last_assistant_mark() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:"
    row = recognise({"chosen": prompt + " It is blue.", "rejected": prompt + " It is green."}, "f:1")
    assert row == Row((prompt,), (" It is blue.", " It is green."), conversational=False)


def test_raw_hh_rlhf_text_with_differing_prompts_keeps_both() -> None:
    one, other = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sky?\n\nAssistant:"
    row = recognise({"chosen": one + " Yes.", "rejected": other + " Blue."}, "f:1")
    assert row == Row((one, other), (" Yes.", " Blue."), conversational=False)


def test_real_hh_rows_put_together_again_are_the_rows(hh_rows: list[dict[str, str]]) -> None:
    num_unshared = 0
    for number, raw in enumerate(hh_rows):
        row = recognise(raw, f"f:{number}")
        chosen, rejected = row.completions
        assert row.prompts[0].endswith("\n\nAssistant:") and "\n\nAssistant:" not in chosen + rejected
        assert (row.prompts[0] + chosen, row.prompts[-1] + rejected) == (raw["chosen"], raw["rejected"])
        num_unshared += len(row.prompts) == 2
    assert num_unshared == 5


def test_conversations_that_share_no_message_keep_two_prompts() -> None:
    hello = {"role": "user", "content": "Hello"}
    row = recognise({"chosen": [USER, BLUE], "rejected": [hello, GREEN]}, "f:1")
    assert row == Row(([USER], [hello]), ([BLUE], [GREEN]), True)


@settings(deadline=None)
@given(st.text("ab ", min_size=1, max_size=12), st.text("ab ", min_size=1, max_size=12))
def test_the_prompt_of_two_texts_is_their_common_beginning_in_whole_words(chosen: str, rejected: str) -> None:
    from trl import extract_prompt

    row = recognise({"chosen": chosen, "rejected": rejected}, "f:1", allow_no_prompt=True)
    if not chosen.strip() or not rejected.strip():
        assert row.reason_to_drop() == "empty completion"
        return
    (prompt,), (better, worse) = row.prompts, row.completions
    assert (prompt + better, prompt + worse) == (chosen, rejected)
    if better and worse and better[0] != worse[0]:
        common = extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]
        # TRL stops within words, too, and where nothing is common it looks at the last character.
        assert common.startswith(prompt) or chosen[0] != rejected[0]
        assert not (prompt and prompt[-1].isalnum() and (better[0].isalnum() or worse[0].isalnum()))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: two plus two? A: four", "Q: two plus two? A: five", "Q: two plus two? A:"),
        ("Q: which?\nYes", "Q: which?\nNo", "Q: which?\n"),
        ("The sky is blue", "The sky is blue and vast", "The sky is blue"),
        ("The sky is blue", "The sky is bluer", "The sky is blue"),
        ("天空是蓝色", "天空是绿色", "天空是"),
        ("Небо синее", "Небо серое", "Небо"),
        ("It is 42.", "It is 48.", "It is"),
    ],
)
def test_a_prompt_ends_before_the_word_in_which_two_texts_part(chosen: str, rejected: str, prompt: str) -> None:
    row = recognise({"chosen": chosen, "rejected": rejected}, "f:1")
    assert row == Row((prompt,), (chosen[len(prompt) :], rejected[len(prompt) :]), False) and row.implicit_prompt
    is_beginning = rejected.startswith(chosen)
    assert row.reason_to_drop() == ("empty completion" if is_beginning else None)


@pytest.mark.parametrize(("chosen", "rejected"), [("Paris ", "London"), ("a b ", "x"), ("Pears", "Planks")])
def test_two_texts_without_a_common_beginning_need_a_prompt(chosen: str, rejected: str) -> None:
    sides = {"chosen": chosen, "rejected": rejected}
    for row in (sides, sides | {"prompt": None}):
        with pytest.raises(UserError, match=r"^f:9: the row has no `prompt`, and .* no other column with text; name"):
            recognise(row, "f:9")
    with pytest.raises(UserError, match=r"nothing reads `task`, `note`; .* such as {prompt: task}, or set"):
        recognise(sides | {"task": "Which?", "id": 3, "note": "b"}, "f:9")
    row = recognise(sides, "f:1", allow_no_prompt=True)
    assert row == Row(("",), (chosen, rejected), conversational=False) and row.has_empty_prompt
    assert recognise({"chosen": "", "rejected": "b"}, "f:1").reason_to_drop() == "empty completion"
    assert recognise({"chosen": "b", "rejected": "b"}, "f:1").reason_to_drop() == "identical chosen and rejected"


def test_tools_and_template_arguments_are_passed_on() -> None:
    row = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "tools": '[{"name": "look"}]'}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    assert recognise(row, "f:1").template_kwargs == {"tools": [{"name": "look"}], "enable_thinking": False}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "f:9: the row lacks `chosen` and `rejected`; it has no field at all"),
        ({"prompt": "a", "chosen": "b", "text": "c"}, "f:9: the row lacks `rejected`; it has prompt, chosen, text"),
        (
            {"messages": [USER, BLUE], "label": True},
            "f:9: the row is one labelled answer; a pair loss needs `chosen` and `rejected`; kto, bco and",
        ),
        ({"chosen": "a", "rejected": None}, "f:9: the row lacks `rejected`"),
        ({"chosen": 1, "rejected": "b"}, "f:9: `chosen` must be text or a list of messages, it is int"),
        ({"chosen": "a", "rejected": [GREEN]}, "f:9: `chosen` and `rejected` must both be text or both be messages"),
        ({"chosen": ["a"], "rejected": ["b"]}, "f:9: `chosen` has a message without"),
        ({"chosen": [{"role": "user"}], "rejected": [GREEN]}, "f:9: a message of `chosen` has no text as its content"),
        (
            {"chosen": [{"from": "martian", "value": "x"}], "rejected": [GREEN]},
            "f:9: `chosen` has a turn from 'martian'",
        ),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "f:9: no prompt: `chosen` and `rejected` share no leading message"),
        (
            {"prompt": "a\ud800", "chosen": "b", "rejected": "c"},
            "f:9: `prompt` has half a surrogate pair at character 1",
        ),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "tools": "{"}, "f:9: `tools` is no valid JSON"),
        (
            {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "chat_template_kwargs": {"tokenize": False}},
            "f:9: `chat_template_kwargs` may not set 'tokenize'",
        ),
    ],
)
def test_rows_without_what_is_needed_are_refused_with_their_location(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recognise(row, "f:9")
    assert str(caught.value).startswith(message)


def test_empty_and_identical_pairs_are_seen_in_both_forms() -> None:
    def reason(chosen: Any, rejected: Any) -> str | None:
        return recognise({"prompt": "p", "chosen": chosen, "rejected": rejected}, "f:1").reason_to_drop()

    assert reason(" \n", "b") == reason([BLUE], [GREEN | {"content": " "}]) == "empty completion"
    called = [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]
    assert reason(called, [GREEN]) is None
    assert reason("a", "a") == reason([BLUE], [BLUE]) == "identical chosen and rejected" and reason("a", "b") is None
