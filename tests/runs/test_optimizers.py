"""Runs with other optimizers, rates by name and frozen parameters: resumed bit for bit, exported, refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.checkpoint.sharded import open_checkpoint
from megadpo.errors import UserError
from tests.helpers.runs import (
    exported_weights,
    resumed_and_whole,
    run_settings,
    save_files,
    train_each,
    train_run,
    weights_in,
)
from tests.helpers.worlds import run_world

GROUPS = {"learning_rates": {"embed_tokens": 1e-4, r"layers\.1\..*": 3e-3}, "freeze": ["k_proj", "input_layernorm"]}
ALIKE = {"learning_rates": {"embed_tokens": 1e-4}, "freeze": ["input_layernorm", "down_proj"]}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd tensor 2": ({"optimizer": "sgd"}, {"tensor": 2}),
    "lion data 2": ({"optimizer": "lion", **GROUPS}, {}),
    "adamw pipeline 2": ({**GROUPS, "weight_decay": 0.1, "decay_norms_and_biases": True}, {"pipeline": 2}),
    "bf16 moments data 2": ({"moments_dtype": "bf16", **GROUPS}, {}),
    "adamw_8bit data 2": ({"optimizer": "adamw_8bit", **GROUPS}, {}),
    "muon tensor 2": ({"optimizer": "muon", **GROUPS}, {"tensor": 2}),
    "muon data 2": ({"optimizer": "muon"}, {}),
    "sgd ZeRO-0": ({"optimizer": "sgd"}, {"engine": "deepspeed", "zero_stage": 0}),
    "lion ZeRO-2": ({"optimizer": "lion", **ALIKE}, {"engine": "deepspeed", "zero_stage": 2}),
    "sgd ZeRO-3": ({"optimizer": "sgd", **ALIKE}, {"engine": "deepspeed", "zero_stage": 3}),
}
OFTEN = ("adamw pipeline 2", "adamw_8bit data 2", "muon tensor 2", "sgd ZeRO-3")
ADAMW = {"exp_avg", "exp_avg_sq"}
KINDS = {
    "sgd": {"momentum_buffer"},
    "lion": {"exp_avg"},
    "muon": {"momentum_buffer"},
    "adamw_8bit": {*ADAMW, "exp_avg_scale", "exp_avg_sq_scale"},
}
"""What a checkpoint has of a parameter beside its weights."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    return save_files(directory, "qwen3", 24, num_hidden_layers=2, hidden_size=32, intermediate_size=48)


def settings_of(files: Path, output_dir: Path, train: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    small = {"steps": 4, "pairs_per_step": 4, "tokens_per_micro_batch": 256, "warmup_steps": 0}
    return run_settings(files, output_dir, train=small | train, checkpoint={"every": 2, "keep": 9}, **sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in OFTEN else pytest.mark.exhaustive) for case in RUNS]
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one_and_what_is_frozen_is_exported_as_it_was(case, files, tmp_path):
    if "ZeRO" in case:
        pytest.importorskip("deepspeed")
    train, parallel = RUNS[case]
    resumed, whole = resumed_and_whole(
        2, lambda name: settings_of(files, tmp_path / name, train, parallel=parallel), stop_after=3
    )
    assert resumed == whole
    both = [exported_weights(tmp_path / name) for name in ("broken", "whole")]
    before = weights_in(files / "model")
    assert all(torch.equal(both[0][name], both[1][name]) for name in before)
    frozen = {name for name in before if any(part in name for part in train.get("freeze", []))}
    assert {name for name in before if torch.equal(before[name], both[0][name])} == frozen
    checkpoint = open_checkpoint(tmp_path / "whole" / "checkpoints" / "step_00000004")
    assert set(checkpoint.source("weights").names()) == set(before)
    kept = {name: {kind for kind in checkpoint.kinds if name in checkpoint.source(kind).names()} for name in before}
    kinds = KINDS.get(train.get("optimizer", ""), ADAMW)
    for name in before:
        is_matrix = before[name].ndim == 2 and ".layers." in name
        expected = ADAMW if train.get("optimizer") == "muon" and not is_matrix else kinds
        assert kept[name] == {"weights"} | (set() if name in frozen else expected), name


