"""What `megadpo inspect` prints, as text, as JSON and as a page: all of it there, nothing of a row obeyed."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo import cli
from megadpo.errors import UserError
from megadpo.inspect.html import inspect_page
from megadpo.inspect.samples import Part, Piece, pieces, printable
from megadpo.inspect.summary import Summary, look_at_all
from megadpo.inspect.terminal import show, tokens
from megadpo.validation.load import load_config
from tests.helpers.browser import Browser, needs_chromium
from tests.helpers.models import hh_rows, save_model

EVIL = "\x1b[2J\x1b]0;owned\x07 <script>alert(1)</script> [bold red]x[/] \u202egnp.exe 😀é\x00"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hh-rlhf rows, one with a text that would do something to a terminal or a page, and a configuration."""
    directory = tmp_path_factory.mktemp("inspect")
    save_model(directory / "model", num_hidden_layers=1)
    rows: list[dict[str, Any]] = [{"prompt": f"Say {EVIL}:", "chosen": f" {EVIL}", "rejected": " no"}]
    for row in hh_rows(60):
        cut = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
        rows.append({"prompt": row["chosen"][:cut], "chosen": row["chosen"][cut:], "rejected": row["rejected"][cut:]})
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": {"path": str(directory / "model")},
        "data": {"train": str(directory / "rows.jsonl"), "max_length": 300, "cache_dir": str(directory / "cache")},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(options))
    return directory


@pytest.fixture(scope="module")
def summary(files: Path) -> Summary:
    return look_at_all(load_config(files / "run.yaml"), 3)


@needs_chromium
def test_the_page_is_readable_at_both_widths_and_the_console_stays_empty(summary: Summary, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    page.write_text(inspect_page(summary), encoding="utf-8")
    with Browser() as browser:
        for width in (1280, 390):
            shown = browser.show(page, width, picture=tmp_path / f"{width}.png")
            assert shown.console == [] and shown.scroll_width <= width and shown.small_text >= 10
            assert (tmp_path / f"{width}.png").stat().st_size > 10_000
        for words in ("Findings", "Rows of data.train", "Micro-batches", "Chat template", "Samples", "<script>alert(1)"):
            assert words in shown.text
        read = browser.evaluate("JSON.parse(document.getElementById('data').textContent).data.train.num_rows")
        assert read == 61 and browser.evaluate("document.querySelectorAll('main script').length") == 0


def test_the_terminal_shows_tokens_masks_lengths_and_findings_without_colours(summary: Summary) -> None:
    stream = io.StringIO()
    show(summary, stream)
    printed = stream.getvalue()
    assert "\x1b" not in printed and "\x07" not in printed and "\u202e" not in printed and "\x00" not in printed
    for words in ("\\u001b|[", "[bold| re|d]", "<<</s>>>", "all learned", "not learned", "a | stands between two tokens"):
        assert words.replace("|", "") in printed.replace("|", ""), words
    assert "rows.jsonl:1\n" in printed and "== findings" in printed and "tokens a row: " in printed
    assert all(finding.sentence.split()[0] in printed for finding in summary.findings)


def test_in_colours_learned_tokens_are_underlined_and_special_ones_stand_out() -> None:
    part = Part("chosen", [Piece("a", (5,), False, False), Piece("b\n", (6,), False, True), Piece("</s>", (1,), True, True)])
    text = tokens(part)
    assert text.plain == "~a~|b⏎|<<</s>>>"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["~a~"] == "green" and styles["b⏎"] == "green underline" and styles["<<</s>>>"] == "bold magenta underline"


def test_the_pieces_of_a_sample_are_its_tokens_and_its_mask_is_the_loss_s(summary: Summary) -> None:
    groups = summary.train.groups
    for place, sample in zip((0, 30, 60), summary.samples, strict=True):
        group = groups[place]
        for part, ids in zip(sample.parts, (*group.prompts, *group.responses), strict=True):
            assert [number for piece in part.pieces for number in piece.ids] == ids.tolist()
            assert all(piece.is_learned == (part.role != "prompt") for piece in part.pieces)
        assert [part.role for part in sample.parts] == ["prompt", "chosen", "rejected"]
        assert sample.parts[1].pieces[-1] == Piece("</s>", (1,), True, True)


def test_tokens_that_make_up_a_character_together_stand_together(summary: Summary) -> None:
    tokenizer = summary.inspected.tokenizer
    ids = tokenizer("é 😀", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids, [True] * len(ids))
    assert "".join(piece.text for piece in found) == "é 😀" and max(len(piece.ids) for piece in found) > 1
    cut = pieces(tokenizer, ids[:-1], [True] * (len(ids) - 1))  # the last character is not whole
    assert [number for piece in cut for number in piece.ids] == ids[:-1]


def test_control_characters_are_escaped_and_line_ends_are_not() -> None:
    assert printable("a\x1b\u202e\n\tb\u200b") == "a\\u001b\\u202e\n\\tb\\u200b"


def test_the_command_writes_json_alone_and_the_page_once(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = files / "inspect.html"
    status = cli.main(["inspect", str(files / "run.yaml"), "--json", "--html", str(target), "--rows", "1"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert status == int(any(one["level"] == "problem" for one in found["findings"]))
    assert found["data"]["train"]["num_rows"] == 61 and len(found["samples"]) == 1
    assert found["samples"][0]["parts"][1]["pieces"][-1] == {
        "text": "</s>",
        "ids": [1],
        "is_special": True,
        "is_learned": True,
    }
    assert f"wrote {target}" in captured.err and target.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(UserError, match=r"inspect\.html exists already"):
        cli.main(["inspect", str(files / "run.yaml"), "--html", str(target)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "-1"], "--rows must be at least 0, got -1"),
        (["model.path=/none"], "model.path: there is no directory /none"),
        (["data.train=/none.jsonl"], "data: /none.jsonl does not exist"),
        (["data.train=null"], "data.train is required"),
    ],
)
def test_what_cannot_be_looked_at_is_one_sentence(files: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cli.main(["inspect", str(files / "run.yaml"), *arguments])


@pytest.mark.slow
@pytest.mark.alone
def test_looking_at_thousands_of_rows_costs_less_than_tokenising_them(files: Path, tmp_path: Path) -> None:
    from megadpo.data.rows.dataset import make_groups, tokenise_job
    from megadpo.data.rows.formats import PAIRS

    rows = []
    for place in range(30):
        for row in hh_rows(100):
            answers = {"chosen": row["chosen"][-200:], "rejected": f"{row['rejected'][-190:]} x"}
            rows.append({"prompt": f"{place}. {row['chosen'][:300]}", **answers})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [f"data.train={tmp_path}/rows.jsonl", f"data.cache_dir={tmp_path}/cache", "data.num_workers=1"]
    options = load_config(files / "run.yaml", places)
    start = time.process_time()
    groups, _ = make_groups(*tokenise_job(options.data, options.data.train, str(files / "model"), PAIRS), 1)
    tokenised = time.process_time()
    looked = look_at_all(options, 3)
    seconds, alone = time.process_time() - tokenised, tokenised - start
    assert len(looked.train.groups) == len(groups) and len(rows) == 3000
    assert seconds < 2 * alone + 1, (seconds, alone)
