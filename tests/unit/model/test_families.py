"""Families: every Megatron shard is made of pieces of Hugging Face tensors, and config means what it means there."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)
from transformers.masking_utils import create_sliding_window_causal_mask

from megadpo.checkpoint.export import join_tensor_ranks
from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.checkpoint.megatron_flags import _reasons, refuse_other_models
from megadpo.data.batches.micro_batch import Segment
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.families import FAMILIES as REGISTERED
from megadpo.model.families import (
    ExpertPlace,
    check_tensors,
    family_of,
    logical_shapes,
    shape_of,
    shard_parameters,
    with_reward_head,
)
from megadpo.model.families.fill import fill_shard
from megadpo.model.families.refused import REFUSED
from megadpo.model.layer_specs import softmax_scale
from megadpo.model.rope import angles_of, kinds_of_segments
from megadpo.validation.data import check_shared_prompts, num_turned_differently
from tests.helpers import oracle
from tests.helpers.families import LLAMA3, DictSource, config_of
from tests.helpers.models import PREFIXES, save_model, tiny_config

FAMILIES = tuple(PREFIXES)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG_CONFIG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
DYNAMIC_CONFIG = {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}


def random_source(config: Any, dtype: torch.dtype = torch.float32) -> DictSource:
    torch.manual_seed(0)
    return DictSource({name: torch.randn(shape, dtype=dtype) for name, shape in logical_shapes(shape_of(config)).items()})


def all_shards(config: Any, num_tensor: int, num_pipeline: int, source: Any) -> list[list[Any]]:
    """For every parameter of every stage: its (shard, tensor) on each tensor rank."""
    per_stage = config.num_hidden_layers // num_pipeline
    parameters = []
    for stage in range(num_pipeline):
        ranks = []
        for rank in range(num_tensor):
            shards = shard_parameters(
                shape_of(config),
                tensor_rank=rank,
                num_tensor=num_tensor,
                layers=range(stage * per_stage, (stage + 1) * per_stage),
                has_embedding=stage == 0,
                has_head=stage == num_pipeline - 1,
            )
            filled = [(shard, torch.full(shard.shape, math.nan, dtype=torch.float32)) for shard in shards]
            for shard, tensor in filled:
                fill_shard(shard, source, tensor)
            ranks.append(filled)
        parameters += [list(parts) for parts in zip(*ranks, strict=True)]
    return parameters


VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILIES},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "cohere-normed": {"use_qk_norm": True, "attention_bias": True},
    "glm4-biased": {"attention_bias": True},
}


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_tensor", [1, 2, 4])
@pytest.mark.parametrize("num_pipeline", [1, 2])
def test_shards_of_all_ranks_join_to_the_hugging_face_tensors_bit_for_bit(
    family: str, tied: bool, num_tensor: int, num_pipeline: int
) -> None:
    config = config_of(family.split("-")[0], tie_word_embeddings=tied, **VARIANTS[family])
    source = random_source(config)
    joined: dict[str, torch.Tensor] = {}
    for parts in all_shards(config, num_tensor, num_pipeline, source):
        primary = [part for part in parts if part[0].is_primary]
        for name, tensor in join_tensor_ranks(primary):
            assert name not in joined, f"{name} is written twice"
            joined[name] = tensor
    assert joined.keys() == source.tensors.keys()
    assert all(torch.equal(joined[name], source.tensors[name]) for name in joined)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3", "llama4_text", "qwen3_next"]
)
@pytest.mark.parametrize(("num_expert", "num_tensor"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_experts_of_all_ranks_join_to_the_hugging_face_tensors_bit_for_bit(
    family: str, num_expert: int, num_tensor: int
) -> None:
    config = config_of(family)
    source = random_source(config)
    joined: dict[str, torch.Tensor] = {}
    for expert in range(num_expert):
        ranks = []
        for tensor in range(num_tensor):
            shards = shard_parameters(
                shape_of(config),
                tensor_rank=0,
                num_tensor=1,
                layers=range(4),
                has_embedding=False,
                has_head=False,
                expert_place=ExpertPlace(expert, num_expert, tensor, num_tensor),
            )
            filled = [(shard, torch.full(shard.shape, math.nan)) for shard in shards if ".local_experts." in shard.name]
            for shard, values in filled:
                fill_shard(shard, source, values)
            ranks.append(filled)
        for parts in zip(*ranks, strict=True):
            assert len({shard.name for shard, _ in parts}) == 1
            for name, values in join_tensor_ranks([part for part in parts if part[0].is_primary]):
                assert name not in joined, f"{name} is held twice"
                joined[name] = values
    assert joined.keys() == {name for name in source.tensors if ".experts." in name}
    assert all(torch.equal(joined[name], source.tensors[name]) for name in joined)


def test_padded_vocabulary_rows_are_zero_and_belong_to_no_piece() -> None:
    config = config_of("llama", vocab_size=497)
    parameters = all_shards(config, 4, 1, random_source(config))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        (parts,) = [parts for parts in parameters if parts[0][0].name == name]
        assert [shard.shape for shard, _ in parts] == [(125, 64)] * 4
        last_shard, last = parts[-1]
        assert sum(piece.length for piece in last_shard.pieces) == 122
        assert torch.equal(last[122:], torch.zeros(3, 64))


def test_a_whole_rank_of_padding_has_no_pieces_at_all() -> None:
    config = config_of("llama", vocab_size=5)
    shards = shard_parameters(
        shape_of(config), tensor_rank=3, num_tensor=4, layers=range(0), has_embedding=True, has_head=False
    )
    assert shards[0].shape == (2, 64) and shards[0].pieces == ()


def test_the_fused_matrices_lie_as_megatron_splits_them() -> None:
    config = config_of("qwen2")
    source = random_source(config)
    tensors = {parts[0][0].name: [tensor for _, tensor in parts] for parts in all_shards(config, 2, 1, source)}
    q, k, v = (source.tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    head = 8
    for rank, local in enumerate(tensors["decoder.layers.1.self_attention.linear_qkv.weight"]):
        for slot, group in enumerate((2 * rank, 2 * rank + 1)):
            # Megatron views the rows as [groups, q heads of the group + k + v, head].
            rows = local.view(2, 4 * head, 64)[slot]
            assert torch.equal(rows[: 2 * head], q[group * 2 * head : (group + 1) * 2 * head])
            assert torch.equal(rows[2 * head : 3 * head], k[group * head : (group + 1) * head])
            assert torch.equal(rows[3 * head :], v[group * head : (group + 1) * head])
    for rank, local in enumerate(tensors["decoder.layers.1.mlp.linear_fc1.weight"]):
        gate, up = local.chunk(2)
        assert torch.equal(gate, source.tensors["model.layers.1.mlp.gate_proj.weight"][rank * 48 : rank * 48 + 48])
        assert torch.equal(up, source.tensors["model.layers.1.mlp.up_proj.weight"][rank * 48 : rank * 48 + 48])


def test_a_tied_head_exists_only_on_a_stage_without_the_embedding() -> None:
    config = config_of("qwen3", tie_word_embeddings=True)
    both = shard_parameters(
        shape_of(config), tensor_rank=0, num_tensor=1, layers=range(4), has_embedding=True, has_head=True
    )
    last = shard_parameters(
        shape_of(config), tensor_rank=0, num_tensor=1, layers=range(2, 4), has_embedding=False, has_head=True
    )
    assert not [shard for shard in both if shard.name == "output_layer.weight"]
    (head,) = [shard for shard in last if shard.name == "output_layer.weight"]
    assert head.pieces[0].logical_name == "model.embed_tokens.weight" and not head.is_primary


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logical_names_and_shapes_are_those_of_the_transformers_model(family: str, tied: bool) -> None:
    config = config_of(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    in_files = oracle.in_files(dict(model.named_parameters()) | kept, config)
    expected = {name: tuple(tensor.shape) for name, tensor in in_files.items()}
    assert logical_shapes(shape_of(config)) == expected


@pytest.mark.parametrize("num_tensor", [1, 2])
@pytest.mark.parametrize("family", FAMILIES[:4])  # build_stage matches those of experts in every test that has any
def test_names_and_shapes_are_those_of_megatrons_model(family: str, num_tensor: int) -> None:
    from tests.helpers.worlds import run_world

    for found, expected in run_world(num_tensor, megatron_and_our_shapes, family, num_tensor):
        assert found == expected


def megatron_and_our_shapes(family: str, num_tensor: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """On one rank: parameter shapes of a GPTModel from the local spec, and of our shards."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megadpo.model.norm import RMSNorm
    from megadpo.platform.megatron_cpu import prepare_megatron

    prepare_megatron()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(num_tensor)
    get_cuda_rng_tracker()
    config = config_of(family)
    settings = TransformerConfig(
        **shape_of(config).megatron_options(),
        tensor_model_parallel_size=num_tensor,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=settings.qk_layernorm)
    spec = TransformerBlockSubmodules(layer_specs=[layer] * 4, layer_norm=RMSNorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if settings.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    model = GPTModel(settings, spec, -(-499 // num_tensor) * num_tensor, 64, position_embedding_type="rope")
    shards = shard_parameters(
        shape_of(config),
        tensor_rank=dist.get_rank(),
        num_tensor=num_tensor,
        layers=range(4),
        has_embedding=True,
        has_head=True,
    )
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    dist.destroy_process_group()
    return found, {shard.name: shard.shape for shard in shards}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_rotary_frequencies_and_scaling_equal_the_transformers_module(family: str, changes: dict[str, Any]) -> None:
    config = config_of(family, **changes)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    shape = shape_of(config)
    frequencies, scaling = shape.ropes[0].inverse_frequencies, shape.ropes[0].scaling
    assert frequencies.dtype is torch.float32
    assert torch.equal(frequencies, rotary.inv_freq)
    assert scaling == rotary.attention_scaling


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        ({"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}, "'proportional'"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_rope_that_cannot_be_run_is_refused_by_name(rope: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        shape_of(config_of("llama", rope_parameters=rope))


@pytest.mark.parametrize(
    ("family", "changes", "lengths"),
    [
        ("phi3", {**LONG_CONFIG, "max_position_embeddings": 64}, (1, 16, 17, 40)),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, (9,)),
        ("llama", DYNAMIC_CONFIG, (1, 15, 16, 17, 40)),
        ("glm4", {}, (9,)),
        ("llama", {"rope_parameters": LLAMA3}, (700,)),
        ("qwen2", {"rope_parameters": YARN}, (700,)),
        ("smollm3", {}, (9,)),
    ],
)
def test_a_sequence_s_angles_are_those_of_transformers_for_it_alone(
    family: str, changes: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    config = config_of(family, **changes)
    rope = shape_of(config).ropes[0]
    assert rope is not None
    for length in lengths:
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
        cosine, sine = rotary(torch.zeros(1), torch.arange(length)[None])
        angles_TN = angles_of(rope, stream_of(((0, length, 0, 0),)))
        num_pairs = angles_TN.shape[1]
        assert torch.equal(angles_TN.cos() * rope.scaling, cosine[0, :, :num_pairs]), length
        assert torch.equal(angles_TN.sin() * rope.scaling, sine[0, :, :num_pairs]), length


def stream_of(segments: tuple[tuple[int, int, int, int], ...]) -> Any:
    """What a rope reads of a micro-batch with these segments, which begin with the positions that their prompts end with."""
    made = tuple(Segment(*bounds) for bounds in segments)
    positions_T = torch.cat([torch.arange(s.end - s.start) + s.prompt_end - s.prompt_start for s in made])
    return SimpleNamespace(
        segments=made,
        local=SimpleNamespace(positions_T=positions_T),
        local_places=lambda: torch.arange(len(positions_T)),
    )


def test_sequences_of_one_stream_have_each_its_own_frequencies() -> None:
    rope = shape_of(config_of("phi3", **LONG_CONFIG)).ropes[0]
    assert rope is not None and rope.by_length is not None
    # A prompt of 12 tokens, shared by responses of 8 and 9, and a sequence of 16: one is not longer than 16.
    shared = stream_of(((0, 12, 0, 0), (12, 20, 0, 12), (20, 29, 0, 12), (29, 45, 0, 0)))
    assert kinds_of_segments(shared, rope.by_length) == [1, 1, 1, 0]
    angles_TN = angles_of(rope, shared)
    long = rope.by_length.inverse_frequencies_of(1)
    assert torch.equal(angles_TN[:12], torch.outer(torch.arange(12.0), long))
    assert torch.equal(angles_TN[29:], torch.outer(torch.arange(16.0), rope.inverse_frequencies))


def test_a_prompt_that_its_responses_turn_differently_is_refused() -> None:
    for family, changes in (("phi3", LONG_CONFIG), ("llama", DYNAMIC_CONFIG)):
        rope = shape_of(config_of(family, **changes)).ropes[0]
        assert rope is not None
        with pytest.raises(UserError, match=r"16 and 20 tokens long.*set data.share_prompts to false"):
            angles_of(rope, stream_of(((0, 12, 0, 0), (12, 16, 0, 12), (16, 24, 0, 12))))


def test_shared_prompts_that_are_turned_differently_are_counted_before_anything_is_trained() -> None:
    def group(prompts: tuple[int, ...], responses: tuple[int, ...]) -> Group:
        ids = [tuple(np.zeros(length, np.int32) for length in lengths) for lengths in (prompts, responses)]
        return Group(*ids, 0, {})

    either_side, apart = group((10,), (6, 7)), group((10, 10), (6, 7))
    groups = GroupStore.of([either_side, apart, group((10,), (8, 9)), group((10,), (5, 6)), group((10,), (9,))])
    found = {}
    for family, changes in (("phi3", LONG_CONFIG), ("llama", DYNAMIC_CONFIG)):
        shape = shape_of(config_of(family, **changes))
        rope = shape.ropes[0]
        assert rope is not None and rope.by_length is not None
        found[family] = num_turned_differently(groups, rope.by_length)
        with pytest.raises(UserError, match=f"{found[family]} of 5 rows have responses.*set data.share_prompts to false"):
            check_shared_prompts(groups, shape)
    assert found == {"phi3": 1, "llama": 2}
    check_shared_prompts(groups, shape_of(config_of("llama")))


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("falcon_h1", "recurrent state"),
        ("jamba", "recurrent state"),
        ("granitemoehybrid", "recurrent state"),
        ("qwen2_5_vl", "only text"),
        ("llama4", r"images.*text part alone by transformers .Llama4ForCausalLM.from_pretrained"),
        ("t5", "an encoder and a decoder"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_with_the_reason(model_type: str, word: str) -> None:
    with pytest.raises(UserError, match=rf"XForCausalLM \(model_type '{model_type}'\) is not supported: it .*{word}"):
        family_of({"architectures": ["XForCausalLM"], "model_type": model_type})


def test_the_text_part_of_a_llama_4_that_reads_images_is_saved_by_transformers_as_its_refusal_says(tmp_path: Path) -> None:
    of_images = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
    of_images |= {"vision_output_dim": 32, "image_size": 28, "projector_input_dim": 32, "projector_output_dim": 32}
    text = tiny_config("llama4_text", num_hidden_layers=2)
    config = Llama4Config(text_config=text.to_dict(), vision_config=of_images)
    Llama4ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="text part alone"):
        read_hf_config(tmp_path / "whole")
    Llama4ForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")
    check_tensors(shape_of(read_hf_config(tmp_path / "text")), open_hf(tmp_path / "text"))
    whole, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "text"))
    assert all(torch.equal(tensor, whole[f"language_model.{name}"]) for name, tensor in alone.items())


def test_refused_models_are_named_as_transformers_names_them() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = {model_type for types in REFUSED.values() for model_type in types}
    assert not named & {family.name for family in REGISTERED}
    assert named <= set(CONFIG_MAPPING_NAMES) | {"rwkv"}, sorted(named - set(CONFIG_MAPPING_NAMES))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {"sliding_window": 7}, [7] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", {"sliding_window": 7}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, [None, None, None, 7]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, [None, 7, 7, 7]),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7}, [None, None, None, 7]),
        ("ministral", {"sliding_window": 7}, [7] * 4),
        ("cohere2", {"sliding_window": 7, "sliding_window_pattern": 2}, [7, None, 7, None]),
        ("phi3", {"sliding_window": 7}, [7] * 4),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [5, None, 5, None],
        ),
    ],
)
def test_sliding_windows_by_layer(family: str, changes: dict[str, Any], expected: list[int | None]) -> None:
    assert shape_of(config_of(family, **changes)).windows == tuple(expected)


