"""Rows become groups once: in one process or many, cached under a key of all that changes them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.schema import DataConfig
from megadpo.config.sources import parse_sources
from megadpo.data.rows import dataset as prepare
from megadpo.data.rows.cache_key import cache_key
from megadpo.data.rows.dataset import look_through, make_groups, prepare_groups
from megadpo.data.rows.encode import encode
from megadpo.data.rows.tokenise import PROBES, load_tokenizer
from megadpo.errors import UserError
from tests.helpers.worlds import forked, pipe
from tests.unit.data.conftest import CHATML

PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}


def key_of(options: DataConfig, sources: Any, tokenizer: str) -> str:
    job = prepare.TokeniseJob(tokenizer, options.chat_template, options.max_length, options.truncation)
    return cache_key(parse_sources(sources, options.columns), job)


def test_raw_hh_rows_become_groups_and_odd_ones_are_counted(
    options: DataConfig, hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "hh.jsonl.gz", hh_rows)
    groups, report = (prepared := prepare_groups(options, file, bpe_dir)).groups, prepared.report
    assert report.num_rows == len(hh_rows) == 2312
    assert report.dropped == {"empty completion": 4} and report.num_kept == len(groups) == 2308
    assert report.num_unshared == sum(not group.shares_prompt for group in groups) == 5
    assert report.sentence().startswith("2,308 of 2,312 pairs kept, 4 dropped (empty completion), ")
    longest = max(len(g.prompt_of(k)) + len(g.responses[k]) for g in groups for k in range(2))
    assert longest <= options.max_length
    dropped = {86, 516, 925, 1103} if "pranks" in hh_rows[0]["chosen"] else {86, 664, 1242, 1820}
    assert set(range(2312)) - set(groups.rows.tolist()) == dropped


def test_sharing_prompts_saves_a_third_of_the_tokens_of_hh_rows(hh_pairs: Any) -> None:
    assert 0.5 < hh_pairs.num_tokens(True).sum() / hh_pairs.num_tokens(False).sum() < 0.7


@pytest.fixture
def few_rows_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started for few rows, too."""
    monkeypatch.setattr(prepare, "MIN_ROWS_FOR_WORKERS", 100)
    monkeypatch.setattr(prepare, "_CHUNK", 100)


def torch_is_there(*unused: Any) -> bool:
    """A look at rows."""
    return "torch" in sys.modules


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows_for_workers")
def test_processes_give_the_groups_that_one_process_gives_without_importing_torch(
    hh_rows: list[dict[str, str]], sharegpt_rows: list[dict[str, Any]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    sources = parse_sources(
        [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("hh", hh_rows[:600]), ("zh", sharegpt_rows))]
    )
    job = prepare.TokeniseJob(bpe_dir, None, 256, "prompt_left")
    alone, alone_report = make_groups(sources, job, num_workers=1)
    many, many_report, seen = look_through(sources, job, 2, torch_is_there)
    assert many.digest == alone.digest and many_report == alone_report
    assert len(seen) >= 7 and not any(seen)


@pytest.mark.parametrize("kind", ["bpe_dir", "merging_dir", "bos_dir", "sentencepiece_dir"])
def test_the_tokenizer_that_workers_get_is_the_one_that_is_loaded(
    kind: str, hh_rows: list[dict[str, str]], request: pytest.FixtureRequest
) -> None:
    loaded = load_tokenizer(request.getfixturevalue(kind), CHATML)
    assert prepare._for_workers(loaded) is loaded
    theirs = pickle.loads(pickle.dumps(loaded))  # noqa: S301 - as multiprocessing sends it
    texts = [*PROBES, *(row["chosen"] + loaded.eos_token for row in hh_rows[:20])]
    for special in (True, False):
        assert encode(theirs, texts, special) == encode(loaded, texts, special)
    turns = [{"role": "user", "content": text} for text in texts]
    assert theirs.apply_chat_template(turns) == loaded.apply_chat_template(turns)
    assert (theirs.model_max_length, theirs.eos_token) == (loaded.model_max_length, loaded.eos_token)


def _prepared(cache_dir: str, file: str, tokenizer: str, answers: Any) -> None:
    """What a rank does: its digest, and whether it made the groups itself."""
    made: list[bool] = []
    make, prepare.make_groups = prepare.make_groups, lambda *rest: (made.append(True), make(*rest))[1]  # type: ignore
    groups = prepare_groups(DataConfig(cache_dir=cache_dir), file, tokenizer).groups
    answers.send((groups.digest, bool(made)))


@pytest.mark.slow
def test_the_cache_is_read_the_second_time_and_by_processes_that_waited(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR] * 3)
    pipes = [pipe() for _ in range(3)]
    ranks = [forked(_prepared, options.cache_dir, file, bpe_dir, its) for _, its in pipes]
    answers = [ours.recv() for ours, _ in pipes if ours.poll(120)]
    for rank in ranks:
        rank.join()
    assert sorted(made for _, made in answers) == [False, False, True]
    assert {digest for digest, _ in answers} == {prepare_groups(options, file, bpe_dir).groups.digest}


