"""TR-DPO: a reference that moves towards the policy, on sharded models, in the checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megadpo.checkpoint.sharded import open_checkpoint
from megadpo.errors import UserError
from megadpo.validation.load import load_config
from tests.helpers import oracle
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import assert_same_weights, resumed_and_whole, run_settings, train_run
from tests.helpers.worlds import run_world


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=2, tie_word_embeddings=True)
    write_hh(directory / "train.jsonl", 40)
    return directory


def _moving(files: Any, output: Any, **changes: Any) -> dict[str, Any]:
    reference = {"sync_every": 2, "mixup_alpha": 0.6}
    return run_settings(files, output, reference=reference, **changes)


NO_WARM_UP = {"steps": 5, "warmup_steps": 0}


@pytest.mark.slow
def test_margins_after_a_full_move_are_exactly_zero(files, tmp_path):
    reference = {"sync_every": 2, "mixup_alpha": 1.0}
    settings = run_settings(files, tmp_path / "run", reference=reference, parallel={"tensor": 2}, train=NO_WARM_UP)
    margins = {record["step"]: record["rewards/margins"] for record in run_world(2, train_run, settings)[0]}
    # steps 1, 3 and 5 are the first after the start or a move: policy and reference are one
    assert margins[1] == margins[3] == margins[5] == 0.0 and margins[2] != 0.0 and margins[4] != 0.0


def test_a_part_move_is_the_mixture_of_both(files, tmp_path):
    changes = {"train": NO_WARM_UP | {"steps": 2}, "checkpoint": {"every": 2}, "parallel": {"tensor": 2}}
    run_world(2, train_run, _moving(files, tmp_path / "run", **changes))
    checkpoint = open_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000002")
    start = dict(oracle.load(files / "model").named_parameters())
    policy, reference = checkpoint.source("weights"), checkpoint.source("reference")
    for name in reference.names():
        before, after, moved = (
            start[name].detach(),
            *(source.read(name, 0, 0, len(start[name])) for source in (policy, reference)),
        )
        torch.testing.assert_close(moved, 0.4 * before + 0.6 * after, rtol=1e-5, atol=1e-7)
        assert not torch.equal(moved, before), name


@pytest.mark.parametrize(
    ("num_processes", "parallel"), [(2, {"tensor": 2}), pytest.param(2, {"pipeline": 2}, marks=pytest.mark.exhaustive)]
)
@pytest.mark.slow
def test_resuming_keeps_the_moved_reference(files, tmp_path, num_processes, parallel):
    def settings(name: str) -> dict[str, Any]:
        return _moving(files, tmp_path / name, parallel=parallel, train={"steps": 6}, checkpoint={"every": 3})

    resumed, whole = resumed_and_whole(num_processes, settings, 4)
    assert resumed == whole
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.slow
def test_the_moving_reference_does_not_depend_on_the_layout(files, tmp_path):
    one = run_world(1, train_run, _moving(files, tmp_path / "one"))[0]
    four = run_world(4, train_run, _moving(files, tmp_path / "four", parallel={"tensor": 2, "pipeline": 2}))[0]
    for a, b in zip(one, four, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"sync_every": 4, "mode": "precomputed"}, "moves a resident reference"),
        ({"mixup_alpha": 0.3}, "no effect without reference.sync_every"),
        ({"sync_every": 4, "mixup_alpha": 0.0}, r"must be in \(0, 1\]"),
        ({"sync_every": 0}, "sync_every must be at least 1"),
    ],
)
def test_what_cannot_move_is_refused(reference, message):
    with pytest.raises(UserError, match=message):
        load_config({"reference": reference})