def test_llama_4_s_layers_have_rope_chunks_and_experts_where_its_config_says() -> None:
    lists = {"moe_layers": None, "no_rope_layers": None, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 4}
    shape = shape_of(config_of("llama4_text", **lists))
    assert [rope is not None for rope in shape.ropes] == [True, True, True, False]
    assert shape.reaches == ((None, 24), (None, 24), (None, 24), (None, None))
    assert shape.experts is not None and shape.experts.layers == (1, 3)
    assert (shape.ffn_size, shape.experts.columns, shape.experts.shared_columns) == (80, 48, 48)
    assert shape_of(config_of("llama4_text", moe_layers=[])).experts is None


def test_a_window_counts_the_token_itself_as_transformers_masks_do() -> None:
    config = config_of("mistral", sliding_window=3, attn_implementation="eager")
    mask = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 8, 64),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(8)[None],
    )
    seen = mask[0, 0] == 0
    query, key = torch.arange(8)[:, None], torch.arange(8)[None]
    assert torch.equal(seen, (key <= query) & (key > query - shape_of(config).windows[0]))


@pytest.mark.parametrize(
    ("changes", "key_value_heads", "head_dim"),
    [({}, 4, 8), ({"num_key_value_heads": None}, 8, 8), ({"head_dim": 24}, 4, 24), ({"head_dim": None}, 4, 8)],
)
def test_heads_and_their_size_are_worked_out_where_the_config_leaves_them_open(changes, key_value_heads, head_dim) -> None:
    shape = shape_of(config_of("llama", **changes))
    assert (shape.num_heads, shape.num_key_value_heads, shape.head_dim) == (8, key_value_heads, head_dim)
    assert shape.ropes[0].inverse_frequencies.shape == (head_dim // 2,)


@pytest.mark.parametrize("family", FAMILIES[:6])
def test_transformer_config_arguments(family: str) -> None:
    kwargs = shape_of(config_of(family, rms_norm_eps=1e-4, head_dim=24)).megatron_options()
    assert (kwargs["num_query_groups"], kwargs["kv_channels"], kwargs["layernorm_epsilon"]) == (4, 24, 1e-4)
    assert kwargs["activation_func"] is torch.nn.functional.silu and kwargs["gated_linear_unit"]
    assert kwargs["add_qkv_bias"] is (family in ("qwen2", "gpt_oss"))
    assert kwargs["qk_layernorm"] is family.startswith(("qwen3", "gemma3"))


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("llama", {"hidden_act": "gelu"}, "'gelu'"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias"),
        ("phi3", {"attention_bias": True}, "attention_bias"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias"),
        ("glm4", {"hidden_act": "relu"}, "'relu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0, which transformers' Gemma 3"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0 or less"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but a layer has 4 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        (
            "smollm3",
            {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 4},
            "no_rope_layers has 2 entries for 4 layers",
        ),
        ("smollm3", {"sliding_window": 7, "layer_types": ["sliding_attention"] * 4}, "use_sliding_window is false"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "num_key_value_heads is 4, but latents are made into .* all 8 heads"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func: 'softmax'; deepseek_v3 is supported with 'sigmoid' only",
        ),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: 'greedy'; deepseek_v3"),
        ("deepseek_v3", {"topk_group": None}, "no topk_group, which deepseek_v3 needs"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq: 2; deepseek_v2 is supported with 1 only"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "no num_experts_per_tok, which deepseek_v2 needs"),
        ("deepseek_v2", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be 1 or more"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank is 0; it must be 1 or more"),
        ("glm4_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be 1 or more"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func: 'softmax'; glm4_moe is supported with 'sigmoid' only"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0; it must be 1 or more"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be 1 or more"),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be 1 or more"),
        ("deepseek_v2", {"rope_interleave": False}, "rope_interleave is false, which no deepseek_v2 model is computed with"),
        ("llama4_text", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only 0"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types has 'sliding_attention'; llama4_text"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size is None; it must be 1 or more"),
        ("llama4_text", {"floor_scale": 0}, "floor_scale is 0; with attn_temperature_tuning it must be more"),
        ("llama4_text", {"mlp_bias": True}, "mlp_bias: true; llama4_text"),
        (
            "llama4_text",
            {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 4},
            "no_rope_layers has 2 entries for 4 layers",
        ),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "sliding_attention"] * 2},
            "layer_types has 'sliding_attention'",
        ),
        (
            "qwen3_next",
            {"linear_num_value_heads": 6},
            "linear_num_value_heads is 6, which its linear_num_key_heads 4 do not",
        ),
        ("qwen3_next", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0; it must be 1 or more"),
        ("llama4_text", {"num_local_experts": 0}, "num_local_experts is 0; it must be 1 or more"),
        ("qwen3_next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0; it must be 1 or more"),
        ("qwen3_next", {"hidden_act": "gelu_pytorch_tanh"}, "'gelu_pytorch_tanh'; qwen3_next is supported with silu only"),
        ("qwen3_next", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; it must be a list"),
    ],
)
def test_what_the_layers_cannot_express_is_refused_by_name(family: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        shape_of(config_of(family, **changes))


@pytest.mark.parametrize(("family", "mscale_all_dim"), [("deepseek_v2", 0.707), ("deepseek_v3", 1.0), ("deepseek_v3", None)])
def test_yarn_s_factor_on_the_scores_is_that_of_transformers(family: str, mscale_all_dim: float | None) -> None:
    of_all = {} if mscale_all_dim is None else {"mscale": 0.707, "mscale_all_dim": mscale_all_dim}
    config = config_of(family, rope_parameters=YARN | of_all)
    with torch.device("meta"):
        attention = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    assert softmax_scale(shape_of(config)) == pytest.approx(attention.scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 4}, "multi-head latent attention"),
        ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3]}, "layers with linear attention"),
        (
            "qwen3_next",
            {"mlp_only_layers": [0, 1, 2, 3], "layer_types": ["full_attention"] * 4},
            "a gate on attention's outputs",
        ),
    ],
)
def test_a_transformer_engine_layer_or_a_megatron_checkpoint_of_what_it_lacks_is_refused(
    family: str, changes: dict[str, Any], what: str
) -> None:
    shape = shape_of(config_of(family, **changes))
    assert shape.only_local == what
    assert what in list(_reasons(shape))
    with pytest.raises(UserError, match=r"/m has .*, of which checkpoints of Megatron-core are neither"):
        refuse_other_models(shape, "/m")


