"""Boundary, EOS and BOS as TRL has them, and the three truncations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megadpo.data.rows.formats import Reading, recognise
from megadpo.data.rows.tokenise import (
    EMPTY,
    IDENTICAL,
    IDENTICAL_TRUNCATED,
    TRUNCATED_AWAY,
    GroupTokens,
    last_turn_lengths,
    load_tokenizer,
    tokenise_rows,
    truncate,
)
from megadpo.errors import UserError

_MARK = "\n\nAssistant:"


def tokenise_as_trl(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """What TRL's DPOTrainer makes of the rows: its own method, on its own library's dataset."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    return list(DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train"))


def split_hh(row: dict[str, str]) -> dict[str, str] | None:
    """The explicit row that TRL is given for a raw hh-rlhf row, None where the prompts differ or an answer is empty."""
    cuts = {side: row[side].rindex(_MARK) + len(_MARK) for side in ("chosen", "rejected")}
    prompt, other = (row[side][: cuts[side]] for side in cuts)
    chosen, rejected = (row[side][cuts[side] :] for side in cuts)
    if prompt != other or not chosen.strip() or not rejected.strip():
        return None
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def ours(rows: list[dict[str, Any]], tokenizer: Any) -> list[GroupTokens | str]:
    return tokenise_rows([(f"row {i}", recognise(row, f"row {i}")) for i, row in enumerate(rows)], tokenizer)


def assert_equal_to_trl(pairs: list[GroupTokens | str], expected: list[dict[str, list[int]]]) -> None:
    assert len(pairs) == len(expected)
    for pair, row in zip(pairs, expected, strict=True):
        assert isinstance(pair, GroupTokens)
        assert pair.prompts == (row["prompt_ids"],)
        assert pair.responses == (row["chosen_ids"], row["rejected_ids"])


@pytest.mark.parametrize("directory", ["bpe_dir", "merging_dir", "bos_dir", "sentencepiece_dir"])
@pytest.mark.slow
def test_raw_hh_rows_tokenise_as_trl_tokenises_the_same_split(
    directory: str, hh_rows: list[dict[str, str]], request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    raw = [row for row in hh_rows[:400] if split_hh(row)]
    pairs = ours(raw, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl([split_hh(row) for row in raw], tokenizer))
    eos = tokenizer.eos_token_id
    assert all(response[-1] == eos for pair in pairs for response in pair.responses)
    assert (sum(pair.moved_boundary for pair in pairs) > 100) == (directory == "merging_dir")
    if directory in ("bos_dir", "sentencepiece_dir"):
        bos = tokenizer.bos_token_id
        assert all(pair.prompts[0][0] == bos and pair.prompts[0].count(bos) == 1 for pair in pairs)


def test_tokens_that_straddle_the_boundary_belong_to_the_completions(
    merging_dir: str, hh_rows: list[dict[str, str]]
) -> None:
    tokenizer = load_tokenizer(merging_dir)
    rows = []
    for row in filter(None, map(split_hh, hh_rows[:200])):
        middle = len(row["prompt"]) - 3  # a prompt that ends in the middle of a word: "\n\nAssista" + "nt: …"
        tail = row["prompt"][middle:]
        rows.append({"prompt": row["prompt"][:middle]} | {s: tail + row[s] for s in ("chosen", "rejected")})
    pairs = ours(rows, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl(rows, tokenizer))
    moved = [pair for pair in pairs if pair.moved_boundary]
    assert len(moved) > 100
    for row, pair in zip(rows, pairs, strict=True):
        for response, side in zip(pair.responses, ("chosen", "rejected"), strict=True):
            assert tokenizer.decode(pair.prompts[0] + response) == row["prompt"] + row[side] + "</s>"


def test_one_side_that_merges_moves_the_boundary_of_both(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    words = ["Assistant", "Human", "about", "would", "think", "because", "people"]
    rows = [{"prompt": w[:k], "chosen": w[k:] + " x", "rejected": " 7%"} for w in words for k in range(1, len(w))]
    rows = [{side: "Q: " * (side == "prompt") + text for side, text in row.items()} for row in rows]
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    pairs = ours(rows, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl(rows, tokenizer))
    assert any(pair.moved_boundary for pair in pairs)


def test_implicit_text_that_parts_between_words_splits_where_trl_splits_it(bpe_dir: str) -> None:
    rows = [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "One two three", "rejected": "One two four"},
        {"chosen": "I say: yes", "rejected": "I say: no, never"},
    ]
    tokenizer = load_tokenizer(bpe_dir)
    assert_equal_to_trl(ours(rows, tokenizer), tokenise_as_trl(rows, tokenizer))


def test_eos_is_not_added_twice_to_text(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    rows = [{"prompt": "Why?", "chosen": " Because.</s>", "rejected": " No."}]
    pairs = ours(rows, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl(rows, tokenizer))
    assert [response.count(tokenizer.eos_token_id) for response in pairs[0].responses] == [1, 1]


def test_conversations_tokenise_as_trl_does_and_get_no_eos(bpe_dir: str, hh_rows: list[dict[str, str]]) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    rows = []
    for row in filter(None, map(split_hh, hh_rows[:100])):
        turns = row["prompt"].removesuffix(_MARK).replace(_MARK, "\n\nHuman:").split("\n\nHuman:")[1:]
        prompt = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]
        sides = {s: [{"role": "assistant", "content": row[s].strip()}] for s in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **sides})
    pairs = ours(rows, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl(rows, tokenizer))
    assert all(tokenizer.eos_token_id not in response for pair in pairs for response in pair.responses)


