"""Who speaks in a row, and what a message may hold: what is learned is the assistant's text and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megadpo.data.rows.formats import Reading, recognise
from megadpo.data.rows.messages import MAX_CHARACTERS
from megadpo.data.rows.row import EMPTY, IDENTICAL, Row
from megadpo.data.rows.tokenise import GroupTokens, load_tokenizer, tokenise_rows
from megadpo.errors import UserError
from tests.unit.data.conftest import CHATML

ASKED = {"role": "user", "content": "Name a fruit."}
PEARS, PLANKS = ({"role": "assistant", "content": text} for text in ("Pears.", "Planks."))
PLAIN = {"prompt": [ASKED], "chosen": [PEARS], "rejected": [PLANKS]}
READ = Row(([ASKED],), ([PEARS], [PLANKS]), conversational=True)


def refusal(row: dict[str, Any], kind: str = "pairs") -> str:
    with pytest.raises(UserError) as caught:
        recognise(row, "f:9", Reading(kind))
    return str(caught.value)


def tokenise(row: dict[str, Any], tokenizer: Any) -> GroupTokens:
    (tokens,) = tokenise_rows([("f:1", recognise(row, "f:1"))], tokenizer)
    assert isinstance(tokens, GroupTokens)
    return tokens


@pytest.mark.parametrize(
    "names",
    [("user", "assistant"), ("User", "Assistant"), ("human", "gpt"), ("HUMAN", "GPT"), (" user", "model"), ("human", "bot")],
)
def test_roles_are_read_under_every_name_that_sharegpt_s_have(names: tuple[str, str]) -> None:
    user, assistant = names
    turns = ASKED | {"role": user}, PEARS | {"role": assistant}, PLANKS | {"role": assistant}
    assert recognise({"prompt": [turns[0]], "chosen": [turns[1]], "rejected": [turns[2]]}, "f:1") == READ


@pytest.mark.parametrize("role", ["critic", "assistent", "", None, 3, ["user"], "ｕｓｅｒ", "user\u0000"])
def test_other_roles_are_refused_with_the_known_ones(role: Any) -> None:
    message = refusal(PLAIN | {"rejected": [PLANKS | {"role": role}]})
    assert message.startswith("f:9: `rejected` has a") and ("known: human, user" in message or role is None)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (PLAIN | {"rejected": [PLANKS | {"role": "user"}]}, "f:9: `rejected` has a turn of user, which would be learned"),
        (PLAIN | {"chosen": [PEARS, ASKED]}, "f:9: `chosen` has a turn of user"),
        (PLAIN | {"chosen": [{"role": "system", "content": "x"}, PEARS]}, "f:9: `chosen` has a turn of system"),
        (PLAIN | {"chosen": [PEARS, {"role": "tool", "content": "3"}]}, "f:9: `chosen` ends with a turn of tool"),
        ({"chosen": [ASKED, PEARS, ASKED], "rejected": [ASKED, PLANKS, ASKED]}, "f:9: `chosen` has a turn of user"),
        ({"chosen": [ASKED, PEARS], "rejected": [ASKED, PLANKS, ASKED]}, "f:9: `rejected` has a turn of user"),
    ],
)
def test_an_answer_in_which_someone_else_speaks_is_refused(row: dict[str, Any], sentence: str) -> None:
    assert refusal(row).startswith(sentence)


@pytest.mark.parametrize("kind", ["labels", "examples"])
def test_so_is_one_answer_and_one_response_of_a_list(kind: str) -> None:
    said = {"prompt": [ASKED], "completion": [PLANKS | {"role": "human"}], "label": True}
    assert refusal(said, kind).startswith("f:9: `completion` has a turn of user")
    listed = {"prompt": [ASKED], "responses": [[PEARS], [ASKED]], "scores": [1, 0]}
    assert refusal(listed, "lists").startswith("f:9: `responses` has a turn of user")


def test_results_of_tools_stand_before_the_assistant_s_words() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    said = [called, {"role": "tool", "content": "3"}, PEARS]
    assert recognise(PLAIN | {"chosen": said}, "f:1").completions[0] == said


# Content


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]
    row = {"prompt": [ASKED | {"content": parts}], "chosen": [PEARS | {"content": [{"text": "Pears."}]}]}
    assert recognise(row | {"rejected": [PLANKS]}, "f:1") == READ


@pytest.mark.parametrize("content", [[], [{"type": "text", "text": ""}], [{"type": "text", "text": " "}] * 2, " "])
def test_an_answer_of_empty_parts_is_an_empty_completion(content: Any) -> None:
    assert recognise(PLAIN | {"chosen": [PEARS | {"content": content}]}, "f:1").reason_to_drop() == EMPTY


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What is this?"}], "has a part of type 'image'; only"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "has a part of type 'image_url'"),
        ([{"type": "text", "text": "What?", "image": "x.png"}], "has a part of type 'image'"),
        ([{"type": "input_audio", "input_audio": {}}], "has a part of type 'input_audio'"),
        ([{"type": "text"}], "has a part {'type': 'text'}"),
        ([{"type": "text", "text": 3}], "has a part {'type': 'text', 'text': 3}"),
        (["What?"], "has a part 'What?'"),
        ([None], "has a part None"),
        ([["a"]], "has a part ['a']"),
        (3, "has no text as its content but 3"),
        (None, "has no text as its content but None"),
        ({"parts": ["a"]}, "has no text as its content but {'parts'"),
        (True, "has no text as its content but True"),
    ],
)
def test_what_is_no_text_is_refused_and_never_printed_as_python_does(content: Any, words: str) -> None:
    assert words in refusal({"prompt": [ASKED | {"content": content}], "chosen": [PEARS], "rejected": [PLANKS]})
    assert words in refusal(PLAIN | {"rejected": [PLANKS | {"content": content}]})


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_media_beside_text_are_refused_where_there_are_any(column: str) -> None:
    assert f"the row has `{column}`; only text is read" in refusal(PLAIN | {column: ["ship.png"]})
    for nothing in ([], None, ""):
        assert recognise(PLAIN | {column: nothing}, "f:1") == READ


def test_messages_may_be_json_text_and_not_what_python_prints() -> None:
    encoded = {name: json.dumps(messages) for name, messages in PLAIN.items()}
    assert recognise(encoded, "f:1") == READ
    singles = {name: json.dumps(messages[0]) for name, messages in PLAIN.items()}
    assert recognise(singles, "f:1") == READ
    sharegpt = json.dumps([{"from": "human", "value": "Name a fruit."}])
    assert recognise(PLAIN | {"prompt": sharegpt}, "f:1") == READ
    assert "`chosen` holds messages as Python prints them" in refusal(encoded | {"chosen": str(PLAIN["chosen"])})
    texts = {"prompt": "List them.", "chosen": '[{"name": "pear"}]', "rejected": "[{'name': 'plank'}]"}
    assert recognise(texts, "f:1") == Row((texts["prompt"],), (texts["chosen"], texts["rejected"]), conversational=False)


def test_a_text_beyond_any_context_is_refused() -> None:
    long = "a" * (MAX_CHARACTERS + 1)
    assert f"`chosen` has {len(long):,} characters; at most" in refusal({"prompt": "a", "chosen": long, "rejected": "b"})
    half = [PEARS | {"content": long[: len(long) // 2 + 1]}] * 2
    assert f"`rejected` has {len(long) + 1:,} characters" in refusal(PLAIN | {"rejected": half})


# A prompt that ends with the assistant

BEGUN = {"role": "assistant", "content": "Pears"}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("begun", ["Pears", "Pears ", ""])
def test_a_prompt_that_ends_with_the_assistant_is_continued_in_the_same_turn(begun: str, trim: bool, bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, CHATML.replace("m['content']", "(m['content'] | trim)") if trim else None)
    prompt = [ASKED, BEGUN | {"content": begun}]
    answers = [[PEARS | {"content": text}] for text in (" and plums.", " or planks.")]
    row = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    tokens = tokenise(row, tokenizer)
    for (head, tail), (answer,) in zip(tokens.sequences(), answers, strict=True):
        whole = [ASKED, BEGUN | {"content": begun + answer["content"]}]
        assert head + tail == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        continued = tokenizer.apply_chat_template(prompt, continue_final_message=True, tokenize=True, return_dict=False)
        assert head == continued[: len(head)] and len(continued) - len(head) <= 1
    texts = tokenise({"prompt": prompt, "chosen": " and plums.", "rejected": " or planks."}, tokenizer)
    assert texts == tokens and "<|assistant|>" not in tokenizer.decode(tokens.responses[0])


def test_the_last_turn_of_a_continued_prompt_is_kept_where_it_is_cut(bpe_dir: str) -> None:
    from megadpo.data.rows.tokenise import last_turn_lengths

    tokenizer = load_tokenizer(bpe_dir)
    prompt = [ASKED, PEARS, ASKED, BEGUN]
    row = recognise({"prompt": prompt, "chosen": " and plums.", "rejected": " or planks."}, "f:1")
    (tokens,) = tokenise_rows([("f:1", row)], tokenizer)
    assert isinstance(tokens, GroupTokens)
    (length,) = last_turn_lengths(row, tokens, tokenizer, "f:1")
    assert tokenizer.decode(tokens.prompts[0][-length:]) == "<|user|>Name a fruit.<|end|>\n<|assistant|>Pears"


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ([ASKED, BEGUN], [{"role": "tool", "content": "3"}, PEARS], "whose turn the answer must continue, but"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"name": "look"}]}],
            [PEARS],
            "ends with a call of a tool; its result",
        ),
    ],
)
def test_an_answer_that_cannot_continue_the_turn_is_refused(prompt: Any, answer: Any, words: str) -> None:
    assert words in refusal({"prompt": prompt, "chosen": answer, "rejected": [PLANKS]})
    assert words in refusal({"prompt": prompt, "completion": answer}, "examples")


def test_two_turns_of_the_assistant_in_a_row_are_no_prompt_and_answer() -> None:
    assert "two turns of the assistant in a row" in refusal(PLAIN | {"rejected": [PLANKS, PLANKS]})
    sides = {"chosen": [ASKED, BEGUN, PEARS], "rejected": [ASKED, BEGUN, PLANKS]}
    assert "two turns of the assistant in a row" in refusal(sides)
    assert "two turns of the assistant in a row" in refusal({"messages": sides["chosen"]}, "examples")


# Pairs without a prompt


@pytest.mark.parametrize("other", ["Pears.", "\n\nHuman: Hi\n\nAssistan: a", "\n\nAssistant: a"])
def test_a_dialogue_of_raw_hh_beside_what_is_none_is_refused(other: str) -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello."
    for row in ({"chosen": dialogue, "rejected": other}, {"chosen": other, "rejected": dialogue}):
        assert "f:9: one of `chosen` and `rejected` is a dialogue of" in refusal(row)
    assert recognise({"chosen": dialogue, "rejected": ""}, "f:1").reason_to_drop() == EMPTY


def test_a_dialogue_of_raw_hh_that_ends_with_the_human_is_refused() -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello."
    assert "ends with a turn of '\\n\\nHuman:'" in refusal(
        {"chosen": f"{dialogue}\n\nHuman: Bye", "rejected": f"{dialogue}!"}
    )


def test_an_example_is_the_chosen_answer_though_the_rejected_one_is_empty() -> None:
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    row = recognise({"chosen": f"{dialogue} Hello.", "rejected": " "}, "f:1", Reading("examples"))
    assert row == Row((dialogue,), (" Hello.",), conversational=False)
    assert "no prompt" in refusal({"chosen": [ASKED, PEARS], "rejected": []}, "examples")
    sides = {"chosen": [ASKED, PEARS, ASKED, PLANKS], "rejected": [ASKED, PEARS]}
    assert "`chosen` has a turn of user" in refusal(sides, "examples")
    assert "`chosen` has a turn of user" in refusal({"prompt": "Q", "chosen": [ASKED, PEARS], "rejected": []}, "examples")


def test_conversations_that_part_in_an_earlier_turn_have_prompts_of_their_own() -> None:
    more = {"role": "user", "content": "And?"}
    chosen, rejected = [ASKED, PEARS, more, PEARS], [ASKED, PLANKS, more, PLANKS]
    row = recognise({"chosen": chosen, "rejected": rejected}, "f:1")
    assert row == Row(([ASKED, PEARS, more], [ASKED, PLANKS, more]), ([PEARS], [PLANKS]), conversational=True)
    shorter = recognise({"chosen": [ASKED, PEARS], "rejected": rejected}, "f:1")
    assert shorter == Row(([ASKED], [ASKED, PLANKS, more]), ([PEARS], [PLANKS]), conversational=True)


def test_a_conversation_that_is_the_beginning_of_the_other_answers_nothing() -> None:
    more = [ASKED, PEARS, {"role": "user", "content": "more"}, PLANKS]
    assert recognise({"chosen": more[:2], "rejected": more}, "f:1").reason_to_drop() == EMPTY
    assert recognise({"chosen": more, "rejected": more[:2]}, "f:1").reason_to_drop() == EMPTY
    assert recognise({"chosen": more, "rejected": more}, "f:1").reason_to_drop() == IDENTICAL


def test_a_text_prompt_beside_turns_of_the_assistant_alone_is_their_prompt() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    said = [called, {"role": "tool", "content": "3"}]
    row = recognise({"prompt": "Name a fruit.", "chosen": [*said, PEARS], "rejected": [*said, PLANKS]}, "f:1")
    assert row == Row(([ASKED],), ([*said, PEARS], [*said, PLANKS]), conversational=True)


def test_a_text_prompt_that_the_conversations_do_not_ask_is_refused() -> None:
    sides = {"chosen": [ASKED, PEARS], "rejected": [ASKED, PLANKS]}
    assert recognise({"prompt": "<|user|>Name a fruit.<|end|>"} | sides, "f:1") == READ
    assert "`prompt` is another text than what is asked in `chosen`" in refusal({"prompt": "Name a tool."} | sides)
