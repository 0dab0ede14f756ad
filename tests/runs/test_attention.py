"""The kernel of attention as an option of a run: told at the start, the same records whichever it is, refused in time."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import read_metrics, run_settings
from tests.helpers.worlds import run_world


def _train(settings: dict[str, Any]) -> tuple[str, list[dict[str, float]]]:
    """What the run told, and its records."""
    import megadpo

    with contextlib.redirect_stderr(io.StringIO()) as told:
        megadpo.train(settings)
    return told.getvalue(), read_metrics(Path(settings["output_dir"]))


@pytest.mark.slow
def test_every_kernel_of_this_machine_trains_alike_and_is_told(tmp_path):
    save_model(tmp_path / "model", "mistral", num_hidden_layers=2)
    write_hh(tmp_path / "train.jsonl", 40)
    records = {}
    for requested, used in (("auto", "cpu_flash"), ("sdpa", "sdpa")):
        settings = run_settings(tmp_path, tmp_path / requested, train={"steps": 3})
        settings["model"]["attention"] = requested
        ((told, records[used]),) = run_world(1, _train, settings)
        assert f", attention {used}," in told
        assert records[used][0]["rewards/margins"] == 0
    for used, trained in records.items():
        for ours, theirs in zip(trained, records["sdpa"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), used


def test_a_kernel_for_another_machine_is_refused_before_anything_is_loaded(tmp_path):
    from megadpo.training.setup import prepare
    from megadpo.validation.load import load_config

    save_model(tmp_path / "model", num_hidden_layers=1)
    write_hh(tmp_path / "train.jsonl", 10)
    settings = run_settings(tmp_path, tmp_path / "run")
    settings["model"]["attention"] = "flash_attn"
    with pytest.raises(UserError, match=r"^model\.attention is flash_attn, but that needs a CUDA device.*; set it to auto$"):
        prepare(load_config(settings))
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        UserError, match=r"model\.attention: 'flash' is not known; choose one of: auto, cpu_flash, flash_attn"
    ):
        load_config({}, ["model.attention=flash"])
