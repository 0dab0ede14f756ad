"""Options of the optimizer are refused where nothing reads them, or where they contradict each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megadpo.errors import UserError
from megadpo.model.by_name import first_match
from megadpo.validation.load import load_config
from megadpo.validation.optimizer import check_optimizer_machine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer": "adafactor"},
            r"train\.optimizer: 'adafactor' is not available in this version .*; choose one of: adamw",
        ),
        (
            {"optimizer": "paged_adamw_8bit"},
            r"'paged_adamw_8bit' is not available .* megadpo; use adamw_8bit",
        ),
        ({"optimizer": "loin"}, r"train\.optimizer: 'loin' is not known; .*did you mean 'lion'\?"),
        (
            {"momentum": 0.8},
            r"train\.momentum is 0\.8, but train\.optimizer is adamw, which does not read it; .* sgd or muon",
        ),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, r"train\.betas is \[0\.9, 0\.99\], but train\.optimizer is sgd, which"),
        ({"optimizer": "lion", "eps": 1e-6}, r"train\.eps is 1e-06, but train\.optimizer is lion, which does not read it"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"train\.momentum must be in \[0, 1\), got 1\.0"),
        ({"optimizer": "lion", "moments_dtype": "bf16"}, r"train\.moments_dtype is bf16, but train\.optimizer is lion, and"),
        ({"decay_norms_and_biases": True}, r"train\.decay_norms_and_biases is true, but train\.weight_decay is 0; set that"),
        ({"learning_rates": {"q_proj": 0.0}}, r"train\.learning_rates: 'q_proj' has the rate 0\.0, .* in train\.freeze"),
        ({"learning_rates": {"q_proj": 1.0}, "learning_rate": 0.0}, r"train\.learning_rate is 0, to which the schedule and"),
        ({"learning_rates": {"q_proj": "fast"}}, r"train\.learning_rates must be a mapping from text to a number, got"),
        ({"freeze": ["(q_proj"]}, r"train\.freeze: '\(q_proj' is no regular expression \("),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        load_config({"train": options})


@pytest.mark.parametrize(("optimizer", "reason"), [("adamw_8bit", "whose flat groups"), ("muon", "which keeps flat parts")])
def test_what_is_not_built_for_deepspeed_is_refused_with_the_reason(optimizer, reason):
    with pytest.raises(UserError, match=rf"^train\.optimizer is {optimizer}, but parallel\.engine is deepspeed, {reason}"):
        load_config({"train": {"optimizer": optimizer}, "parallel": {"engine": "deepspeed"}})


def test_a_missing_library_is_said_at_the_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^train\.optimizer is adamw_8bit, but the package bitsandbytes is not installed"):
        check_optimizer_machine(load_config({"train": {"optimizer": "adamw_8bit"}}))


def test_a_torch_without_muon_is_said_at_the_start(monkeypatch):
    monkeypatch.delattr("torch.optim.Muon")
    with pytest.raises(UserError, match=r"^train\.optimizer is muon, which torch has from 2\.9 on, and torch "):
        check_optimizer_machine(load_config({"train": {"optimizer": "muon"}}))


def test_offload_is_adamw_s():
    with pytest.raises(UserError, match=r"^parallel\.offload is cpu, but train\.optimizer is sgd, and only adamw's moments"):
        load_config({"train": {"optimizer": "sgd"}, "parallel": {"offload": "cpu"}})


def test_the_manual_s_configurations_are_read():
    manual = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", manual, re.DOTALL)]
    options = [load_config(block).train for block in blocks]
    assert [train.optimizer for train in options] == ["lion", "adamw"] and options[0].freeze[0] == r"layers\.[0-7]\..*"


def test_names_that_other_trainers_have_for_adamw_are_read():
    assert load_config({"train": {"optimizer": "adamw_torch"}}).train.optimizer == "adamw"


def test_rates_are_given_by_pattern_on_the_command_line_too():
    config = load_config({}, ["train.learning_rates={embed_tokens: 1e-5}", "train.learning_rates.norm=2e-6"])
    assert config.train.learning_rates == {"embed_tokens": 1e-5, "norm": 2e-6}


@pytest.mark.parametrize(
    ("pattern", "name", "chooses"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight", True),
        ("q_proj", "model.layers.0.self_attn.q_proj.bias", True),
        ("proj", "model.layers.0.self_attn.q_proj.weight", False),
        (".*norm", "model.layers.0.input_layernorm.weight", True),
        (r"layers\.0\..*", "model.layers.0.mlp.up_proj.weight", True),
        (r"layers\.1\..*", "model.layers.11.mlp.up_proj.weight", False),
        (r".*\.bias", "model.layers.1.self_attn.q_proj.bias", True),
        ("a|q_proj", "model.layers.1.self_attn.q_proj.weight", True),
        (".*lora_B", "model.layers.1.self_attn.q_proj.lora_B.weight", True),
    ],
)
def test_a_pattern_is_a_regular_expression_over_the_end_of_a_name(pattern, name, chooses):
    assert (first_match(["nothing", pattern], name) == pattern) is chooses
