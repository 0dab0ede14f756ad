"""What a model is: its sizes and the facts that decide how it is built, cut over ranks and named in files.

Read once from a Hugging Face config by `families.shape_of`; no other code works out a size from that config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F

from megadpo.model.frequencies import Rope

Head = Literal["logprobs", "reward"]
"""The vocabulary's head, for log-probs, or a scalar one, for rewards."""

QueryKeyNorm = Literal["head", "heads", "projection"]
"""What queries and keys have a norm of: each head, with one weight for all heads or with one for each; or the whole
projection, whose mean is over all heads."""

Activation = Literal["silu", "gelu_tanh"]
"""Of a gated MLP's gate; gelu_tanh is GELU by its approximation with tanh."""


@dataclass(frozen=True)
class Clamp:
    """Of an expert's gated MLP: (up + 1) * gate * sigmoid(alpha * gate), where the gate is at most `limit`, and up between
    it and its negative."""

    alpha: float
    limit: float


Fused = Literal["in_turns", "in_halves"]
"""How model files have the columns of gate and up of a layer's experts in one tensor: one of either in turns (GPT-OSS), or
all of the gate's first (Llama 4)."""


@dataclass(frozen=True)
class Routing:
    """How a router's logits become a token's experts, and what each of these counts.

    Attributes:
        score_function: of the logits, in float32: "softmax" over all experts, or "sigmoid" of each.
        renormalised: whether the chosen experts' scores are scaled to add up to 1.
        scaling_factor: what the chosen experts' scores are multiplied by, after that.
        num_groups: equal parts of the experts, one after the other.
        groups_per_token: those of them from which a token's experts are chosen.
        group_score: of a group, by which these are chosen: its best expert's score ("max", DeepSeek-V2), or the sum of its
            best two ("two_best", DeepSeek-V3).
        has_correction_bias: whether each expert has a number that is added to its score where groups and experts are chosen,
            and there only. No gradient moves it (arXiv:2408.15664).
        logits_in_float32: whether the logits are computed in float32, too; else in the model's type.
        chooses_by_logits: whether a token's experts are those of the largest logits; else of the largest scores, of which
            float32 may make equal ones where the logits are not.
        scales_inputs: whether an expert's score multiplies what the expert reads (Llama 4); else what it gives.
    """

    score_function: Literal["softmax", "sigmoid"] = "softmax"
    renormalised: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "two_best"] = "max"
    has_correction_bias: bool = False
    logits_in_float32: bool = False
    chooses_by_logits: bool = False
    scales_inputs: bool = False


@dataclass(frozen=True)
class SharedExpert:
    """A gated MLP in a mixture that every token goes through, beside the experts that it is sent to.

    Attributes:
        columns: its inner size; of several shared experts, that of all together, which are one MLP.
        name: its place in the mixture's Hugging Face names.
        has_gate: whether what it gives is multiplied by the sigmoid of one more product with the token (`NAME_gate`).
    """

    columns: int
    name: str = "shared_experts"
    has_gate: bool = False


@dataclass(frozen=True)
class Experts:
    """A model's mixtures of experts.

    Attributes:
        count: experts of a layer.
        per_token: how many of them a token goes to.
        columns: inner size of an expert's gated MLP.
        routing: how the router chooses.
        layers: global numbers of the layers that have experts; the others have a dense MLP.
        shared: beside them; None: there is none.
        block: the mixture's place in a layer's Hugging Face names.
        gate, up, down: an expert's matrices there.
        router: the router there.
        has_biases: whether the router and the experts' matrices have biases.
        clamp: in place of the model's activation; None: the experts have that.
        fused: how model files have all experts of a layer as one tensor (checkpoint/fused_experts.py); None: they do not.
    """

    count: int
    per_token: int
    columns: int
    routing: Routing
    layers: tuple[int, ...]
    shared: SharedExpert | None = None
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    has_biases: bool = False
    clamp: Clamp | None = None
    fused: Fused | None = None

    @property
    def columns_of_token(self) -> int:
        """Inner columns of all that a token goes through in a mixture."""
        return self.per_token * self.columns + self.shared_columns

    @property
    def shared_columns(self) -> int:
        """Inner size of the shared expert, 0 without."""
        return 0 if self.shared is None else self.shared.columns


