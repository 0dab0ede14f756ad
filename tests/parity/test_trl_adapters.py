"""Twenty steps of training adapters equal twenty steps of TRL's trainers with a `peft_config`."""

from __future__ import annotations

import pytest

from tests.helpers.models import save_model, save_reward_model
from tests.parity.trl_runs import (
    KTO_METRICS,
    LABELS_MAX_LENGTH,
    PAIR_METRICS,
    REWARD_METRICS,
    SFT_METRICS,
    Run,
    assert_same_course,
    our_history,
    trl_history,
)

LORA = {"r": 8, "lora_alpha": 64, "target_modules": "all-linear"}
ADAPTED = {"reference": {"mode": "auto"}, "adapter": LORA}
FREE = {**ADAPTED, "metrics": PAIR_METRICS}
RUNS = {
    "dpo": Run("DPO", **ADAPTED),
    "dpo, DoRA on some": Run(
        "DPO",
        reference={"mode": "auto"},
        adapter={**LORA, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        moves=("rewards/margins", 0.05),
        weight_decay=0.0,
    ),
    "orpo": Run("ORPO", {"loss_type": "orpo"}, **FREE, moves=("loss", 0.1)),
    "kto": Run(
        "KTO",
        {"loss_type": "kto"},
        {},
        "labels",
        max_length=LABELS_MAX_LENGTH,
        metrics=KTO_METRICS | {"kl": 1e-4},
        moves=("rewards/chosen", 0.1),
        **ADAPTED,
    ),
    "sft": Run("SFT", {"loss_type": "sft"}, {}, "examples", **{**FREE, "metrics": SFT_METRICS}, moves=("loss", 0.1)),
    "reward": Run(
        "reward", {"loss_type": "reward"}, {}, **{**FREE, "metrics": REWARD_METRICS}, max_length=1024, moves=("loss", 0.05)
    ),
}


MARKS = {"dpo": (), "kto": pytest.mark.slow, "reward": pytest.mark.slow}
"""The others are exhaustive: their objectives are in test_trl.py, DoRA on some modules in test_adapters.py."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.exhaustive)) for name in RUNS])
def test_twenty_steps_equal_trl(tmp_path, name):
    save = save_reward_model if name == "reward" else save_model
    model = save(tmp_path / "model", "llama", num_hidden_layers=2)
    theirs = trl_history(RUNS[name], model, tmp_path)
    assert_same_course(RUNS[name], our_history(RUNS[name], model, tmp_path), theirs)
