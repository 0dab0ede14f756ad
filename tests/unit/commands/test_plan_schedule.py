"""`megadpo plan --schedule` draws what a step does on each stage, and says how long stages wait; starts nothing."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megadpo import cli
from megadpo.checkpoint.hf import read_hf_config
from megadpo.commands.plan_schedule import stage_costs
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.parallel.layout import Layout
from megadpo.pipeline.draw import COLOURS
from megadpo.pipeline.schedule import AHEAD, BACKWARD, FORWARD, REFERENCE, WEIGHTS
from tests.helpers.models import save_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plan")
    save_model(directory / "model", tokenizer=False, num_hidden_layers=7)
    # The head weighs about as much as a layer: with these layers all stages cost the same.
    parallel = "{pipeline: 4, pipeline_layout: [2, 2, 2, 1]}"
    (directory / "run.yaml").write_text(f"model: {{path: {directory / 'model'}}}\nparallel: {parallel}\n")
    return directory


def drawn(path: Path) -> dict[str, int]:
    """How many operations of each kind a picture has."""
    root = ElementTree.fromstring(path.read_text())
    boxes = [box.get("fill") for box in root.iter("{http://www.w3.org/2000/svg}rect") if len(box)]
    return {kind: boxes.count(colour) for kind, colour in COLOURS.items() if colour in boxes}


TWO_STAGES = ("parallel.pipeline=2", "parallel.pipeline_layout=null")
INTERLEAVED = ("schedule.name=1f1b", "schedule.reference=interleaved")


def test_every_operation_of_a_step_is_a_box_and_the_idle_share_is_told(files, tmp_path, capsys):
    path = tmp_path / "plain.svg"
    assert cli.main(["plan", str(files / "run.yaml"), "--schedule", str(path), "--micro-batches", "8"]) == 0
    assert drawn(path) == {FORWARD: 32, BACKWARD: 32, REFERENCE: 32}
    before = capsys.readouterr().out
    path = tmp_path / "filled.svg"
    arguments = ["plan", str(files / "run.yaml"), *INTERLEAVED, "--schedule", str(path), "--micro-batches", "8"]
    assert cli.main(arguments) == 0
    counts = drawn(path)
    assert counts[FORWARD] == counts[BACKWARD] == 3 * 32
    assert counts[REFERENCE] + counts[AHEAD] == 3 * 32, "each step's reference is done once, whenever"
    shares = [float(share) for share in re.findall(r"idle share ([\d.]+)%", capsys.readouterr().out)]
    (alone,) = (float(share) for share in re.findall(r"idle share ([\d.]+)%", before))
    assert len(shares) == 3 and shares[1] < 0.6 * alone


def test_halves_of_pairs_are_boxes_of_their_own(files, tmp_path, capsys):
    path = tmp_path / "split.svg"
    arguments = ["schedule.name=1f1b", "schedule.split_pairs=true", "--schedule", str(path), "--micro-batches", "8"]
    assert cli.main(["plan", str(files / "run.yaml"), *arguments]) == 0
    assert drawn(path) == {FORWARD: 64, BACKWARD: 64, REFERENCE: 64}
    assert "backward of micro-batch 0, rejected" in path.read_text()
    assert "most halves of micro-batches kept for their backward, by stage: [5, 4, 3, 2]" in capsys.readouterr().out


def test_delayed_weight_gradients_are_boxes_too(files, tmp_path, capsys):
    path = tmp_path / "zero.svg"
    arguments = ["schedule.name=1f1b", "schedule.zero_bubble=true", "--schedule", str(path), "--micro-batches", "8"]
    alone = ["reference.mode=none", "objective.loss_type=simpo"]
    assert cli.main(["plan", str(files / "run.yaml"), *arguments, *alone]) == 0
    assert drawn(path) == {FORWARD: 32, BACKWARD: 32, WEIGHTS: 32}
    assert "gradients of weights of micro-batch 0" in path.read_text()
    printed = capsys.readouterr().out
    assert "most micro-batches kept for their backward, by stage: [4, 4, 4, 4]" in printed
    assert float(re.findall(r"idle share ([\d.]+)%", printed)[0]) < 15, "1F1B: 28 %"


def test_a_heavier_stage_costs_more_and_the_head_counts(files):
    costs = stage_costs(shape_of(read_hf_config(files / "model")), Layout(pipeline=2, chunk_layers=(4, 3)), "full")
    assert costs.of(0, FORWARD) + costs.of(1, FORWARD) == pytest.approx(2)
    hidden, feed_forward, vocabulary = 64, 96, 499
    layer = hidden * (2 * hidden + 2 * hidden // 2) + 3 * hidden * feed_forward
    assert costs.of(0, FORWARD) / costs.of(1, FORWARD) == pytest.approx(
        4 * layer / (3 * layer + hidden * vocabulary), rel=0.01
    )
    assert costs.of(0, BACKWARD) == 3 * costs.of(0, FORWARD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--layouts or --schedule"),
        (["--schedule", "x.svg", "--layouts", "4"], "not both"),
        (["--micro-batches", "4", "--layouts"], "no effect without --schedule"),
        (
            [
                "parallel.virtual_pipeline=2",
                "parallel.pipeline=2",
                "parallel.pipeline_layout=null",
                "--schedule",
                "--micro-batches",
                "5",
            ],
            "5 is not a multiple of 2",
        ),
        (["--schedule", "missing/x.svg"], "missing/x.svg cannot be written"),
        (["parallel.pipeline=16", "parallel.pipeline_layout=null", "--schedule"], "16 is more than the model's 7 layers"),
    ],
)
def test_what_cannot_be_drawn_is_refused(files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        cli.main(["plan", str(files / "run.yaml"), *arguments])
