"""What Megatron-LM has to be told of a model: neither its checkpoints nor their tensors show it.

A model that Megatron-core's GPT model does not compute is refused by the field's name.

Axes: N pairs of columns that are turned together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.frequencies import Rope
from megadpo.model.shape import ModelShape, Norms, Routing

DIVISORS = tuple(1 << power for power in range(8))
"""Of ``--make-vocab-size-divisible-by``, whose default is the last."""
MOST_TENSOR_RANKS = 16


def refuse_other_models(shape: ModelShape, what: str) -> None:
    """Refuse a model that Megatron's GPT model does not compute, or whose tensors have no names there.

    Raises:
        UserError: saying what it has, by its field.
    """
    why = next(_reasons(shape), None)
    if why is not None:
        raise UserError(
            f"{what} has {why}, of which checkpoints of Megatron-core are neither read nor written; use Hugging Face's"
        )


def _reasons(shape: ModelShape) -> Iterator[str]:
    if shape.head == "reward":
        yield "a scalar head"
    if shape.norms != Norms() or shape.is_parallel or shape.qk_norm not in (None, "head"):
        yield "other norms than RMSNorms before attention and MLP, and of each head's queries and keys"
    if shape.norms_turned:
        yield "norms without a weight of queries and keys that rope has turned (use_qk_norm)"
    if shape.temperature is not None:
        yield "a temperature on queries of layers without rope (attn_temperature_tuning)"
    if shape.attention_sinks:
        yield "attention sinks"
    if shape.experts is not None and (shape.experts.has_biases or shape.experts.clamp is not None):
        yield "experts with biases"
    if shape.linear is not None:
        yield "layers with linear attention"
    if shape.attention_gate:
        yield "a gate on attention's outputs"
    if shape.latents is not None:
        yield "multi-head latent attention"
    if shape.activation != "silu":
        yield f"the activation {shape.activation} (hidden_act)"
    if shape.output_bias != shape.mlp_bias or (shape.mlp_bias and not shape.qkv_bias):
        yield "biases in some matrices only (attention_bias, mlp_bias), which Megatron-core has in all or in q, k and v"
    if shape.mlp_bias and shape.experts is not None:
        yield "biases (mlp_bias) and experts"
    if shape.experts is not None:
        yield from _routing(shape.experts.routing, shape.experts.per_token)
    yield from _factors(shape)
    yield from _ropes_and_windows(shape)


def _routing(routing: Routing, per_token: int) -> Iterator[str]:
    """Of what Megatron-core's `topk_routing_with_score_function` does otherwise."""
    if routing.scales_inputs:
        yield "experts that read what their scores multiply"
    is_softmax, is_grouped = routing.score_function == "softmax", routing.groups_per_token < routing.num_groups
    if not is_softmax and routing.renormalised != (per_token > 1):
        yield "sigmoid scores that are renormalised otherwise than where a token has several experts (norm_topk_prob)"
    if is_softmax and routing.renormalised and (per_token == 1 or is_grouped):
        yield "softmax scores renormalised for one expert a token, or with groups of experts (norm_topk_prob)"
    if is_softmax and routing.has_correction_bias:
        yield "a correction bias on softmax scores"
    if is_grouped:
        of_megatron = per_token // routing.groups_per_token
        if of_megatron != {"max": 1, "two_best": 2}[routing.group_score]:
            yield (
                f"groups of experts chosen by their {'best expert' if routing.group_score == 'max' else 'two best experts'} "
                f"(topk_group: {routing.groups_per_token}), where Megatron-core takes the sum of the best {of_megatron}"
            )


def _factors(shape: ModelShape) -> Iterator[str]:
    fields = {
        "embedding_multiplier": shape.embedding_multiplier,
        "residual_multiplier": shape.residual_multiplier,
        "logits_scaling": shape.logits_multiplier,
    }
    for name, value in fields.items():
        if value != 1.0:
            said = 1 / value if name == "logits_scaling" else value
            yield f"a factor that Megatron-core does not apply ({name}: {said:g})"
    scale = shape.attention_multiplier
    if scale is not None and not math.isclose(scale, shape.head_dim**-0.5, rel_tol=1e-6):
        yield f"another factor on attention's scores than 1 / sqrt(head_dim) (attention_multiplier: {scale:g})"
    softcaps = {"final_logit_softcapping": shape.logits_softcap, "attn_logit_softcapping": shape.attention_softcap}
    for name, cap in softcaps.items():
        if cap is not None:
            yield f"a softcap ({name}: {cap:g})"


def _ropes_and_windows(shape: ModelShape) -> Iterator[str]:
    distinct = {id(rope): rope for rope in shape.ropes if rope is not None}
    if not distinct:
        yield "no rope in any layer"
    elif len(distinct) > 1:
        yield "several ropes (rope_parameters by layer)"
    elif scaling_flags(next(iter(distinct.values()))) is None:
        yield "a rope that Megatron-core's GPT model does not have (rope_parameters: its rope_type, or factors of its own)"
    chunk = next((chunk for _, chunk in shape.reaches if chunk is not None), None)
    if chunk is not None:
        yield f"attention in chunks (attention_chunk_size: {chunk})"
    if len({window for window in shape.windows if window is not None}) > 1:
        yield "windows of several sizes (sliding_window)"


