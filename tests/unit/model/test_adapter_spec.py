"""Which linear layers have adapters: PEFT's `target_modules` means here what it means there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadpo.config.schema import AdapterConfig
from megadpo.errors import UserError
from megadpo.model.adapters.spec import AdapterSpec, adaptable_modules, adapter_shapes, resolve
from megadpo.model.families import shape_of
from tests.helpers.families import config_of
from tests.helpers.peft_oracle import PREFIX

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "names": ("qwen2", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "names with their places": ("qwen3", {"target_modules": ["self_attn.o_proj", "model.layers.2.mlp.up_proj"]}),
    "a pattern": ("llama", {"target_modules": r".*layers\.[02]\..*(q|up)_proj"}),
    "some layers": ("llama", {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1, 3]}),
    "a full name outside of these layers": (
        "llama",
        {"target_modules": ["k_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    ),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "the embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head by its full name beside some layers": (
        "qwen2",
        {"target_modules": ["q_proj", "lm_head", "model.embed_tokens"], "layers_to_transform": [1]},
    ),
    "a pattern for both": ("llama", {"target_modules": r".*(embed_tokens|lm_head)"}),
    "an embedding that is trained whole": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ),
    "modules that are trained whole": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}),
    "a head that is trained whole": ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    "DoRA": ("llama", {"target_modules": ["o_proj"], "use_dora": True}),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_that_peft_saves(name: str) -> None:
    import peft

    family, options = CASES[name]
    config = config_of(family)
    spec = resolve(AdapterConfig(kind="lora", rank=4, **options), shape_of(config))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options), low_cpu_mem_usage=True)
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    theirs = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in saved.items()}
    assert adapter_shapes(shape_of(config), spec) == theirs


def test_experts_have_an_adapter_each_and_their_router_has_none() -> None:
    shape = shape_of(config_of("mixtral"))
    modules = resolve(AdapterConfig(kind="lora"), shape).modules
    assert modules == adaptable_modules(shape)[1:-1] and len(modules) == 4 * (4 + 4 * 3)
    assert "model.layers.3.block_sparse_moe.experts.3.w2" in modules
    assert not any(module.endswith(".gate") for module in modules)


def test_tensors_come_in_the_model_s_order() -> None:
    shape = shape_of(config_of("qwen2"))
    names = list(adapter_shapes(shape, resolve(AdapterConfig(kind="lora", modules_to_save=["embed_tokens"]), shape)))
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names[1:]]
    assert layers == sorted(layers)


@pytest.mark.parametrize(
    ("use_rslora", "expected"),
    [(False, {"q": 8 / 4, "k": 6 / 4, "v": 8 / 2}), (True, {"q": 4.0, "k": 3.0, "v": 8 / 2**0.5})],
)
def test_scaling_is_alpha_over_the_rank_or_its_root(use_rslora: bool, expected: dict[str, float]) -> None:
    spec = AdapterSpec(4, 8.0, 0.0, use_rslora, False, ("q", "k", "v"), (), "kaiming", {"v": 2}, {"k": 6.0})
    assert {module: spec.scaling(module) for module in spec.modules} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        (
            "llama",
            {"target_modules": ["query"]},
            "'query' is no linear layer of this model; there are q_proj, k_proj, v_proj",
        ),
        (
            "llama",
            {"target_modules": "q_proj"},
            "no linear layer's whole name is 'q_proj' (a list of names: [q_proj]); there",
        ),
        ("llama", {"target_modules": "(("}, "'((' is no regular expression"),
        ("llama", {"target_modules": []}, "adapter.target_modules is empty; name linear layers"),
        ("llama", {"target_modules": ["all-linear"]}, "write target_modules: all-linear"),
        (
            "llama",
            {"target_modules": ["embed_tokens", "q_proj"], "layers_to_transform": [0]},
            "'embed_tokens' stands outside of layers, which adapter.layers_to_transform keeps to; name it in full: model",
        ),
        ("mixtral", {"target_modules": ["gate"]}, "is the experts' router, which gets no adapter"),
        ("llama", {"layers_to_transform": [4]}, "names layer 4, but the model has layers 0 to 3"),
        (
            "llama",
            {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
            "lm_head matches nothing; there are q_proj, k_proj",
        ),
        ("llama", {"modules_to_save": ["q_proj"]}, "'q_proj' is a linear layer, which gets an adapter"),
        (
            "llama",
            {"modules_to_save": ["pooler"]},
            "'pooler' matches no module of this model; there are embed_tokens, input_l",
        ),
        (
            "tied",
            {"modules_to_save": ["lm_head"]},
            "is the embedding in this model (tie_word_embeddings); name embed_tokens",
        ),
    ],
)
def test_what_matches_nothing_is_refused_with_what_there_is(family: str, options: dict[str, Any], sentence: str) -> None:
    config = config_of("qwen2", tie_word_embeddings=True) if family == "tied" else config_of(family)
    with pytest.raises(UserError) as caught:
        resolve(AdapterConfig(kind="lora", **options), shape_of(config))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