def test_implicit_conversations_tokenise_as_trl_does(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Colour of the sky?"}]
    rows = [{s: [*asked, {"role": "assistant", "content": c}] for s, c in (("chosen", "Blue"), ("rejected", "Red"))}]
    pairs = ours(rows, tokenizer)
    assert_equal_to_trl(pairs, tokenise_as_trl(rows, tokenizer))
    assert tokenizer.decode(pairs[0].prompts[0]).endswith("Colour of the sky?<|end|>\n<|assistant|>")


def test_real_sharegpt_rows_tokenise_as_trl_does_with_the_same_messages(
    bpe_dir: str, sharegpt_rows: list[dict[str, Any]]
) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def messages(turns: Any) -> list[dict[str, str]]:
        turns = turns if isinstance(turns, list) else [turns]
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]

    raw = sharegpt_rows[:40]
    rows = [
        {"prompt": messages(r["conversations"]), "chosen": messages(r["chosen"]), "rejected": messages(r["rejected"])}
        for r in raw
    ]
    assert_equal_to_trl(ours(raw, tokenizer), tokenise_as_trl(rows, tokenizer))


def answers_as_trl(rows: list[dict[str, Any]], tokenizer: Any, kind: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of each row as TRL's KTOTrainer ("labels") or SFTTrainer ("examples") makes it."""
    from datasets import Dataset
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    trainer.calculate_KL, trainer.desirable_weight, trainer.undesirable_weight = False, 1.0, 1.0
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, assistant_only_loss=False, shuffle_dataset=False)
    args.dataset_text_field = "text"
    dataset = Dataset.from_list(rows)
    if kind == "labels":
        made = KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
        return [(row["prompt_ids"], row["completion_ids"]) for row in made]
    made = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")
    cuts = [next(place for place, label in enumerate(row["labels"]) if label != -100) for row in made]
    return [(row["input_ids"][:cut], row["input_ids"][cut:]) for row, cut in zip(made, cuts, strict=True)]


