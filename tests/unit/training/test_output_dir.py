"""An output directory holds one run: what makes it that run may not change when it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.errors import UserError
from megadpo.training.output_dir import claim_output_dir, write_config
from megadpo.validation.load import load_config


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("data.max_length", 128, 64),
        ("train.router_aux_coef", 0.0, 0.1),
        ("train.router_bias_update_rate", 0.001, 0.0),
        ("reference.router_replay", False, True),
    ],
)
def test_an_option_that_changes_the_numbers_stays_as_it_was(tmp_path: Path, name: str, before: object, now: object) -> None:
    write_config(tmp_path, load_config({}, [f"{name}={before}"]))
    claim_output_dir(tmp_path, load_config({}, [f"{name}={before}", "train.hang_timeout=77"]))
    with pytest.raises(UserError, match=f"holds a different run .{name} was {before}, now {now}"):
        claim_output_dir(tmp_path, load_config({}, [f"{name}={now}"]))
