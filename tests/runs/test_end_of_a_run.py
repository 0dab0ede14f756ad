"""What a run says at its end, and its model card: loaded as they say, no secrets, none of this machine's directories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.training.model_card import command_line, licence_of, public_path, public_text
from megadpo.training.summary import evaluations, results, results_of_set
from tests.helpers.launched import finish_command
from tests.helpers.runs import run_settings, save_files

CANARY = "canary-e1f0b7c9d2"
STEPS = {"steps": 1, "pairs_per_step": 4, "warmup_steps": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_files(tmp_path_factory.mktemp("end"), "llama", 40)
    (directory / "model" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Tiny\n")
    return directory


def finish(files: Path, name: str, **changes: dict[str, Any]) -> tuple[int, str]:
    settings = run_settings(files, files / name, **{"train": STEPS | {"steps": 4}, **changes})
    (files / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return finish_command(["train", str(files / f"{name}.yaml")], files, SOME_API_KEY=CANARY)


def front_matter(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


@pytest.mark.slow
def test_the_end_says_time_results_files_and_how_to_load_them_also_of_a_finished_run(files: Path) -> None:
    import torch
    import transformers

    held_out = {"eval": str(files / "eval.jsonl")}
    changes = {"data": held_out, "eval": {"every": 2}, "logging": {"run_name": f"run {CANARY}"}}
    status, output = finish(files, "whole", **changes)
    assert status == 0, output
    assert re.search(r"megadpo: finished: 4 steps in 0:\d\d:\d\d, peak memory \d+\.\d GiB \(host, rank 0\)\n", output), (
        output
    )
    assert re.search(r"megadpo: last step: loss \d\.\d{4}, margin .*, accuracy \d\.\d\d\n", output)
    assert re.search(r"megadpo: last evaluation \(step 4\): loss \d\.\d{4}, margin", output)
    run = files / "whole"
    assert f"megadpo: written to {run}: hf/ (the model, " in output and "checkpoints/ (the newest step_00000004, " in output
    (line,) = re.findall(r"megadpo: to load it: (.*)\n", output)
    model = eval(line, {"transformers": transformers})
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()

    card = (run / "hf" / "README.md").read_text()
    matter = front_matter(card)
    assert (
        matter["library_name"] == "transformers"
        and "base_model" not in matter
        and "trained from `model`" in card
        and matter["license"] == "apache-2.0"
    )
    assert "sigmoid" in matter["tags"] and "# run ***" in card
    assert "| training | `train.jsonl` | 40 of 40 pairs |" in card and "| held out | `eval.jsonl` | 12 of 12 pairs |" in card
    assert "`eval_rewards/accuracies`" in card and "| torch | " in card and "| `beta` | `0.1` |" in card
    for text in (card, output):
        assert CANARY not in text
    assert str(files) not in card and str(Path.home()) not in card

    again, output = finish(files, "whole", **changes)
    assert again == 0 and "nothing is left to train: all 4 steps are done" in output
    assert re.search(r"megadpo: finished: 4 steps \(0 of them now\) in 0:00:\d\d\n", output), output
    assert "megadpo: last evaluation (step 4): loss" in output


@pytest.mark.slow
def test_an_adapter_s_card_and_last_line_are_peft_s_and_a_card_can_be_left_out(files: Path) -> None:
    peft = pytest.importorskip("peft")
    status, output = finish(files, "adapter", adapter={"kind": "lora", "rank": 4}, train=STEPS)
    assert status == 0, output
    (line,) = re.findall(r"megadpo: to load it: (.*)\n", output)
    assert line.startswith("peft.AutoPeftModelForCausalLM") and eval(line, {"peft": peft}) is not None
    card = (files / "adapter" / "hf" / "README.md").read_text()
    assert front_matter(card)["library_name"] == "peft" and "lora" in front_matter(card)["tags"]
    assert "| adapter | LoRA, rank 4, alpha 32 |" in card and "AutoPeftModelForCausalLM.from_pretrained(" in card
    none = {"logging": {"model_card": False, "report": False}, "train": STEPS}
    status, output = finish(files, "none", **none)
    assert status == 0 and not (files / "none" / "hf" / "README.md").exists()


def test_the_best_evaluation_is_told_where_it_is_not_the_last(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 0.6}\n{"step": 2, "eval_loss": 0.5}\n{"step": 3, "eval_loss": null}\nhalf a li\n'
        '{"step": 4, "eval_loss": 0.55, "eval_rewards/margins": 0.25}\n'
    )
    assert [*results({"loss": 0.4}), *results_of_set("", evaluations(path))] == [
        "last step: loss 0.4000",
        "last evaluation (step 4): loss 0.5500, margin 0.250",
        "lowest held-out loss (step 2): loss 0.5000",
    ]
    assert evaluations(tmp_path / "none") == []


def test_paths_of_this_machine_are_shortened_to_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    argv = ["/home/jane/.venv/bin/megadpo", "train", "/home/jane/a b/run.yaml", "data.train=[/data/x/a.jsonl, b.jsonl]"]
    argv += ["output_dir=runs/first", "model.path=~/models/tiny", f"logging.run_name={CANARY}", "--nproc", "2"]
    assert command_line(argv) == (
        "megadpo train run.yaml 'data.train=[a.jsonl, b.jsonl]' output_dir=runs/first model.path=tiny "
        "logging.run_name=*** --nproc 2"
    )
    assert command_line(["train.py"]) == "# megadpo.train(…) in train.py"
    assert public_text("https://host/path/x.json and /home/jane/y.json") == "https://host/path/x.json and y.json"
    assert public_text("../clients/acme/p.jsonl") == "p.jsonl" and public_text("acme/pairs") == "acme/pairs"
    assert public_text("[../clients/a.jsonl, {path: x/y/b.jsonl}, acme/c]") == "[a.jsonl, {path: b.jsonl}, acme/c]"
    assert public_text("{% if x %}</s>{% endif %}") == "{% if x %}</s>{% endif %}"
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123"
    assert public_path(snapshot) == "acme/tiny" and public_path("acme/pairs") == "acme/pairs"
    assert public_path("/home/jane/x/") == "x"


@pytest.mark.parametrize(
    "card", [None, "# no matter", "---\n- a list\n---\n", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_base_whose_card_says_no_licence_gives_none(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == {}