@dataclass(frozen=True)
class Norms:
    """The norms of a layer, each by its name in the layer's Hugging Face tensors; None: there is none at that place.

    Attributes:
        before_attention, before_mlp: of what attention and MLP read. Without one an MLP reads what attention does in a
            parallel layer, else the residual stream as it is.
        after_attention, after_mlp: of what they give, before it is added to the residual stream.
        kind: "rms", or "layer": LayerNorm without a bias. Of the last norm and of queries and keys, too.
        adds_one: weights are stored as w where 1 + w is applied.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    kind: Literal["rms", "layer"] = "rms"
    adds_one: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name is not None)


@dataclass(frozen=True)
class Temperature:
    """What queries of layers without rope are multiplied by: 1 + strength log(1 + floor((position + 1) / floor)), positions
    counted from 0 in a token's own sequence (arXiv:2501.19399)."""

    strength: float
    floor: float


@dataclass(frozen=True)
class Latents:
    """Sizes of multi-head latent attention (model/attention/latent.py).

    Attributes:
        query_rank: columns of the queries' latent; None: they are made of hidden states.
        key_value_rank: of the one of keys and values.
        plain_dim, rope_dim: columns of a query and key head that rope does not turn, and after them those that it does,
            which all heads' keys have in common.
        value_dim: of a value head.
        norm_epsilon: of the latents' norms.
    """

    query_rank: int | None
    key_value_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    norm_epsilon: float

    @property
    def head_dim(self) -> int:
        """Columns of a query and key head."""
        return self.plain_dim + self.rope_dim


