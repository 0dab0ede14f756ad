"""Runs with mixtures of experts: resumed, moved to another layout, exported, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from megadpo.config.schema import ParallelConfig
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.training.setup import prepare
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config
from tests.helpers.models import save_model, write_hh
from tests.helpers.runs import (
    assert_same_weights,
    exported_weights,
    log_probs,
    resumed_and_whole,
    run_settings,
    train_run,
    weights_in,
)
from tests.helpers.worlds import run_world


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model whose first layer has no experts, and training pairs."""
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "qwen3_moe", mlp_only_layers=[0], norm_topk_prob=True)
    write_hh(directory / "train.jsonl", 40)
    return directory


def settings_of(files: Path, output_dir: Path, parallel: dict[str, int], dtype: str = "fp32") -> dict[str, Any]:
    return run_settings(
        files,
        output_dir,
        model={"dtype": dtype},
        parallel=parallel,
        train={"steps": 4, "pairs_per_step": 6, "router_aux_coef": 0.01},
        checkpoint={"every": 2},
    )


RATE = 0.01


@pytest.mark.slow
def test_a_resumed_run_with_expert_parallelism_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    save_model(tmp_path / "model", "glm4_moe", num_hidden_layers=3, dtype=torch.bfloat16)
    write_hh(tmp_path / "train.jsonl", 40)

    def settings(name: str) -> dict[str, Any]:
        made = settings_of(tmp_path, tmp_path / name, {"expert": 2}, "bf16")
        made["train"] |= {"router_bias_update_rate": RATE, "freeze": [r"layers\.2\.mlp\.gate\..*"]}
        return made

    resumed, whole = resumed_and_whole(2, settings, 3)
    names = {"moe/aux_loss", "moe/largest_load", "moe/mean_largest_load", "moe/largest_bias"}
    assert resumed == whole and names <= whole[0].keys()
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")
    before, after = weights_in(tmp_path / "model"), exported_weights(tmp_path / "whole")
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(after[name].dtype is torch.float32 for name in biases)
    frozen = biases.pop()
    assert torch.equal(before[frozen], after[frozen]), "train.freeze holds a router with its bias"
    # Four steps, each up, down or (where an expert had an even share) not at all.
    moved = torch.stack([(after[name] - before[name]) / RATE for name in biases])
    assert torch.allclose(moved, moved.round(), atol=1e-3) and moved.abs().max() >= 2 and moved.abs().max() <= 4.001
    assert whole[-1]["moe/largest_bias"] == pytest.approx(max(float(after[name].abs().max()) for name in biases))


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_and_transformers_loads_its_export(files, tmp_path):
    whole = run_world(1, train_run, settings_of(files, tmp_path / "whole", {}))[0]
    run_world(2, train_run, settings_of(files, tmp_path / "moved", {"pipeline": 2}), 3)
    moved = run_world(4, train_run, settings_of(files, tmp_path / "moved", {"tensor": 2, "expert": 2, "expert_tensor": 2}))[
        0
    ]
    for ours, theirs in zip(moved, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    before = weights_in(files / "model")
    ours, theirs = exported_weights(tmp_path / "moved"), exported_weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == before.keys()
    distance = torch.stack([(ours[name] - theirs[name]).norm() for name in ours]).norm()
    assert distance <= 1e-3 * torch.stack([(theirs[name] - before[name]).norm() for name in ours]).norm()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    gate_up = dict(model.named_parameters())["model.layers.2.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[5, :48], ours["model.layers.2.mlp.experts.5.gate_proj.weight"])
    assert torch.equal(gate_up[5, 48:], ours["model.layers.2.mlp.experts.5.up_proj.weight"])


MIXTRAL = MixtralConfig(
    num_local_experts=6, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=4
)


def test_expert_sizes_come_from_the_configuration_and_divide_a_stage_s_processes():
    parallel = ParallelConfig(tensor=2, expert=2, expert_tensor=2)
    assert choose_layout(parallel, 4) == Layout(tensor=2, data=2, sequence=True, expert=2, expert_tensor=2)
    assert choose_layout(ParallelConfig(context=2, expert=2), 2) == Layout(context=2, expert=2)
    with pytest.raises(UserError, match=r"parallel.expert 2 x parallel.expert_tensor 2 must divide the 2 processes"):
        choose_layout(parallel, 2)


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (Layout(data=4, expert=4), MIXTRAL, r"parallel.expert 4 does not divide the model's 6 experts; use one of \[1, 2"),
        (Layout(data=5, expert_tensor=5), MIXTRAL, "parallel.expert_tensor 5 does not divide the 96 columns of an expert"),
        (Layout(tensor=2), MIXTRAL, "parallel.sequence is false .* a model with experts needs it"),
        (Layout(data=2, expert=2), LlamaConfig(), "parallel.expert is 2, but the model has no experts; leave it at 1"),
    ],
)
def test_a_layout_that_the_experts_do_not_fit_is_refused(layout, config, message):
    with pytest.raises(UserError, match=message):
        check_layout(layout, shape_of(config))


def test_the_dense_mlp_s_columns_matter_only_where_a_layer_has_one():
    check_layout(Layout(tensor=2, sequence=True), shape_of(MixtralConfig(intermediate_size=97, num_hidden_layers=4)))
    config = Qwen3MoeConfig(intermediate_size=97, mlp_only_layers=[0])
    with pytest.raises(UserError, match="97 MLP columns"):
        check_layout(Layout(tensor=2, sequence=True), shape_of(config))


def test_a_dense_model_s_routers_cannot_be_balanced(tmp_path):
    save_model(tmp_path / "model", "llama")
    write_hh(tmp_path / "train.jsonl", 12)
    settings = run_settings(tmp_path, tmp_path / "run", train={"router_aux_coef": 0.01})
    with pytest.raises(UserError, match=r"train.router_aux_coef is 0.01, but .*model has no experts; remove it"):
        prepare(load_config(settings))


@pytest.mark.slow
def test_under_router_replay_a_new_adapter_routes_as_the_reference_and_a_resumed_run_as_the_whole_one(files, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((files / "train.jsonl").read_text().splitlines(keepends=True)[:8]))

    def settings(name: str) -> dict[str, Any]:
        made = settings_of(files, tmp_path / name, {"expert": 2})
        made["train"] |= {"router_aux_coef": 0.0, "learning_rate": 1e-2, "warmup_steps": 0}
        evaluation = {"data": made["data"] | {"eval": str(held_out)}, "eval": {"every": 4}}
        return made | {"adapter": {"kind": "lora"}, "reference": {"router_replay": True}} | evaluation

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert resumed == whole
    agreement = [line["moe/replay_agreement"] for line in whole if "moe/replay_agreement" in line]
    assert agreement[0] == 1 and 0.5 < agreement[-1] < 1, "the reference is the model before it has learned anything"
    assert whole[0]["rewards/margins"] == 0
    run_world(1, log_probs, tmp_path / "whole" / "hf", held_out, tmp_path / "out.jsonl", {}, True, tmp_path / "cache")
    logps = [json.loads(line)["chosen_logp"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert whole[-1]["eval_logps/chosen"] == pytest.approx(sum(logps) / len(logps), rel=1e-5), "held out, it routes itself"
