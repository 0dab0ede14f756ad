"""What Megatron-LM is told of a model: held against Megatron-core's own rope, and against what it cannot compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from safetensors.torch import load_file, save_file

from megadpo.checkpoint.convert import export_checkpoint, export_megatron
from megadpo.checkpoint.importing import ImportOptions, import_model
from megadpo.checkpoint.megatron_flags import behaviour_flags, is_padded, refuse_other_models, size_flags
from megadpo.cli import main
from megadpo.errors import UserError
from megadpo.model.families import shape_of
from megadpo.model.moe.routing import route
from megadpo.model.shape import ModelShape, Routing
from tests.helpers.checkpoints import assert_same, tensors_of
from tests.helpers.models import save_model, tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape(family: str, **changes: Any) -> ModelShape:
    return shape_of(tiny_config(family, **changes))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite": ("granite", {}, "embedding_multiplier: 3"),
    "residual": ("granite", {"embedding_multiplier": 1.0}, "residual_multiplier: 0.6"),
    "logits": ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0}, "logits_scaling: 2.5"),
    "attention": (
        "granite",
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
        "attention_multiplier: 0.3",
    ),
    "norms": ("gemma2", {}, "other norms"),
    "latents": ("deepseek_v3", {}, "multi-head latent attention"),
    "groups": ("glm4_moe", {}, r"two best experts .topk_group: 2.*the best 1"),
    "sigmoid": ("glm4_moe", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}, "norm_topk_prob"),
    "turned norms": ("llama4_text", {}, "use_qk_norm"),
    "temperature": ("llama4_text", {"use_qk_norm": False}, "attn_temperature_tuning"),
    "scaled inputs": (
        "llama4_text",
        {"use_qk_norm": False, "attn_temperature_tuning": False},
        "experts that read what their scores multiply",
    ),
    "chunks": (
        "llama4_text",
        {"use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": []},
        "attention_chunk_size: 24",
    ),
    "sinks": ("gpt_oss", {}, "attention sinks"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias, mlp_bias"),
    "gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh .hidden_act"),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_parameters"),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}, "rope_parameters"),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}, "rope_parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_core_does_not_compute_is_refused_by_its_field(name: str) -> None:
    family, changes, words = REFUSED[name]
    with pytest.raises(UserError, match=f"the model has .*{words}"):
        refuse_other_models(shape(family, **changes), "the model")


TOLD: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", {}, []),
    "glm": ("glm", {}, ["--rotary-percent 0.5", "--rotary-interleaved"]),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, ['--no-rope-freq "[0,0,0,1]"']),
    "window": ("mistral", {"sliding_window": 48}, ["--window-size 47,0"]),
    "some windows": (
        "ministral",
        {"sliding_window": 24},
        ["--window-size 23,0", '--window-attn-skip-freq "[1,0,1,0]"'],
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        ["--rotary-seq-len-interpolation-factor 4"],
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, ["--use-rope-scaling", "--rope-scaling-factor 32"]),
}
OF_ALL = ("--swiglu", "--normalization", "--norm-epsilon", "--position-embedding-type", "--rotary-base")


@pytest.mark.parametrize("name", TOLD)
def test_what_it_must_be_told_is_said_and_gives_its_rope_our_frequencies(name: str) -> None:
    family, changes, expected = TOLD[name]
    model = shape(family, **changes)
    refuse_other_models(model, "the model")
    flags = behaviour_flags(model)
    assert [flag for flag in flags if not flag.startswith(OF_ALL)] == expected
    values: dict[str, str] = {}
    for flag in flags:
        key, _, value = flag.partition(" ")
        values[key] = value
    rope = RotaryEmbedding(
        model.head_dim,
        float(values.get("--rotary-percent", 1)),
        rotary_base=int(values["--rotary-base"]),
        rope_scaling="--use-rope-scaling" in values,
        rope_scaling_factor=float(values.get("--rope-scaling-factor", 8)),
        use_cpu_initialization=True,
    )
    ours = next(rope for rope in model.ropes if rope is not None).inverse_frequencies
    theirs = rope.inv_freq / int(values.get("--rotary-seq-len-interpolation-factor", 1))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)


ROUTINGS = {
    "softmax": Routing(),
    "renormalised": Routing(renormalised=True, scaling_factor=1.5),
    "groups by their best": Routing(num_groups=8, groups_per_token=4),
    "sigmoid": Routing("sigmoid", renormalised=True, scaling_factor=2.5, has_correction_bias=True),
    "sigmoid in groups": Routing("sigmoid", True, 1.0, 4, 2, "two_best", has_correction_bias=True),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_router_with_these_flags_chooses_and_weighs_as_ours(name: str) -> None:
    routing, per_token = ROUTINGS[name], 4
    torch.manual_seed(0)
    logits, bias = torch.randn(50, 16), torch.randn(16) if ROUTINGS[name].has_correction_bias else None
    model = shape("qwen3_moe")
    assert model.experts is not None
    experts = replace(model.experts, count=16, per_token=per_token, routing=routing)
    model = replace(model, experts=experts)
    refuse_other_models(model, "the model")
    said = " ".join(behaviour_flags(model))
    words: dict[str, str] = {}
    for flag in ("score-function", "num-groups", "group-topk", "topk-scaling-factor"):
        words[flag] = said.partition(f"--moe-router-{flag} ")[2].split(" ")[0]
    probabilities, chosen = topk_routing_with_score_function(
        logits,
        per_token,
        use_pre_softmax="--moe-router-pre-softmax" in said,
        num_groups=int(words["num-groups"] or 0) or None,
        group_topk=int(words["group-topk"] or 0) or None,
        scaling_factor=float(words["topk-scaling-factor"] or 0) or None,
        score_function=words["score-function"] or "softmax",
        expert_bias=bias,
    )
    ours = route(logits, routing, per_token, bias)
    assert torch.equal(chosen.bool(), ours.chosen_TE)
    torch.testing.assert_close(probabilities, ours.probabilities_TE, rtol=1e-6, atol=1e-7)


def test_sizes_and_experts_are_said() -> None:
    flags = size_flags(shape("qwen2", tie_word_embeddings=True))
    assert {"--num-layers 4", "--group-query-attention", "--num-query-groups 2", "--add-qkv-bias"} <= set(flags)
    assert "--untie-embeddings-and-output-weights" not in flags
    mixture = shape("qwen3_moe", mlp_only_layers=[0], norm_topk_prob=False)
    assert {"--num-experts 8", "--moe-ffn-hidden-size 48", '--moe-layer-freq "[0,1,1,1]"', "--qk-layernorm"} <= set(
        size_flags(mixture)
    )
    assert {"--moe-router-topk 3", "--moe-router-pre-softmax"} <= set(behaviour_flags(mixture))
    shared = shape("glm4_moe", n_group=1, topk_group=1)
    refuse_other_models(shared, "the model")
    assert {"--moe-router-enable-expert-bias", "--moe-shared-expert-intermediate-size 64"} <= set(size_flags(shared))
    assert {"--moe-router-score-function sigmoid", "--moe-router-topk-scaling-factor 1.5"} <= set(behaviour_flags(shared))
    assert "--moe-router-pre-softmax" not in behaviour_flags(shape("mixtral"))


def test_padding_is_megatron_s_own() -> None:
    for rows, vocabulary in ((50304, 50257), (50432, 50257), (51200, 50257), (500, 499), (512, 499), (499, 499)):
        assert is_padded(rows, vocabulary), (rows, vocabulary)
    for rows, vocabulary in ((499, 300), (50258, 50000), (8192, 499), (50305, 50257)):
        assert not is_padded(rows, vocabulary), (rows, vocabulary)


def padded(model: Path, num_rows: int, out: Path) -> Path:
    """The model with rows of zeros, in Megatron-core's format; its config says how many are tokens'."""
    config = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(num_rows - len(tensors[name]), 64)])
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"vocab_size": num_rows}))
    export_megatron(out, out / "megatron")
    return out / "megatron"


def test_rows_of_padding_are_left_out_and_said_and_others_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", tokenizer=False)
    given = padded(model, 512, tmp_path / "512")
    assert main(["convert", "import", str(given), str(tmp_path / "checkpoint"), "--config", str(model)]) == 0
    said = capsys.readouterr().err
    assert "embedding.word_embeddings.weight: the 13 rows beyond vocab_size 499 are Megatron's padding, left out" in said
    assert "--norm-epsilon 1e-06" in said and "its tensors do not show" in said
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(model))
    given = padded(model, 701, tmp_path / "701")
    with pytest.raises(UserError, match="has 701 rows, but its config says vocab_size 499, which Megatron does not pad"):
        import_model(given, tmp_path / "out", ImportOptions(config=str(model)))


def test_the_command_s_closing_words_are_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model", "glm", tokenizer=False)
    assert main(["convert", "export", str(model), str(tmp_path / "out"), "--format", "torch_dist"]) == 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("megadpo: Megatron-LM computes this model with --num-layers 4")
    assert "--rotary-percent 0.5 --rotary-interleaved" in last
    granite = save_model(tmp_path / "granite", "granite", tokenizer=False)
    with pytest.raises(UserError, match=r"embedding_multiplier: 3\), of which checkpoints of Megatron-core are neither"):
        export_megatron(granite, tmp_path / "no")
    assert not (tmp_path / "no").exists()