@pytest.mark.parametrize("family", ["granite", "cohere", "cohere2", "llama4_text"])
def test_families_without_a_sequence_classifier_make_no_reward_models(family: str) -> None:
    with pytest.raises(UserError, match=f"transformers has no sequence classifier of {family} models"):
        with_reward_head(config_of(family), 1)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["LlamaForTokenClassification"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "mixtral"},
        {},
    ],
)
def test_an_unsupported_architecture_is_named_with_the_supported_ones(config: dict[str, Any]) -> None:
    name = (config.get("architectures") or ["none"])[0]
    with pytest.raises(UserError, match=rf"{name}.*LlamaForCausalLM, LlamaForSequenceClassification, Qwen2ForCausalLM"):
        family_of(config)


def test_a_config_dict_means_the_same_as_a_config() -> None:
    config = config_of("qwen3", tie_word_embeddings=True)
    assert family_of(config.to_dict()).name == "qwen3"
    assert logical_shapes(shape_of(config.to_dict())) == logical_shapes(shape_of(config))
    assert shape_of(config.to_dict()) == shape_of(config)
    of_dict, of_config = (shape_of(each).ropes[0].inverse_frequencies for each in (config.to_dict(), config))
    assert torch.equal(of_dict, of_config)


def test_complete_weights_pass_and_harmless_buffers_are_ignored() -> None:
    config = config_of("llama")
    source = random_source(config)
    source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    check_tensors(shape_of(config), source)


