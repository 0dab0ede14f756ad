"""Chat templates: the tokenizer's, a file's, those that do not render the prompt as a prefix, and those that refuse."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from megadpo.data.rows import templates
from megadpo.data.rows.formats import recognise
from megadpo.data.rows.templates import read_template
from megadpo.data.rows.tokenise import GroupTokens, load_tokenizer, tokenise_rows
from megadpo.errors import UserError
from tests.unit.data.conftest import CHATML

ROW = {"prompt": [{"role": "user", "content": "Colour of the sky?"}], "chosen": "Blue.", "rejected": "Green."}


def tokenise(tokenizer: Any, row: dict[str, Any] = ROW) -> GroupTokens:
    (pair,) = tokenise_rows([("f.jsonl:3", recognise(row, "f.jsonl:3"))], tokenizer)
    assert isinstance(pair, GroupTokens)
    return pair


def test_a_template_may_come_as_a_file_or_as_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8")
    assert read_template(str(tmp_path / "chat.jinja")) == CHATML == read_template(CHATML)
    assert read_template(None) is None
    with pytest.raises(UserError, match=r"data.chat_template: missing.jinja is neither a readable file nor a template"):
        read_template("missing.jinja")


def test_data_chat_template_replaces_the_tokenizers_own(bpe_dir: str) -> None:
    own = tokenise(load_tokenizer(bpe_dir))
    other = load_tokenizer(bpe_dir, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    assert other.decode(tokenise(other).prompts[0]) != other.decode(own.prompts[0])
    assert other.decode(tokenise(other).prompts[0]) == "[Colour of the sky?]"


def test_without_any_template_a_conversation_is_refused(bos_dir: str) -> None:
    with pytest.raises(UserError, match=r"f.jsonl:3: .*no chat template; set data.chat_template to a jinja file"):
        tokenise(load_tokenizer(bos_dir))


def test_a_template_that_begins_with_bos_has_it_once(bos_dir: str) -> None:
    tokenizer = load_tokenizer(bos_dir, "{{ bos_token }}" + CHATML)
    pair = tokenise(tokenizer)
    assert pair.prompts[0].count(tokenizer.bos_token_id) == 1 and pair.prompts[0][0] == tokenizer.bos_token_id


def test_a_generation_prompt_that_the_conversation_leaves_out_ends_the_common_prefix(bpe_dir: str) -> None:
    """As DeepSeek-R1 and Gemma do: the prompt alone ends with "<think>", which no rendered answer has."""
    tokenizer = load_tokenizer(bpe_dir, CHATML.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}"))
    pair = tokenise(tokenizer)
    assert pair.moved_boundary
    assert tokenizer.decode(pair.prompts[0]) == "<|user|>Colour of the sky?<|end|>\n<|assistant|>"
    assert [tokenizer.decode(response) for response in pair.responses] == ["Blue.<|end|>\n", "Green.<|end|>\n"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages|length }} messages: " + CHATML,
        CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'][:5]) +"),
    ],
)
def test_a_template_that_renders_the_last_user_turn_differently_is_refused_with_the_row(template: str, bpe_dir: str) -> None:
    with pytest.raises(UserError, match=r"f.jsonl:3: the chat template renders the prompt differently with an answer"):
        tokenise(load_tokenizer(bpe_dir, template))


def test_a_template_that_refuses_a_row_is_one_sentence_with_the_row(bpe_dir: str) -> None:
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system turn must come first') }}{% endif %}"
    with pytest.raises(UserError, match=r"f.jsonl:3: the chat template refuses the row: A system turn must come first"):
        tokenise(load_tokenizer(bpe_dir, strict))
    with pytest.raises(UserError, match=r"f.jsonl:3: the chat template refuses the row"):
        tokenise(load_tokenizer(bpe_dir, "{% for m in %}"))


def test_tools_and_template_arguments_reach_the_template(bpe_dir: str) -> None:
    template = "{{ tools[0]['name'] if tools else 'none' }} {{ mood|default('calm') }} " + CHATML
    tokenizer = load_tokenizer(bpe_dir, template)
    row = {**ROW, "tools": [{"name": "look"}], "chat_template_kwargs": {"mood": "gay"}}
    assert tokenizer.decode(tokenise(tokenizer, row).prompts[0]).startswith("look gay <|user|>")
    assert tokenizer.decode(tokenise(tokenizer).prompts[0]).startswith("none calm <|user|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it took more than 1 seconds"),
        ("{% for i in range(999) %}{{ 'a' * 50000 }}{% endfor %}", "what it writes has 49,950,000 characters"),
        ("{{ messages.append }}{{ ''.__class__.__mro__ }}", "f.jsonl:3: the chat template refuses the row: "),
    ],
)
def test_a_template_that_takes_for_ever_or_leaves_its_sandbox_is_refused(
    template: str, words: str, bpe_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    with pytest.raises(UserError) as caught:
        tokenise(load_tokenizer(bpe_dir, template))
    assert str(caught.value).startswith("f.jsonl:3: the chat template refuses the row: ") and words in str(caught.value)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_thread_other_than_the_main_one_has_no_limit_and_renders_all_the_same(bpe_dir: str) -> None:
    tokenizer, found = load_tokenizer(bpe_dir), []
    thread = threading.Thread(target=lambda: found.append(tokenise(tokenizer)))
    thread.start()
    thread.join()
    assert found == [tokenise(tokenizer)]