@pytest.mark.parametrize("kind", ["labels", "examples"])
@pytest.mark.parametrize("directory", ["bpe_dir", "merging_dir", "bos_dir", "sentencepiece_dir"])
@pytest.mark.slow
def test_single_answers_tokenise_as_trls_kto_and_sft_do(
    kind: str, directory: str, hh_rows: list[dict[str, str]], request: pytest.FixtureRequest
) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(directory))
    rows = []
    for number, row in enumerate(filter(None, map(split_hh, hh_rows[:150]))):
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0})
        # A prompt that ends in the middle of a word, so that tokens may straddle the boundary.
        rows.append({"prompt": row["prompt"][:-3], "completion": row["prompt"][-3:] + row["rejected"], "label": True})
    found = tokenise_rows([("row", recognise(row, "row", Reading(kind))) for row in rows], tokenizer)
    assert [tokens.sequences() for tokens in found] == [[side] for side in answers_as_trl(rows, tokenizer, kind)]
    assert sum(tokens.moved_boundary for tokens in found) > 50


@pytest.mark.parametrize("kind", ["labels", "examples"])
def test_real_labelled_conversations_tokenise_as_trls_kto_and_sft_do(
    kind: str, bpe_dir: str, labelled_rows: list[dict[str, Any]]
) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    found = tokenise_rows([("row", recognise(row, "row", Reading(kind))) for row in labelled_rows[:80]], tokenizer)
    rows = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": row["label"]}
        for row in labelled_rows[:80]
    ]
    assert [tokens.sequences() for tokens in found] == [[side] for side in answers_as_trl(rows, tokenizer, kind)]


def test_one_of_many_responses_that_merges_moves_the_boundary_of_all(
    merging_dir: str, hh_rows: list[dict[str, str]]
) -> None:
    tokenizer = load_tokenizer(merging_dir)
    num_moved = 0
    for row in filter(None, map(split_hh, hh_rows[:60])):
        prompt, tail = row["prompt"][:-3], row["prompt"][-3:]
        texts = ["%7", tail + row["chosen"], tail + row["rejected"]]
        listed = recognise({"prompt": prompt, "responses": texts, "ranks": [1, 2, 3]}, "row", Reading("lists"))
        (tokens,) = tokenise_rows([("row", listed)], tokenizer)
        pairs = ours([{"prompt": prompt, "chosen": texts[0], "rejected": text} for text in texts[1:]], tokenizer)
        assert isinstance(tokens, GroupTokens) and len(tokens.prompts) == 1
        assert len(tokens.prompts[0]) == min(len(pair.prompts[0]) for pair in pairs)
        for response, text in zip(tokens.responses, texts, strict=True):
            assert tokenizer.decode(tokens.prompts[0] + response) == prompt + text + "</s>"
        num_moved += tokens.moved_boundary
    assert num_moved > 20