NORM, GATE = "model.norm.weight", "model.layers.2.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(NORM), r"no tensor model.norm.weight of shape \[64\]"),
        (
            lambda held: held.update({GATE: torch.zeros(96, 63)}),
            r"gate_proj.* has shape \[96, 63\].*\[96, 64\]",
        ),
        (
            lambda held: held.update({NORM: torch.zeros(64, dtype=torch.int8)}),
            "torch.int8; quantised",
        ),
        (
            lambda held: held.update({"model.layers.4.mlp.x": torch.zeros(1)}),
            "not know.*layers.4.mlp.x",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_tensor(change: Any, words: str) -> None:
    config = config_of("llama")
    source = random_source(config)
    change(source.tensors)
    with pytest.raises(UserError, match=words):
        check_tensors(shape_of(config), source)


def test_a_tied_models_saved_head_must_equal_its_embedding() -> None:
    config = config_of("qwen2", tie_word_embeddings=True)
    source = random_source(config)
    source.tensors["lm_head.weight"] = source.tensors["model.embed_tokens.weight"].clone()
    check_tensors(shape_of(config), source)
    source.tensors["lm_head.weight"][498, 63] += 1
    with pytest.raises(UserError, match="tie_word_embeddings"):
        check_tensors(shape_of(config), source)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_read_as_its_config_and_tensors(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, family, tokenizer=False)
    config = read_hf_config(tmp_path)
    check_tensors(shape_of(config), open_hf(tmp_path))
    assert config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
