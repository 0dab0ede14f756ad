"""The report's page, command and pictures: what they say of one run and of several, of runs of older versions and of damaged
ones; and how Chromium shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadpo import cli
from megadpo.errors import UserError
from megadpo.metrics.sinks import to_line
from megadpo.report.curves import NOT_DRAWN, groups_of
from megadpo.report.document import as_json, render
from megadpo.report.findings.every import CHECKS, findings_of
from megadpo.report.run_files import read_run, read_runs
from tests.helpers.browser import Browser, needs_chromium
from tests.helpers.made_runs import Record, make_run

ROOT = Path(__file__).parents[3]
HOSTILE = "</script><script>alert(1)</script>"
EVALUATION = {
    "subsets": [
        {"name": "chat", "num_pairs": 120, "accuracy": 0.81, "margin": 1.2},
        {"name": HOSTILE, "num_pairs": 40, "accuracy": 0.44, "margin": -0.1},
    ],
    "calibration": [{"predicted": 0.55, "accuracy": 0.5, "num_pairs": 60}, {"predicted": 0.9, "accuracy": 0.8}],
    "generations": [{"prompt": "Why?", "policy": f"Because {HOSTILE}", "reference": "No."}],
}
SPIKE = {
    "step": 60,
    "what": "the gradient norm is 900, above the mean 7.4 of the last 128 steps",
    "loss": 0.7,
    "grad_norm": 900.0,
    "pairs": [{"row": 1234, "share": 0.8, "chosen_logp": -900.5, "chosen": HOSTILE, "prompt": "x" * 300}],
}


def spiking(record: Record, share: float) -> None:
    del share
    record["grad_norm"] = 900.0 if record["step"] == 60 else record["grad_norm"]
    record["seconds/forward"], record["seconds/backward"] = 0.3, 0.6
    record["something/new"] = 1.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: a healthy one, and one with a spike, an evaluation, and other options."""
    directory = tmp_path_factory.mktemp("runs")
    make_run(directory / "calm", 120)
    options = {"train.learning_rate": 5e-6, "objective.beta": 0.05, "data.train": HOSTILE}
    facts = {"versions": {"torch": "2.9"}, "device": HOSTILE, "layout": "tensor 2"}
    make_run(
        directory / "wild", 120, 3, spiking, options=options, facts=facts, spikes=[SPIKE, SPIKE | {"step": 61}],
    evaluation=EVALUATION )  # fmt: skip
    return directory


