"""Rules between options and the models or the data of a run: each is one sentence, before anything starts."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Glm4MoeConfig, LlamaConfig, MixtralConfig, Qwen3NextConfig

from megadpo.config.schema import Config
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.validation.data import check_mismatched_fit
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config
from megadpo.validation.model import (
    check_experts,
    check_linear_attention,
    check_same_routes,
    check_same_tokenizer,
    check_same_vocabulary,
)
from tests.helpers.models import random_groups, save_tokenizer

LLAMA = shape_of(LlamaConfig(architectures=["LlamaForCausalLM"]))
MIXTRAL = shape_of(MixtralConfig(architectures=["MixtralForCausalLM"]))
GLM = shape_of(Glm4MoeConfig(architectures=["Glm4MoeForCausalLM"]))
NEXT = shape_of(Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"], num_key_value_heads=4))


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (
            ["model.linear_attention=torch"],
            LLAMA,
            "linear_attention is torch, but m has no layers with linear attention; remove it",
        ),
        (
            ["schedule.split_pairs=true", "schedule.name=1f1b", "parallel.pipeline=2"],
            NEXT,
            "schedule.split_pairs is true, but the model has layers with linear attention, .*; set it to false",
        ),
    ],
)
def test_options_about_linear_attention_are_for_models_that_have_it(
    overrides: list[str], model: ModelShape, message: str
) -> None:
    config = load_config({}, ["model.path=m", *overrides])
    with pytest.raises(UserError, match=message):
        check_linear_attention(config, model)
    check_linear_attention(load_config({}), model)
    check_linear_attention(load_config({}, ["model.linear_attention=torch"]), LLAMA, NEXT)


def test_a_sequence_whose_state_runs_on_is_not_cut_over_context_ranks() -> None:
    with pytest.raises(
        UserError, match=r"parallel.context is 2, but the model has layers with linear attention, whose state"
    ):
        check_layout(Layout(context=2), NEXT)
    with pytest.raises(UserError, match=r"parallel.tensor 4 does not divide .* 2 key heads of linear attention .*; use one"):
        check_layout(Layout(tensor=4, sequence=True), replace(NEXT, linear=replace(NEXT.linear, num_key_heads=2)))


@pytest.mark.parametrize(
    ("override", "model", "message"),
    [
        ("train.router_aux_coef=0.1", LLAMA, "train.router_aux_coef is 0.1, but m has no experts; remove it"),
        (
            "train.router_bias_update_rate=0.001",
            MIXTRAL,
            "train.router_bias_update_rate is 0.001, but m has no routers with a correction bias .*; remove it",
        ),
        (
            ["train.router_bias_update_rate=0.001", "adapter.kind=lora"],
            GLM,
            "router_bias_update_rate is 0.001, but with adapter.kind lora the model, .* stays as it is; set it to 0",
        ),
        ("model.expert_products=loop", LLAMA, "model.expert_products is loop, but m has no experts; remove it"),
        (
            ["model.expert_products=grouped", "model.quantization=nf4", "adapter.kind=lora"],
            MIXTRAL,
            "model.expert_products is grouped with model.quantization nf4, whose matrices are made dense one after",
        ),
        (
            ["model.expert_products=grouped_mm", "parallel.engine=deepspeed", "parallel.zero_stage=3"],
            MIXTRAL,
            "model.expert_products is grouped_mm with parallel.zero_stage 3, which gathers the matrices of one",
        ),
        ("reference.router_replay=true", LLAMA, "reference.router_replay is true, but m has no experts; remove it"),
        (
            ["reference.router_replay=true", "train.router_aux_coef=0.1"],
            MIXTRAL,
            "router_replay is true, but the load is then the reference's, which nothing that train.router_aux_coef does",
        ),
        (
            ["reference.router_replay=true", "train.router_bias_update_rate=0.1"],
            GLM,
            "router_replay is true, but the load is then the reference's, which nothing that train.router_bias_update_rate",
        ),
    ],
)
def test_options_about_experts_are_for_models_that_have_some(
    override: str | list[str], model: ModelShape, message: str
) -> None:
    config = load_config({}, ["model.path=m", *([override] if isinstance(override, str) else override)])
    with pytest.raises(UserError, match=message):
        check_experts(config, model)
    check_experts(load_config({}), model)


def test_routes_are_replayed_from_a_reference_with_the_same_experts_only() -> None:
    def glm(**changes: int) -> ModelShape:
        return shape_of(Glm4MoeConfig(architectures=["Glm4MoeForCausalLM"], **changes))

    config = load_config({}, ["model.path=m", "reference.path=r", "reference.router_replay=true"])
    check_same_routes(config, GLM, GLM)
    for reference, message in (
        (LLAMA, "but r has 0 experts and m 128; their routes can't be the same"),
        (glm(num_experts_per_tok=4), "but r has 4 experts per token and m 8"),
        (glm(first_k_dense_replace=45), "but r has layers 45 with experts and m layers 1-45; their routes"),
    ):
        with pytest.raises(UserError, match=message):
            check_same_routes(config, reference, GLM)
    check_same_routes(load_config({}, ["model.path=m", "reference.path=r"]), LLAMA, GLM)


def test_routes_are_replayed_from_a_reference_that_runs_with_the_policy() -> None:
    for overrides, message in (
        (["objective.loss_type=sft"], r"router_replay is true, but there is no reference \(reference.mode none\)"),
        (["reference.mode=precomputed"], "reference.router_replay is true, but the policy goes by what the reference's"),
    ):
        with pytest.raises(UserError, match=message):
            load_config({}, ["reference.router_replay=true", *overrides])


def test_a_reference_reads_the_policy_s_tokens() -> None:
    check_same_vocabulary("r", replace(LLAMA, vocab_size=40), replace(MIXTRAL, vocab_size=40))
    with pytest.raises(UserError, match=r"reference.path: r has 39 vocabulary rows and the policy 40"):
        check_same_vocabulary("r", replace(LLAMA, vocab_size=39), replace(LLAMA, vocab_size=40))


def test_a_reference_with_a_tokenizer_that_gives_other_ids_is_refused(tmp_path: Path) -> None:
    for name in ("policy", "same", "swapped", "split", "longer", "without"):
        (tmp_path / name).mkdir()
    policy = str(tmp_path / "policy")
    tokenizer = save_tokenizer(tmp_path / "policy")
    written = json.loads(tokenizer.backend_tokenizer.to_str())

    def save(name: str, changed: dict[str, Any]) -> str:
        for file in (tmp_path / "policy").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(changed, indent=1))
        return str(tmp_path / name)

    check_same_tokenizer(save("same", written), policy)
    check_same_tokenizer(str(tmp_path / "without"), policy)
    more = copy.deepcopy(written)
    more["added_tokens"].append({**more["added_tokens"][-1], "id": len(tokenizer), "content": "<more>"})
    check_same_tokenizer(save("longer", more), policy)
    swapped = copy.deepcopy(written)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(UserError, match=rf"reference.path: the tokenizer of .*swapped reads token id {vocabulary['b']} as"):
        check_same_tokenizer(save("swapped", swapped), policy)
    split = copy.deepcopy(written)
    split["model"]["merges"] = split["model"]["merges"][:3]
    with pytest.raises(UserError, match=r"split has the same tokens but splits text in another way"):
        check_same_tokenizer(save("split", split), policy)


def test_every_prompt_fits_before_every_answer_where_kto_puts_it_there() -> None:
    groups = GroupStore.of(random_groups(8))
    longest = groups.longest_mismatch()

    def config(capacity: int, **options: object) -> Config:
        return load_config({"objective": {"loss_type": "kto"}, "train": {"tokens_per_micro_batch": capacity}, **options})

    check_mismatched_fit(config(longest), groups)
    check_mismatched_fit(config(longest - 1, objective={"loss_type": "sigmoid"}), groups)
    check_mismatched_fit(config(longest - 1, data={"max_length": longest - 1}), groups)
    with pytest.raises(UserError, match=f"kto may put a prompt before another row's answer, {longest} tokens together"):
        check_mismatched_fit(config(longest - 1), groups)
