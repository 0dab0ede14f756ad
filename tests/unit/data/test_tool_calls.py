"""Tools, tool calls and template arguments of a row reach the template as the tokenizer's own method hands them over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.data.rows.dataset import prepare_groups
from megadpo.data.rows.formats import Reading, recognise
from megadpo.data.rows.tokenise import GroupTokens, load_tokenizer, tokenise_rows
from megadpo.errors import UserError

TEMPLATE = """
{%- if tools is defined and tools is not none %}{{ '<|system|>Tools: ' + (tools | tojson) + '<|end|>\\n' }}{% endif %}
{%- for m in messages %}
  {{- '<|' + m['role'] + '|>' }}
  {%- if m['role'] == 'tool' and m['name'] is defined %}{{ '[' + m['name'] + ']' }}{% endif %}
  {%- if m['content'] is string %}{{ m['content'] }}{% endif %}
  {%- if m['tool_calls'] is defined %}
    {%- for call in m['tool_calls'] %}
      {%- set call = call['function'] if call['function'] is defined else call %}
      {{- '<call>' + call['name'] + ' ' }}
      {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}
    {%- endfor %}
  {%- endif %}
  {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ 'no thinking: ' }}{% endif %}
{%- endif %}
{%- if location is defined %}{{ location }}{% endif %}"""


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "description": f"to {name}", "parameters": parameters}}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


LOOK = tool("look", city={"type": "string", "enum": ["Rome", "Oslo"]}, unit={"type": "string"})
ADD = tool("add", a={"type": "integer"}, b={"type": "integer"})
ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Weather in Rome?"}]
RESULT = {"role": "tool", "name": "look", "content": "warm"}
SUNNY = {"role": "assistant", "content": "It is warm."}
COLD = {"role": "assistant", "content": "It is cold."}

# Each is a prompt with a better and a worse answer, and what the row says beside them.
CASES: dict[str, tuple[list[Any], list[Any], list[Any], dict[str, Any]]] = {
    "nothing": (ASKED, [SUNNY], [COLD], {}),
    "tools": (ASKED, [SUNNY], [COLD], {"tools": [LOOK, ADD]}),
    "no tools": (ASKED, [SUNNY], [COLD], {"tools": []}),
    "a call as the answer": (ASKED, [call("look", {"city": "Rome"})], [COLD], {"tools": [LOOK]}),
    "nulls and order of arguments": (
        ASKED,
        [call("look", {"unit": None, "city": "Rome"})],
        [call("look", {"city": None})],
        {"tools": [LOOK]},
    ),
    "arguments as JSON text": (ASKED, [call("look", '{"city":  "Rome"}')], [call("look", "{not json")], {"tools": [LOOK]}),
    "a call and its result before the answer": (
        [*ASKED, call("look", {"city": "Rome"}), RESULT],
        [SUNNY],
        [COLD],
        {"tools": [LOOK], "chat_template_kwargs": {"enable_thinking": True}},
    ),
    "a call and its result within the answer": (
        ASKED,
        [call("look", {"city": "Rome"}), RESULT, SUNNY],
        [call("add", {"a": 1, "b": 2})],
        {"tools": [LOOK, ADD]},
    ),
    "template arguments": (ASKED, [SUNNY], [COLD], {"chat_template_kwargs": {"enable_thinking": False}}),
    "arguments named as ours": (ASKED, [SUNNY], [COLD], {"chat_template_kwargs": {"location": "Rome", "kwargs": 1}}),
}


def tokenise(tokenizer: Any, row: dict[str, Any], kind: str = "pairs") -> GroupTokens:
    (tokens,) = tokenise_rows([("f:1", recognise(row, "f:1", Reading(kind)))], tokenizer)
    assert isinstance(tokens, GroupTokens)
    return tokens


def own(tokenizer: Any, messages: list[Any], said: dict[str, Any], **options: Any) -> list[int]:
    """What the tokenizer's own method makes of the messages."""
    kwargs = said.get("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(
        messages, tools=said.get("tools"), tokenize=True, return_dict=False, **options, **kwargs
    )