def _goes_on(files: Path, directory: Path, train: dict[str, Any]) -> str:
    try:
        train_run(settings_of(files, directory, {"steps": 5} | train))
    except UserError as error:
        return str(error)
    return ""


def test_a_checkpoint_of_another_optimizer_is_refused_in_a_sentence(files, tmp_path):
    run_world(1, train_run, settings_of(files, tmp_path, {"optimizer": "sgd", "steps": 2, "freeze": ["k_proj"]}))
    for train, words in (
        ({"optimizer": "lion", "freeze": ["k_proj"]}, "is of a run with train.optimizer sgd, and this one has lion; set it"),
        ({"optimizer": "sgd"}, r"is of a run with train.freeze ['k_proj'], and this one has []; set it alike"),
        (
            {"optimizer": "sgd", "momentum": 0, "freeze": ["k_proj"]},
            "holds a different run (train.momentum was None, now 0.0)",
        ),
    ):
        (said,) = run_world(1, _goes_on, files, tmp_path, train)
        assert words in said, said


def test_rates_and_freezing_go_by_the_names_of_adapters_where_these_are_trained(files, tmp_path):
    train = {"learning_rates": {".*lora_B": 1e-2}, "freeze": [r"layers\.0\..*"]}
    adapter = {"kind": "lora", "rank": 2, "target_modules": ["q_proj", "down_proj"]}
    run_world(1, train_run, settings_of(files, tmp_path, train, adapter=adapter))
    (path,) = (tmp_path / "hf").glob("adapter_model.safetensors")
    from safetensors.torch import load_file

    trained = {name: bool(values.any()) for name, values in load_file(path).items() if "lora_B" in name}
    assert trained == {name: ".layers.1." in name for name in trained} and len(trained) == 4


def test_layers_that_are_computed_again_learn_above_a_frozen_embedding(files, tmp_path):
    runs = [
        settings_of(files, tmp_path / how, {"freeze": ["embed_tokens"], "recompute": how, "steps": 2})
        for how in ("none", "full")
    ]
    kept, again = run_world(1, train_each, runs)[0]
    assert [record["grad_norm"] for record in again] == pytest.approx([record["grad_norm"] for record in kept], rel=1e-5)


@pytest.mark.parametrize(
    ("train", "parallel", "words"),
    [
        (
            {"freeze": ["q_prj"]},
            {},
            r"train\.freeze: 'q_prj' matches nothing that is trained; there are embed_tokens, .*q_proj",
        ),
        ({"freeze": [".*"]}, {}, r"train\.freeze names all that is trained; leave something out"),
        ({"learning_rates": {"k_proj": 1e-3}, "freeze": ["k_proj"]}, {}, r"train\.learning_rates: 'k_proj' matches nothing"),
        ({"learning_rates": {".*_proj": 1e-3, "k_proj": 1.0}}, {}, r"train\.learning_rates: patterns before 'k_proj' match"),
        (
            {"freeze": ["k_proj"]},
            {"engine": "deepspeed"},
            r"train\.freeze treats .*q_proj.* and .*k_proj.* differently",
        ),
        (
            {"freeze": ["embed_tokens", r"layers\.0\..*"]},
            {"engine": "deepspeed", "pipeline": 2},
            r"train\.freeze leaves nothing to train on stage 0 of the pipeline, where parallel.engine deepspeed has no",
        ),
        ({"learning_rates": {"up_proj": 1e-3}}, {"engine": "deepspeed"}, r"train\.learning_rates treats .*gate_proj.* and"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_anything_is_loaded(
    files, tmp_path, train, parallel, words, monkeypatch
):
    from megadpo.config.schema import Config
    from megadpo.training.setup import prepare
    from megadpo.validation.load import load_config

    if parallel:
        pytest.importorskip("deepspeed")
    if "pipeline" in parallel:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
    config: Config = load_config(settings_of(files, tmp_path, train, parallel=parallel))
    with pytest.raises(UserError) as refused:
        prepare(config)
    assert re.match(words, str(refused.value)), refused.value