def scaling_flags(rope: Rope) -> list[str] | None:
    """Flags of what is done to a rope's frequencies; None: it is nothing that Megatron-core does.

    Megatron-core divides all frequencies by a whole number, or scales them as llama3 with the bounds of Llama 3.1
    (`RotaryEmbedding._apply_scaling`).
    """
    found_N = rope.inverse_frequencies.double()
    plain_N = 1.0 / rope.theta ** (torch.arange(len(found_N), dtype=torch.float64) / len(found_N))
    if rope.by_length is not None or rope.scaling != 1.0:
        return None
    factor = float(plain_N[-1] / found_N[-1])
    if _is_close(found_N, plain_N):
        return []
    if _is_close(found_N, plain_N / factor) and abs(factor - round(factor)) < 1e-4:
        return [f"--rotary-seq-len-interpolation-factor {round(factor)}"]
    if _is_close(found_N, llama3_frequencies(plain_N, factor)):
        return ["--use-rope-scaling", f"--rope-scaling-factor {factor:.4g}"]
    return None


def llama3_frequencies(frequencies_N: Tensor, factor: float) -> Tensor:
    """Of long wavelengths divided by `factor`, of short ones as they are, between 2048 and 8192 in between (Llama 3.1)."""
    wavelengths_N = 2 * math.pi / frequencies_N
    share_N = ((8192 / wavelengths_N - 1) / 3).clamp(0, 1)
    return share_N * frequencies_N + (1 - share_N) * frequencies_N / factor


def _is_close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=0)


def size_flags(shape: ModelShape) -> list[str]:
    """Flags of what a checkpoint's tensors show, too."""
    flags = [
        f"--num-layers {shape.num_layers}",
        f"--hidden-size {shape.hidden_size}",
        f"--ffn-hidden-size {shape.ffn_size}",
        f"--num-attention-heads {shape.num_heads}",
        f"--kv-channels {shape.head_dim}",
        f"--vocab-size {shape.vocab_size}",
    ]
    if shape.num_key_value_heads != shape.num_heads:
        flags += ["--group-query-attention", f"--num-query-groups {shape.num_key_value_heads}"]
    if not shape.tied_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if not shape.mlp_bias:
        flags += ["--disable-bias-linear", *(["--add-qkv-bias"] if shape.qkv_bias else [])]
    if shape.qk_norm is not None:
        flags.append("--qk-layernorm")
    if shape.experts is not None:
        has_experts = [int(layer in shape.experts.layers) for layer in range(shape.num_layers)]
        flags += [f"--num-experts {shape.experts.count}", f"--moe-ffn-hidden-size {shape.experts.columns}"]
        flags += [] if all(has_experts) else [f"--moe-layer-freq {_list(has_experts)}"]
        if shape.experts.shared is not None:
            flags.append(f"--moe-shared-expert-intermediate-size {shape.experts.shared.columns}")
            flags += ["--moe-shared-expert-gate"] if shape.experts.shared.has_gate else []
        flags += ["--moe-router-enable-expert-bias"] if shape.experts.routing.has_correction_bias else []
    return flags


def behaviour_flags(shape: ModelShape) -> list[str]:
    """Flags of what no tensor shows, of a model that `refuse_other_models` lets through."""
    rope = next(rope for rope in shape.ropes if rope is not None)
    flags = ["--swiglu", "--normalization RMSNorm", f"--norm-epsilon {shape.norm_epsilon:g}"]
    flags += ["--position-embedding-type rope", f"--rotary-base {rope.theta:.10g}", *(scaling_flags(rope) or [])]
    num_turned = 2 * len(rope.inverse_frequencies)
    if num_turned != shape.head_dim:
        flags.append(f"--rotary-percent {num_turned / shape.head_dim:.10g}")
    if shape.rope_is_interleaved:
        flags.append("--rotary-interleaved")
    without = [int(other is None) for other in shape.ropes]
    if any(without):
        flags.append(f"--no-rope-freq {_list(without)}")
    window = next((window for window in shape.windows if window is not None), None)
    if window is not None:
        is_local = [int(other is not None) for other in shape.windows]
        flags.append(f"--window-size {window - 1},0")
        flags += [] if all(is_local) else [f"--window-attn-skip-freq {_list(is_local)}"]
    if shape.experts is not None:
        flags += [f"--moe-router-topk {shape.experts.per_token}", *_routing_flags(shape.experts.routing)]
    return flags


def _routing_flags(routing: Routing) -> Iterator[str]:
    if routing.score_function == "sigmoid":
        yield "--moe-router-score-function sigmoid"
    elif not routing.renormalised:
        yield "--moe-router-pre-softmax"
    if routing.groups_per_token < routing.num_groups:
        yield f"--moe-router-num-groups {routing.num_groups} --moe-router-group-topk {routing.groups_per_token}"
    if routing.scaling_factor != 1.0:
        yield f"--moe-router-topk-scaling-factor {routing.scaling_factor:g}"
    if routing.logits_in_float32:
        yield "--moe-router-dtype fp32"


def _list(values: list[int]) -> str:
    return f'"[{",".join(map(str, values))}]"'


def is_padded(num_rows: int, vocab_size: int) -> bool:
    """Whether Megatron makes so many rows of a vocabulary: the next multiple of ``--make-vocab-size-divisible-by`` times the
    tensor ranks."""
    multiples = {divisor * ranks for divisor in DIVISORS for ranks in range(1, MOST_TENSOR_RANKS + 1)}
    return any(num_rows == -(-vocab_size // multiple) * multiple for multiple in multiples)