@dataclass(frozen=True)
class LinearAttention:
    """Layers whose attention is a gated delta net in place of a softmax (model/linear_attention/).

    Attributes:
        layers: their global numbers.
        num_key_heads, num_value_heads: each key head is read by num_value_heads / num_key_heads value heads.
        key_dim, value_dim: columns of a query and key head, and of a value head.
        kernel_size: tokens that the causal convolution sees, the token itself included.
    """

    layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int

    @property
    def num_convolved(self) -> int:
        """Columns of queries, keys and values together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_outputs

    @property
    def num_outputs(self) -> int:
        """Columns of all value heads, and of their gates."""
        return self.num_value_heads * self.value_dim

    @property
    def num_inputs(self) -> int:
        """Columns of all that a token is projected to: the former, gates, and each value head's rate and decay."""
        return self.num_convolved + self.num_outputs + 2 * self.num_value_heads

    def matrices(self, hidden: int) -> tuple[tuple[int, int], ...]:
        """Rows and columns of a layer's matrices as it is built, each cut evenly over the tensor ranks."""
        return (self.num_inputs, hidden), (hidden, self.num_outputs)

    @property
    def num_small(self) -> int:
        """Entries of the other parameters that are cut over the tensor ranks."""
        return self.num_convolved * self.kernel_size + 2 * self.num_value_heads


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and facts of a model.

    What has a default is as in most models: a decoder with RMSNorms before attention and before a SiLU-gated MLP.

    Attributes:
        num_key_value_heads: heads of keys and values, each read by num_heads / num_key_value_heads query heads.
        ffn_size: inner size of a dense layer's gated MLP.
        vocab_size: rows of the embedding, without those that pad it for tensor parallelism.
        max_positions: the config's max_position_embeddings.
        norm_epsilon: of every norm.
        norms: where layers have norms, and of which kind.
        is_parallel: attention and MLP read the same norm's result, and both are added to the residual stream at once.
        qkv_bias: whether the projections to queries, keys and values have biases.
        output_bias: whether attention's output projection has one.
        mlp_bias: whether the MLP's matrices have them.
        mlp_block: a dense layer's MLP in a layer's Hugging Face names.
        qk_norm: the norm of queries and keys; None: there is none.
        norms_turned: whether each head's queries and keys have a norm without a weight after rope, in layers that have rope.
        activation: of the MLP's gate.
        fuses_qkv: whether the Hugging Face tensors have queries, keys and values as one, ``qkv_proj``, one after the other.
        fuses_gate_up: whether they have gate and up as one, ``gate_up_proj``.
        embedding_multiplier: the factor on embeddings.
        embedding_module_multiplies: whether that factor is in transformers' embedding module, not behind it: it is rounded
            to the model's type, and NEFTune's noise is added to what the module gives.
        residual_multiplier: the factor on what attention and MLP give, before it is added to the residual stream.
        attention_multiplier: what scores are multiplied by before their softmax; None: 1 / sqrt(head_dim).
        logits_multiplier: the factor on the vocabulary's logits.
        logits_softcap: c, where logits x then become c tanh(x / c); None: they stay as they are.
        tied_embeddings: whether the vocabulary's head is the embedding.
        windows: for each layer, how many tokens a token attends to, itself included; None: all before it. A query at
            position i sees keys at positions j with i - window < j <= i, as in transformers 5.23.
        ropes: each layer's rotary embedding; None: it has none.
        chunks: for each layer, into how many tokens each sequences are cut there, so that a token sees those before it in
            its own part; None: into no parts. Empty: they are cut in no layer.
        temperature: of queries in layers without rope; None: they stay.
        rope_is_interleaved: columns 2 i and 2 i + 1 of a head are turned together; else i and i + half of those turned.
        experts: None of a dense model.
        head: which head the model has.
        padding_token: the config's pad_token_id, which a reward model reads.
        attention_softcap: attention's scores become softcap * tanh(score / softcap) before their softmax; None: they stay.
        attention_sinks: whether each query head has a learned number in its softmax's denominator.
        latents: what queries, keys and values are made of; None: of hidden states. With them `head_dim` is that of queries
            and keys, and values may have another (`value_dim`).
        attention_gate: whether what each head attends to is multiplied by the sigmoid of as many further columns of the
            queries' projection, which the Hugging Face tensors have behind each head's query.
        linear: the layers with linear attention; None: there are none.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_epsilon: float
    norms: Norms = Norms()
    is_parallel: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    mlp_block: str = "mlp"
    qk_norm: QueryKeyNorm | None = None
    norms_turned: bool = False
    activation: Activation = "silu"
    fuses_qkv: bool = False
    fuses_gate_up: bool = False
    embedding_multiplier: float = 1.0
    embedding_module_multiplies: bool = False
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    chunks: tuple[int | None, ...] = ()
    temperature: Temperature | None = None
    rope_is_interleaved: bool = False
    experts: Experts | None = None
    head: Head
    padding_token: int | None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    latents: Latents | None = None
    attention_gate: bool = False
    linear: LinearAttention | None = None

    def __hash__(self) -> int:
        """Of sizes alone: what there is of every layer takes long, and few shapes differ in that only."""
        return hash((self.num_layers, self.hidden_size, self.ffn_size, self.num_heads, self.vocab_size))

    @property
    def value_dim(self) -> int:
        """Columns of a value head."""
        return self.head_dim if self.latents is None else self.latents.value_dim

    @property
    def attention_matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices of a layer's softmax attention as it is built, each cut evenly over the tensor
        ranks."""
        hidden, query = self.hidden_size, self.num_heads * self.head_dim
        output = (hidden, self.num_heads * self.value_dim)
        if self.latents is None:
            gated = 2 * query if self.attention_gate else query
            return (gated + 2 * self.num_key_value_heads * self.head_dim, hidden), output
        latents, rank = self.latents, self.latents.query_rank
        queries = ((query, hidden),) if rank is None else ((rank, hidden), (query, rank))
        down = (latents.key_value_rank + latents.rope_dim, hidden)
        up = (self.num_heads * (latents.plain_dim + latents.value_dim), latents.key_value_rank)
        return *queries, down, up, output

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Global numbers of the layers with linear attention."""
        return () if self.linear is None else self.linear.layers

    @property
    def linear_matrices(self) -> tuple[tuple[int, int], ...]:
        """As `attention_matrices`, of a layer with linear attention."""
        return () if self.linear is None else self.linear.matrices(self.hidden_size)

    @property
    def attention_parameters(self) -> int:
        """Entries of the matrices of all layers' attention."""
        of_softmax, of_linear = (
            sum(rows * columns for rows, columns in matrices) for matrices in (self.attention_matrices, self.linear_matrices)
        )
        num_linear = len(self.linear_layers)
        return (self.num_layers - num_linear) * of_softmax + num_linear * of_linear

    @property
    def num_softmax_layers(self) -> int:
        """Layers whose tokens attend to each other."""
        return self.num_layers - len(self.linear_layers)

    @property
    def has_windows(self) -> bool:
        """Whether any layer's attention has a sliding window."""
        return any(window is not None for window in self.windows)

    @property
    def reaches(self) -> tuple[tuple[int | None, int | None], ...]:
        """Of each layer, its window and its chunk."""
        return tuple(zip(self.windows, self.chunks or (None,) * self.num_layers, strict=True))

    @property
    def plain_rope(self) -> Rope | None:
        """The rotary embedding of all layers, where they have the same, of whole heads in halves, for every length, and
        positions do nothing else."""
        rope = self.ropes[0]
        if rope is None or rope.by_length is not None or self.rope_is_interleaved or self.latents is not None:
            return None
        if self.norms_turned or self.temperature is not None:
            return None
        is_whole = 2 * len(rope.inverse_frequencies) == self.head_dim
        return rope if is_whole and all(other is rope for other in self.ropes) else None

    @property
    def only_local(self) -> str | None:
        """What the layers have that TransformerEngine's are not built with here, if anything."""
        neutral = Norms()
        if self.experts is not None:
            return "experts"
        if self.latents is not None:
            return "multi-head latent attention"
        if self.linear is not None:
            return "layers with linear attention"
        if self.attention_gate:
            return "a gate on attention's outputs"
        if self.norms != neutral or self.is_parallel:
            return "other norms than RMSNorms before attention and MLP"
        if self.output_bias or self.mlp_bias:
            return "biases beside those of queries, keys and values"
        return "residual multipliers" if self.residual_multiplier != 1.0 else None

    def megatron_options(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig; what it has no word for, layer_specs.py puts into the slots of layers.

        Of experts, no token is dropped, and Megatron's own load balancing is off: moe/layer.py routes.
        """
        options = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_size,
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_key_value_heads,
            "kv_channels": self.value_dim,  # what Megatron sizes the output projection by
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_epsilon,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": self.qkv_bias,
            # With it Megatron takes the weights for whole on every tensor rank, and sums their gradients.
            "qk_layernorm": self.qk_norm == "head",
            "attention_output_gate": self.attention_gate,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.experts is None:
            return options
        if self.experts.shared is not None:
            options["moe_shared_expert_intermediate_size"] = self.experts.shared.columns
            options["moe_shared_expert_gate"] = self.experts.shared.has_gate
        return options | {
            "num_moe_experts": self.experts.count,
            "moe_ffn_hidden_size": self.experts.columns,
            "moe_router_topk": self.experts.per_token,
            "moe_router_pre_softmax": True,
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": [int(layer in self.experts.layers) for layer in range(self.num_layers)],
        }


def head_work(shape: ModelShape) -> float:
    """What a row of the head costs in tokens' worth of the layers: vocabulary x hidden over a token's parameters there."""
    hidden, experts = shape.hidden_size, shape.experts
    num_expert_layers = 0 if experts is None else len(experts.layers)
    columns = (shape.num_layers - num_expert_layers) * shape.ffn_size
    columns += 0 if experts is None else num_expert_layers * experts.columns_of_token
    return hidden * shape.vocab_size / (shape.attention_parameters + 3 * hidden * columns)