def test_the_key_changes_with_everything_that_changes_a_group(
    options: DataConfig, bpe_dir: str, bos_dir: str, tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    keys = {key_of(options, file, bpe_dir)}
    keys.add(key_of(options, file, bos_dir))
    keys.add(key_of(replace(options, chat_template="{{ x }}"), file, bpe_dir))
    keys.add(key_of(replace(options, max_length=77), file, bpe_dir))
    keys.add(key_of(replace(options, max_length=None), file, bpe_dir))
    keys.add(key_of(replace(options, truncation="keep_end"), file, bpe_dir))
    keys.add(key_of(replace(options, columns={"prompt": "q"}), file, bpe_dir))
    keys.add(key_of(options, [file, file], bpe_dir))
    changed = shutil.copytree(bpe_dir, tmp_path / "tokenizer")
    (changed / "chat_template.jinja").write_text("{{ other }}")
    keys.add(key_of(options, file, str(changed)))
    monkeypatch.setattr("megadpo.data.rows.cache_key.CODE_VERSION", -1)
    keys.add(key_of(options, file, bpe_dir))
    monkeypatch.undo()
    monkeypatch.setattr("transformers.__version__", "0")
    keys.add(key_of(options, file, bpe_dir))
    monkeypatch.undo()
    write_jsonl(tmp_path / "a.jsonl", [PAIR | {"chosen": " Blux."}])
    keys.add(key_of(options, file, bpe_dir))
    assert len(keys) == 12


def test_the_key_does_not_change_with_time_place_or_weight(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    key = key_of(options, file, bpe_dir)
    os.utime(file, (1, 1))
    other = shutil.copytree(bpe_dir, tmp_path / "tokenizer")
    (other / "model.safetensors").write_bytes(b"weights")
    assert key_of(replace(options, num_workers=8), {"path": file, "weight": 3}, str(other)) == key


def test_datasets_are_keyed_by_their_rows(options: DataConfig, bpe_dir: str, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [PAIR, PAIR | {"chosen": " Teal."}, PAIR | {"chosen": " Red."}]
    one, again = Dataset.from_list(rows), Dataset.from_list(rows)
    one.save_to_disk(str(tmp_path / "saved"))
    key = key_of(options, one, bpe_dir)
    assert key == key_of(options, again, bpe_dir)
    assert key != key_of(options, one.select([0, 2]), bpe_dir) != key_of(options, one.select([2, 0]), bpe_dir)
    assert prepare_groups(options, one, bpe_dir).groups.digest == (
        prepare_groups(options, str(tmp_path / "saved"), bpe_dir).groups.digest
    )


def test_rows_sources_and_weights_are_numbered_over_all_sources(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    empty = PAIR | {"rejected": ""}
    one = write_jsonl(tmp_path / "one.jsonl", [PAIR, empty, PAIR])
    other = write_jsonl(tmp_path / "other.jsonl", [empty, {"p": "Sky?", "chosen": " Blue.", "rejected": " Grey."}])
    value = [{"path": one, "weight": 2}, {"path": other, "columns": {"prompt": "p"}}]
    groups = prepare_groups(options, value, bpe_dir).groups
    assert groups.rows.tolist() == [0, 2, 4] and groups.sources.tolist() == [0, 0, 1]
    assert groups.source_weights.tolist() == [2.0, 1.0] and groups.source_names == [one, other]
    value[0]["weight"] = 5
    assert prepare_groups(options, value, bpe_dir).groups.source_weights.tolist() == [5.0, 1.0]


@pytest.mark.parametrize("truncation", ["prompt_left", "keep_start", "keep_end"])
def test_truncation_is_counted_and_only_keep_end_may_part_the_prompts(
    truncation: str, options: DataConfig, hh_rows: list[dict[str, str]], bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "hh.jsonl", hh_rows[:300])
    prepared = prepare_groups(replace(options, max_length=128, truncation=truncation), file, bpe_dir)
    report = prepared.report
    lengths = [len(g.prompt_of(k)) + len(g.responses[k]) for g in prepared.groups for k in range(2)]
    assert max(lengths) == 128 and report.num_truncated > 50
    assert (report.num_unshared > 10) == (truncation == "keep_end")
    assert ("completion truncated away" in report.dropped) == (truncation == "keep_start")
    assert report.num_kept + sum(report.dropped.values()) == report.num_rows == 300


def test_a_cut_prompt_keeps_its_last_user_turn(options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any) -> None:
    from transformers import AutoTokenizer

    early = "\n\nHuman: what is this about\n\nAssistant: many things" * 20
    prompt = early + "\n\nHuman: Which colour has the sky?\n\nAssistant:"
    row = {"chosen": prompt + " blue" * 200, "rejected": prompt + " green"}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    (group,) = prepare_groups(replace(options, max_length=100), file, bpe_dir).groups
    text = AutoTokenizer.from_pretrained(bpe_dir).decode(group.prompts[0])
    assert text == "\n\nHuman: Which colour has the sky?\n\nAssistant:"
    assert len(group.prompts[0]) + len(group.responses[0]) == 100


def test_no_rows_left_says_why_with_counts(options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any) -> None:
    rows = [PAIR | {"chosen": ""}, PAIR | {"chosen": ""}, PAIR | {"rejected": PAIR["chosen"]}]
    message = r"no pair is left of .*a.jsonl: 3 rows read, dropped: 2 empty completion, 1 identical chosen and rejected"
    with pytest.raises(UserError, match=message):
        prepare_groups(options, write_jsonl(tmp_path / "a.jsonl", rows), bpe_dir)
    with pytest.raises(UserError, match=r"no pair is left of .*b.jsonl: there is no row in it"):
        prepare_groups(options, write_jsonl(tmp_path / "b.jsonl", []), bpe_dir)


def test_user_mistakes_leave_nothing_in_the_cache(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR, {"prompt": "a"}])
    with pytest.raises(UserError, match=r"a.jsonl:2: the row lacks `chosen` and `rejected`; it has prompt"):
        prepare_groups(options, file, bpe_dir)
    with pytest.raises(UserError, match=r"data.truncation is 'middle'; it must be one of prompt_left"):
        prepare_groups(replace(options, truncation="middle"), file, bpe_dir)
    with pytest.raises(UserError, match=r"data.max_length is 1"):
        prepare_groups(replace(options, max_length=1), file, bpe_dir)
    with pytest.raises(UserError, match=r"model.path: .*nowhere is not a directory"):
        prepare_groups(options, file, str(tmp_path / "nowhere"))
    assert [path for path in Path(str(options.cache_dir)).rglob("*") if path.suffix != ".lock" and path.is_file()] == []


@pytest.mark.slow
@pytest.mark.usefixtures("few_rows_for_workers")
def test_errors_in_a_worker_reach_the_user_as_they_are(bpe_dir: str, tmp_path: Path, write_jsonl: Any) -> None:
    refused = {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}
    template = "{% if messages[0]['content'] == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    sources = parse_sources(write_jsonl(tmp_path / "a.jsonl", [PAIR] * 300 + [refused]))
    job = prepare.TokeniseJob(bpe_dir, template, None, "prompt_left")
    with pytest.raises(UserError, match=r"a.jsonl:301: the chat template refuses the row: no x"):
        make_groups(sources, job, num_workers=2)


def test_a_damaged_cache_is_made_again_and_an_unwritable_one_is_one_sentence(
    options: DataConfig, bpe_dir: str, tmp_path: Path, write_jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    digest = prepare_groups(options, file, bpe_dir).groups.digest
    (store,) = Path(str(options.cache_dir)).glob("groups/*/store.json")
    store.write_text(json.dumps({"format_version": 99, "extra": {}}))
    assert prepare_groups(options, file, bpe_dir).groups.digest == digest
    assert f"the token cache {store.parent} is damaged (store.json is not what was written)" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"data.cache_dir: .* cannot be read or written \(.*; .*set data.cache_dir to another"
    ):
        prepare_groups(replace(options, cache_dir=file), file, bpe_dir)


def test_the_cache_lies_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADPO_CACHE", "/elsewhere")
    assert prepare.cache_root("/here") == Path("/here") and prepare.cache_root(None) == Path("/elsewhere")
    monkeypatch.delenv("MEGADPO_CACHE")
    assert prepare.cache_root(None) == Path.home() / ".cache" / "megadpo"


def test_sentencepiece_directories_work_end_to_end(
    options: DataConfig, hh_rows: list[dict[str, str]], sentencepiece_dir: str, tmp_path: Path, write_jsonl: Any
) -> None:
    file = write_jsonl(tmp_path / "hh.jsonl", hh_rows[:50])
    groups = prepare_groups(options, file, sentencepiece_dir).groups
    assert len(groups) == 50 and all(response[-1] == 2 for group in groups for response in group.responses)