@pytest.mark.parametrize("case", CASES)
def test_prompt_and_answers_are_what_the_tokenizer_makes_of_the_whole_conversations(case: str, bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    prompt, better, worse, said = CASES[case]
    rows = {
        "pairs": {"prompt": prompt, "chosen": better, "rejected": worse},
        "lists": {"prompt": prompt, "responses": [worse, better], "scores": [0, 1]},
        "labels": {"prompt": prompt, "completion": better, "label": True},
        "examples": {"prompt": prompt, "completion": better},
    }
    for kind, row in rows.items():
        tokens = tokenise(tokenizer, row | said, kind)
        answers = (better, worse) if kind in ("pairs", "lists") else (better,)
        for (prompt_ids, response_ids), answer in zip(tokens.sequences(), answers, strict=True):
            whole = own(tokenizer, prompt + answer, said)
            assert prompt_ids + response_ids == whole
            alone = own(tokenizer, prompt, said, add_generation_prompt=True)
            assert prompt_ids == alone or (tokens.moved_boundary and prompt_ids == alone[: len(prompt_ids)])


@pytest.mark.parametrize("case", [case for case in CASES if "within" not in case])
def test_a_conversation_with_calls_ends_with_its_answer(case: str, bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    prompt, better, _, said = CASES[case]
    row = {"messages": prompt + better, "label": False} | said
    for kind in ("labels", "examples"):
        (side,) = tokenise(tokenizer, row, kind).sequences()
        assert side[0] + side[1] == own(tokenizer, prompt + better, said)


def test_tools_calls_results_and_arguments_are_in_the_text(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    prompt, better, worse, said = CASES["a call and its result before the answer"]
    said = said | {"chat_template_kwargs": {"enable_thinking": False}}
    text = tokenizer.decode(tokenise(tokenizer, {"prompt": prompt, "chosen": better, "rejected": worse} | said).prompts[0])
    assert text.startswith(f"<|system|>Tools: {json.dumps([LOOK])}<|end|>\n<|system|>Be kind.")
    assert text.endswith('<|assistant|><call>look {"city": "Rome"}<|end|>\n<|tool|>[look]warm<|end|>\n<|assistant|>')


@pytest.mark.parametrize("tools", [[LOOK, ADD], json.dumps([LOOK, ADD]), [json.dumps(LOOK), json.dumps(ADD)]])
def test_tools_may_be_json_text_as_a_whole_or_each(tools: Any, bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    row = {"prompt": ASKED, "chosen": [SUNNY], "rejected": [COLD]}
    assert tokenise(tokenizer, row | {"tools": tools}) == tokenise(tokenizer, row | {"tools": [LOOK, ADD]})


@pytest.mark.parametrize("tools", [None, "", "  ", "null"])
def test_blank_tools_are_no_tools(tools: Any, bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    row = {"prompt": ASKED, "chosen": [SUNNY], "rejected": [COLD]}
    assert tokenise(tokenizer, row | {"tools": tools}) == tokenise(tokenizer, row)


def test_calls_and_template_arguments_may_be_json_text(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir, TEMPLATE)
    prompt, better, worse, said = CASES["a call and its result before the answer"]
    row = {"prompt": prompt, "chosen": better, "rejected": worse} | said
    calls = {**prompt[2], "tool_calls": json.dumps(prompt[2]["tool_calls"])}
    texts = {"prompt": [*prompt[:2], calls, prompt[3]], "chat_template_kwargs": json.dumps(said["chat_template_kwargs"])}
    assert tokenise(tokenizer, row | texts) == tokenise(tokenizer, row)


@pytest.mark.parametrize("store", ["parquet", "dataset", "json columns"])
@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_rows_that_went_through_arrow_are_the_rows_that_went_in(
    store: str, kind: str, options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    """Arrow gives every tool, call and message the keys of all others, filled with null."""
    from datasets import Dataset

    options.chat_template = TEMPLATE
    rows: list[dict[str, Any]] = []
    for place, (name, arguments) in enumerate((("look", {"city": "Rome"}), ("add", {"a": 1, "b": 2})) * 2):
        prompt = [*ASKED[place % 2 :], call(name, arguments), {"role": "tool", "name": name, "content": "3"}]
        answer = {"chosen": [SUNNY], "rejected": [call(name, arguments)]}
        if kind == "labels":
            answer = {"completion": [(SUNNY, call(name, arguments))[place % 2]], "label": place < 2}
        kwargs = {"enable_thinking": False} if place < 2 else {"location": "Rome"}
        rows.append({"prompt": prompt, **answer, "tools": [(LOOK, ADD)[place % 2]], "chat_template_kwargs": kwargs})
    rows[-1]["tools"] = None
    expected = prepare_groups(options, write_jsonl(tmp_path / "a.jsonl", rows), bpe_dir, Reading(kind)).groups
    if store == "parquet":
        import pyarrow
        import pyarrow.parquet

        source: Any = str(tmp_path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    else:
        source = Dataset.from_list(rows, on_mixed_types="use_json" if store == "json columns" else None)
    assert prepare_groups(options, source, bpe_dir, Reading(kind)).groups.digest == expected.digest


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tools": "{"}, "`tools` is no valid JSON"),
        ({"tools": "look"}, "`tools` is no valid JSON"),
        ({"tools": ["{"]}, "`tools` is no valid JSON"),
        ({"tools": LOOK}, "`tools` must be a list of objects, one a tool (or its JSON text), it is {'type': 'function'"),
        ({"tools": json.dumps(LOOK)}, "`tools` must be a list of objects"),
        ({"tools": '"look"'}, "`tools` must be a list of objects"),
        ({"tools": [["look"]]}, "`tools` must be a list of objects"),
        ({"tools": [None]}, "`tools` must be a list of objects"),
        ({"tools": 3}, "`tools` must be a list of objects"),
        ({"chat_template_kwargs": [1]}, "`chat_template_kwargs` must be an object of names and values, it is [1]"),
        ({"chat_template_kwargs": "thinking"}, "`chat_template_kwargs` is no valid JSON"),
        *(
            ({"chat_template_kwargs": {name: None}}, f"`chat_template_kwargs` may not set {name!r}, only what the template")
            for name in ("tools", "chat_template", "tokenize", "add_generation_prompt", "messages", "return_dict", "padding")
        ),
        ({"prompt": [{**call("look", {}), "tool_calls": "look"}]}, "`tool_calls` of `prompt` is no valid JSON"),
        ({"prompt": [{**call("look", {}), "tool_calls": {}}]}, "`tool_calls` of a message of `prompt` must be a list"),
        ({"prompt": [{**call("look", {}), "tool_calls": ["look"]}]}, "`tool_calls` of a message of `prompt` must be a list"),
        ({"prompt": [call(["look"], {})]}, "a call of `tool_calls` of `prompt` needs a `name` (text) and `arguments`"),
        ({"prompt": [call("look", [1])]}, "a call of `tool_calls` of `prompt` needs a `name` (text) and `arguments`"),
        ({"prompt": [{**call("look", {}), "tool_calls": [{"a": 1}]}]}, "a call of `tool_calls` of `prompt` needs"),
        ({"prompt": [{**call("look", {}), "tool_calls": []}]}, "a message of `prompt` has no text as its content but None"),
    ],
)
def test_tools_calls_and_arguments_that_no_template_can_read_are_refused(said: dict[str, Any], message: str) -> None:
    row = {"prompt": ASKED, "chosen": [SUNNY], "rejected": [COLD]} | said
    with pytest.raises(UserError) as caught:
        recognise(row, "f:9")
    assert str(caught.value).startswith(f"f:9: {message}")