def test_differing_prompts_are_kept_as_two(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    chosen = "\n\nHuman: Hello there\n\nAssistant: Good day."
    rejected = "\n\nHuman: Hello you\n\nAssistant: Good day."
    (pair,) = ours([{"chosen": chosen, "rejected": rejected}], tokenizer)
    assert isinstance(pair, GroupTokens) and len(pair.prompts) == 2
    for (prompt, response), text in zip(pair.sequences(), (chosen, rejected), strict=True):
        assert tokenizer.decode(prompt) == text[: text.rindex(_MARK) + len(_MARK)]
        assert tokenizer.decode(prompt + response) == text + "</s>"


def test_identical_pairs_and_empty_completions_are_dropped_with_their_reason(bpe_dir: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": " b", "rejected": " b"},
        {"prompt": "a", "chosen": " ", "rejected": " b"},
        {"prompt": "a", "chosen": " b", "rejected": " b</s>"},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": " b", "rejected": " c"},
    ]
    dropped = ours(rows, load_tokenizer(bpe_dir))
    assert dropped[:4] == [IDENTICAL, EMPTY, IDENTICAL, EMPTY]
    assert isinstance(dropped[4], GroupTokens)


def test_text_without_an_eos_token_is_refused(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"row 0: the tokenizer has no end-of-sequence token"):
        ours([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [30, 60, 150])
def test_keep_start_and_keep_end_cut_what_trls_collator_cuts(
    mode: str, max_length: int, bpe_dir: str, hh_rows: list[dict[str, str]]
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = list(filter(None, map(split_hh, hh_rows[:120])))
    pairs = ours(rows, load_tokenizer(bpe_dir))
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)
    num_compared = 0
    for pair in pairs:
        assert isinstance(pair, GroupTokens)
        cut = truncate(pair, max_length, mode)
        if isinstance(cut, str):
            assert cut == IDENTICAL_TRUNCATED or (mode == "keep_start" and len(pair.prompts[0]) >= max_length)
            continue
        keys = {"prompt_ids": pair.prompts[0], "chosen_ids": pair.responses[0], "rejected_ids": pair.responses[1]}
        batch = collator([keys])
        for side, (prompt, response) in enumerate(cut.sequences()):
            present = batch["attention_mask"][side].bool()
            assert batch["input_ids"][side][present].tolist() == prompt + response
            # A first token is never predicted: TRL shifts its mask away, here it counts as prompt.
            scored = batch["completion_mask"][side][present].tolist()
            assert [0, *scored[1:]] == [0] * len(prompt) + [1] * len(response)
        num_compared += 1
    assert num_compared > 10


def test_prompt_left_cuts_the_prompts_beginning_first() -> None:
    pair = GroupTokens((list(range(10)),), ([20, 21, 22], [30, 31]))
    cut = truncate(pair, 8, "prompt_left")
    assert cut == GroupTokens(([5, 6, 7, 8, 9],), ([20, 21, 22], [30, 31]), truncated=True)
    swapped = truncate(GroupTokens((list(range(10)),), ([30, 31], [20, 21, 22])), 8, "prompt_left")
    assert swapped == GroupTokens(([5, 6, 7, 8, 9],), ([30, 31], [20, 21, 22]), truncated=True)


def test_prompt_left_then_cuts_the_completions_ends_and_never_empties_one() -> None:
    pair = GroupTokens(([1, 2, 3],), ([20, 21, 22, 23, 24], [30]))
    assert truncate(pair, 4, "prompt_left") == GroupTokens(([3],), ([20, 21, 22], [30]), truncated=True)
    assert truncate(pair, 2, "prompt_left") == GroupTokens(([3],), ([20], [30]), truncated=True)


def test_prompt_left_keeps_the_last_user_turn_before_the_completions_ends() -> None:
    pair = GroupTokens((list(range(10)),), (list(range(20, 40)), [30]))
    cut = truncate(pair, 12, "prompt_left", num_protected=[4])
    assert cut == GroupTokens(([6, 7, 8, 9],), (list(range(20, 28)), [30]), truncated=True)
    # No more than half of the sequence is given to it.
    long_turn = truncate(pair, 6, "prompt_left", num_protected=[10])
    assert long_turn == GroupTokens(([7, 8, 9],), ([20, 21, 22], [30]), truncated=True)


def test_the_last_user_turn_of_text_and_of_messages_is_found_in_the_prompt(bpe_dir: str) -> None:
    tokenizer = load_tokenizer(bpe_dir)
    text = "\n\nHuman: one two\n\nAssistant: three\n\nHuman: four five\n\nAssistant:"
    asked = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    asked.append({"role": "user", "content": "four five"})
    rows = [
        ({"prompt": text, "chosen": " a", "rejected": " b"}, "\n\nHuman: four five\n\nAssistant:"),
        ({"prompt": asked, "chosen": "a", "rejected": "b"}, "<|user|>four five<|end|>\n<|assistant|>"),
        ({"prompt": "no turns", "chosen": " a", "rejected": " b"}, None),
    ]
    for row, turn in rows:
        located = recognise(row, "row")
        (pair,) = tokenise_rows([("row", located)], tokenizer)
        assert isinstance(pair, GroupTokens)
        (length,) = last_turn_lengths(located, pair, tokenizer, "row")
        if turn is None:
            assert length == 1
        else:
            assert tokenizer.decode(pair.prompts[0][-length:]) == turn


def test_differing_prompts_are_cut_each_to_its_own_side() -> None:
    pair = GroupTokens(([1, 2, 3, 4], [5, 6]), ([20, 21], [30, 31, 32]))
    cut = truncate(pair, 4, "prompt_left")
    assert cut == GroupTokens(([3, 4], [6]), ([20, 21], [30, 31, 32]), truncated=True)


def test_a_pair_truncated_away_is_dropped_with_its_reason() -> None:
    pair = GroupTokens(([1, 2, 3, 4],), ([20, 21], [30, 31]))
    assert truncate(pair, 4, "keep_start") == TRUNCATED_AWAY
    assert truncate(pair, 5, "keep_start") == GroupTokens(([1, 2, 3, 4],), ([20], [30]), truncated=True)
    same_start = GroupTokens(([1],), ([20, 21], [20, 22]))
    assert truncate(same_start, 2, "keep_start") == IDENTICAL_TRUNCATED


def test_a_prompt_without_tokens_takes_the_first_completion_token(bpe_dir: str) -> None:
    """Nothing predicts the first token of a sequence; TRL shifts it out of the mask."""
    assert truncate(GroupTokens(([],), ([7, 8], [7, 9, 9])), None, "keep_end") == GroupTokens(([7],), ([8], [9, 9]))
    assert truncate(GroupTokens(([],), ([7, 8], [6, 9])), None, "keep_end") == GroupTokens(([7], [6]), ([8], [9]))
    assert truncate(GroupTokens(([],), ([7], [6, 9])), None, "keep_end") == TRUNCATED_AWAY


@pytest.mark.parametrize("mode", ["prompt_left", "keep_start", "keep_end"])
def test_any_number_of_responses_is_cut_as_each_pair_of_the_longest_with_another(mode: str) -> None:
    prompt, longest = list(range(10)), [20, 21, 22, 23]
    others = [[30], [30, 31], [40, 41, 42]]
    whole = truncate(GroupTokens((prompt,), (longest, *others)), 11, mode)
    pairs = [truncate(GroupTokens((prompt,), (longest, other)), 11, mode) for other in others]
    assert isinstance(whole, GroupTokens) and whole.truncated
    assert whole.sequences() == [pairs[0].sequences()[0], *(pair.sequences()[1] for pair in pairs)]
    assert len(whole.prompts) == (4 if mode == "keep_end" else 1)


@pytest.mark.parametrize("mode", ["prompt_left", "keep_start", "keep_end"])
def test_a_single_answer_is_cut_as_one_side_of_a_pair_is(mode: str) -> None:
    prompt, answer = list(range(10)), [20, 21, 22]
    pair = truncate(GroupTokens((prompt,), (answer, [30, 31, 32])), 11, mode)
    single = truncate(GroupTokens((prompt,), (answer,)), 11, mode)
    assert isinstance(single, GroupTokens) and single.sequences() == pair.sequences()[:1] and single.truncated
    assert truncate(GroupTokens((prompt,), (answer,)), 10, "keep_start") == TRUNCATED_AWAY
    assert truncate(GroupTokens(([],), ([7, 8],)), None, mode) == GroupTokens(([7],), ([8],))


def test_lists_are_dropped_as_identical_only_if_all_responses_are() -> None:
    assert truncate(GroupTokens(([1],), ([20, 21], [20, 22], [20])), 2, "keep_start") == IDENTICAL_TRUNCATED
    kept = truncate(GroupTokens(([1],), ([20, 21], [20, 22], [30])), 2, "keep_start")
    assert kept == GroupTokens(([1],), ([20], [20], [30]), truncated=True)


def test_nothing_changes_without_a_limit_or_below_it() -> None:
    pair = GroupTokens(([1, 2],), ([20, 21], [30]))
    for mode in ("prompt_left", "keep_start", "keep_end"):
        assert truncate(pair, None, mode) == pair
        assert truncate(pair, 4, mode) == pair


def test_a_missing_or_broken_tokenizer_is_one_clear_sentence(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"model.path: .*nowhere is not a directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