def data_of(document: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', document)
    assert found is not None
    return json.loads(found[1])


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["report", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_page_of_a_run_has_its_findings_curves_evaluation_and_what_it_was(runs: Path) -> None:
    document = render([read_run(runs / "wild")])
    for text in ("loss spikes", "Reward margin", "Seconds by part", "something/new", "tensor 2", "torch 2.9"):
        assert text in document
    for text in ("Accuracy by subset", "Calibration", "Generations, side by side", "row", "1,234", "-900.5"):
        assert text in document
    assert HOSTILE not in document and "&lt;script&gt;" in document and document.count("</script>") == 2
    assert data_of(document)["runs"][0]["findings"][0]["name"] == "gradient_spikes"


def test_every_metric_of_a_run_is_drawn(runs: Path) -> None:
    document, run = render([read_run(runs / "wild")]), read_run(runs / "wild")
    drawn = re.findall(r'data-chart="([^"]*)"', document)
    num_curves = sum(len(json.loads(chart.replace("&quot;", '"'))["series"]) for chart in drawn)
    assert num_curves == len([name for name in run.curves if name.removeprefix("eval_") not in NOT_DRAWN]) + 2  # calibration


def test_runs_are_compared_by_the_options_that_differ_and_by_their_results(runs: Path) -> None:
    said = as_json(read_runs([runs / "calm", runs / "wild"]))
    assert said["differences"] == {
        "data.train": {"calm": "pairs.jsonl", "wild": HOSTILE},
        "objective.beta": {"calm": 0.1, "wild": 0.05},
        "train.learning_rate": {"calm": 1e-6, "wild": 5e-6},
    }
    assert [run["name"] for run in said["runs"]] == ["calm", "wild"]
    document = render(read_runs([runs / "calm", runs / "wild"]))
    assert "2 runs compared" in document and "Rewards: chosen" in document and "calm, held-out" in document


def test_secrets_that_an_older_version_wrote_into_its_options_are_not_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with (run / "config.yaml").open("a") as file:
        file.write("source: https://someone:canary-of-a-password@data.example/rows\napi_key: canary-of-a-key\n")
    document = render([read_run(run)])
    assert "data.example" in document and "canary" not in document


def test_names_of_runs_are_as_long_as_they_must_be_to_differ(tmp_path: Path) -> None:
    directories = [make_run(tmp_path / name / "run", 2) for name in ("a", "b")]
    assert [run.name for run in read_runs(directories)] == ["a/run", "b/run"]


def test_a_run_that_goes_on_or_is_of_an_older_version_or_damaged_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 30, facts={"sessions": [{"began": 1.0, "status": None}]}, options={"train.steps": 60})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo\n[1]\n{"step": "32"}\n')
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text("[]")
    read = read_run(run)
    assert (read.status, read.last_step) == ("not ended", 30)
    assert read.damaged == ("metrics.jsonl: 2 lines are no whole record and left out", "eval.json is no JSON object")
    assert "Damaged files" in render([read])
    for name in ("run.json", "spikes.jsonl", "config.yaml"):
        (run / name).unlink()
    older = read_run(run)
    assert older.status == "unknown" and older.num_steps is None and render([older])
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml cannot be read" in render([read_run(run)])


def test_values_that_are_no_numbers_are_kept_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(to_line({"step": 4, "loss": float("nan"), "grad_norm": float("inf")}))
        file.write('{"step": 5, "loss": true, "grad_norm": 1' + "0" * 400 + "}\n")
    curves = read_run(run).curves
    assert curves["loss"].steps == [1, 2, 3, 4] and str(curves["loss"].values[-1]) == "nan"
    assert curves["grad_norm"].values[-2:] == [float("inf"), float("inf")]


@pytest.mark.slow
def test_the_command_writes_the_page_and_pictures_and_says_what_it_found(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    status, out, _ = command(capsys, str(runs / "wild"), "--out", str(tmp_path / "new" / "out"), "--json")
    said = json.loads(out)
    assert status == 0 and said["runs"][0]["findings"][0]["step"] == 60
    written = [Path(path) for path in said["written"]]
    assert written[0] == tmp_path / "new" / "out" / "report.html" and {path.suffix for path in written[1:]} == {".png"}
    assert all(path.stat().st_size > 1000 for path in written)
    assert {"loss.png", "gradient-norm.png", "rewards.png"} <= {path.name for path in written}


def test_the_command_prints_findings_in_plain_lines_and_its_status_follows_fail_on(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megadpo.report.pictures.can_draw", lambda: False)
    given = (str(runs / "calm"), str(runs / "wild"), "--out", str(tmp_path))
    status, out, err = command(capsys, *given)
    assert status == 0 and "pip install 'megadpo[report]'" in err
    lines = out.splitlines()
    assert lines[0] == "calm: finished, 120 of 120 steps" and lines[1] == "  nothing stands out"
    assert lines[3] == "  warning  The gradient or the loss spikes (step 60)" and lines[-1].endswith("report.html")
    assert command(capsys, *given, "--fail-on", "problem")[0] == 0
    assert command(capsys, *given, "--fail-on", "warning")[0] == 1
    assert command(capsys, str(runs / "calm"), "--out", str(tmp_path), "--fail-on", "warning")[0] == 0


def test_the_page_of_one_run_stands_beside_its_files(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("megadpo.report.pictures.can_draw", lambda: False)
    command(capsys, str(runs / "calm"))
    assert (runs / "calm" / "report.html").is_file() and not list(runs.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["no"], "RUN: no is not a directory; give the output_dir of a run"),
        (["."], "holds no run"),
        (["calm", "calm"], "is given twice; give each run once"),
    ],
)
def test_what_is_no_run_is_one_sentence(
    runs: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], sentence: str
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=re.escape(sentence)):
        cli.main(["report", *given])


def test_what_the_manual_says_can_be_done_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megadpo.report.pictures.can_draw", lambda: False)
    for name in ("first", "second"):
        make_run(Path("runs") / name, 20)
    manual = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    lines = [line.split() for block in re.findall(r"```bash\n(.*?)```", manual, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 3 and all(words[0] == "megadpo" and cli.main(words[1:]) == 0 for words in lines)
    assert Path("comparison/report.html").is_file() and Path("runs/first/report.html").is_file()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["findings"] == []
    [code] = re.findall(r"```python\n(.*?)```", manual, re.DOTALL)
    exec(code, {})
    assert "<svg" in Path("mine.html").read_text(encoding="utf-8")


def test_the_manual_names_every_finding() -> None:
    manual = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", manual, re.MULTILINE) == [check.name for check in CHECKS]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@needs_chromium
@pytest.mark.parametrize("names", [("wild",), ("calm", "wild")], ids=len)
@pytest.mark.slow
def test_chromium_shows_the_page_narrow_and_wide_without_an_error(
    browser: Browser, runs: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    file = tmp_path / "report.html"
    file.write_text(render(read_runs([runs / name for name in names])), encoding="utf-8")
    for width in (390, 1280):
        shown = browser.show(file, width, tmp_path / f"{width}.png")
        assert shown.console == []
        assert shown.scroll_width <= width and shown.small_text > 9.5
        assert "The gradient or the loss spikes" in shown.text and "What to do" in shown.text
        assert (tmp_path / f"{width}.png").stat().st_size > 20_000
    browser.move_pointer_to("svg[aria-label='Reward margin']", 0.9)
    assert "margin" in browser.evaluate("document.querySelector('.tip').innerText") or len(names) > 1
    assert browser.console() == []


def test_held_out_sets_with_names_have_charts_results_and_findings_of_their_own(tmp_path: Path) -> None:
    sets = {"helpful": "a.jsonl", "helpful_2": "b.jsonl"}

    def two_sets(record: dict[str, float], share: float) -> None:
        for name, value in list(record.items()):
            if name.startswith("eval_"):
                del record[name]
                record[f"eval_helpful_{name.removeprefix('eval_')}"] = value
        record["eval_helpful_2_loss"] = 0.7 - 0.4 * share if share <= 0.5 else 0.3 + 0.6 * share

    made = make_run(
        tmp_path / "run", options={"data.eval": sets}, change_held_out=two_sets,
        facts={"sessions": [{"status": "finished", "best_step": 40, "best_metric": "eval_helpful_2_loss"}]},
    )  # fmt: skip
    run = read_run(made)
    charts = {chart.title: chart.metrics for chart in groups_of([run])["Held-out sets"]}
    assert charts["Held-out, Loss"] == {"eval_helpful_loss": "helpful", "eval_helpful_2_loss": "helpful_2"}
    assert charts["Held-out, Reward accuracy"] == {"eval_helpful_rewards/accuracies": "helpful"}
    assert not any("eval_" in chart.title for some in groups_of([run]).values() for chart in some)
    page = render([run])
    assert "Loss, helpful_2" in page and "the model of step 40, the best by eval_helpful_2_loss" in page
    assert [finding.title for finding in findings_of(run)] == [
        "The held-out loss of helpful_2 rises while the training loss falls"
    ]
