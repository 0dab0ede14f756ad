"""Rules between options and the models or the data of a run: each is one sentence, before anything starts."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig, MixtralConfig

from megadpo.config.schema import Config
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.model.shape import ModelShape
from megadpo.validation.data import check_mismatched_fit
from megadpo.validation.load import load_config
from megadpo.validation.model import check_experts, check_same_vocabulary
from tests.helpers.models import random_groups

LLAMA = shape_of(LlamaConfig(architectures=["LlamaForCausalLM"]))
MIXTRAL = shape_of(MixtralConfig(architectures=["MixtralForCausalLM"]))


@pytest.mark.parametrize(
    ("override", "model", "message"),
    [
        ("train.router_aux_coef=0.1", LLAMA, "train.router_aux_coef is 0.1, but m has no experts; remove it"),
        (
            "parallel.engine=deepspeed",
            MIXTRAL,
            "parallel.engine is deepspeed, but m has experts, which are",
        ),
    ],
)
def test_options_about_experts_are_for_models_that_have_some(override: str, model: ModelShape, message: str) -> None:
    config = load_config({}, ["model.path=m", override])
    with pytest.raises(UserError, match=message):
        check_experts(config, model)
    check_experts(load_config({}), model)


def test_a_reference_reads_the_policy_s_tokens() -> None:
    check_same_vocabulary("r", replace(LLAMA, vocab_size=40), replace(MIXTRAL, vocab_size=40))
    with pytest.raises(UserError, match=r"reference.path: r has 39 vocabulary rows and the policy 40"):
        check_same_vocabulary("r", replace(LLAMA, vocab_size=39), replace(LLAMA, vocab_size=40))


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
