"""What a step has to compute, and what a card's matrix products can do in dense bf16: their quotient is MFU.

Counted are the products of the model's own tokens: 2 FLOP a parameter forward, 4 backward, 2 for a live reference; each
prompt once for all its responses, no credit for recomputation, for the optimizer or for padding. Attention counts the
query-key pairs that the mask lets through, linear attention what its definition does with a head's state, the head scored
tokens only, a mixture the experts that a token goes to. Frozen
weights need no gradient: with adapters these products cost 2 backward, and the adapters' own are added.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from megadpo.data.batches.bin_packing import FloatArray, IntArray, attention_pairs
from megadpo.data.store import GroupStore
from megadpo.model.adapters.spec import AdapterSpec, all_shapes
from megadpo.model.families.common import EMBEDDING, HEAD, SCORE
from megadpo.model.shape import ModelShape

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB300|B300", 2500),
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"B100", 1750),
    (r"GH200|H200 NVL|H200", 989),
    (r"H100 NVL", 835),
    (r"H100 PCIe", 756),
    (r"H100|H800", 989),
    (r"H20\b", 148),
    (r"A100|A800", 312),
    (r"A40\b", 149.7),
    (r"A30\b", 165),
    (r"A10G\b", 70),
    (r"A10\b", 125),
    (r"L40S", 362),
    (r"L40\b", 181),
    (r"L4\b", 121),
    (r"RTX 6000 Ada", 364),
    (r"RTX A6000", 154.8),
    (r"RTX PRO 6000", 503.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 4080", 97.5),
    (r"RTX 3090", 71),
    (r"MI355X", 2500),
    (r"MI325X|MI300X", 1307),
    (r"MI250X", 383),
    (r"MI210", 181),
)
"""A pattern in `torch.cuda.get_device_name`, TFLOP/s of products in dense bf16 that are added up in fp32 (makers' data
sheets). The first that is found counts."""


def peak_flop(device_name: str) -> float | None:
    """FLOP a second of a card's products in dense bf16, or None where it is not known."""
    for pattern, tflops in PEAK_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?!\d)", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


def forward_flop(
    num_tokens: float, num_scored: float, num_attended: float, body_parameters: float, head_parameters: float, width: float
) -> float:
    """FLOP of a forward pass.

    Args:
        num_scored: tokens that the head sees.
        num_attended: query-key pairs.
        body_parameters: that a token meets, without embedding and head.
        width: of all queries, added up over the layers that attend to these pairs.
    """
    # Scores and weighted values: 2 FLOP each a pair and channel.
    return 2 * body_parameters * num_tokens + 2 * head_parameters * num_scored + 4 * width * num_attended


def attention_width(shape: ModelShape) -> float:
    """Of a layer's queries; the mean of these and the values where they differ."""
    return shape.num_heads * (shape.head_dim + shape.value_dim) / 2


def softmax_reaches(shape: ModelShape) -> list[tuple[int | None, int | None]]:
    """Window and chunk of the layers whose tokens attend to each other."""
    return [reach for layer, reach in enumerate(shape.reaches) if layer not in shape.linear_layers]


def linear_attention_flop(shape: ModelShape) -> float:
    """Of a token, in the layers with linear attention, beside the products with their matrices: the convolution, and the
    definition of the delta rule (what the state has at the key, the update, what it has at the query)."""
    linear = shape.linear
    if linear is None:
        return 0.0
    of_layer = 2 * linear.kernel_size * linear.num_convolved + 6 * linear.key_dim * linear.num_outputs
    return len(linear.layers) * float(of_layer)


def body_parameters(shape: ModelShape) -> int:
    """Entries of the matrices of all layers that a token meets."""
    hidden, experts = shape.hidden_size, shape.experts
    num_mixtures = 0 if experts is None else len(experts.layers)
    total = shape.attention_parameters + (shape.num_layers - num_mixtures) * 3 * hidden * shape.ffn_size
    if experts is not None:
        has_gate = experts.shared is not None and experts.shared.has_gate
        total += num_mixtures * (3 * hidden * experts.columns_of_token + hidden * (experts.count + has_gate))
    return total


def head_parameters(shape: ModelShape) -> int:
    """Entries of the head, which a scored token meets."""
    return shape.hidden_size * (shape.vocab_size if shape.head == "logprobs" else 1)


@dataclass(frozen=True)
class AdapterWork:
    """What is trained in place of a model's own parameters, as products.

    Attributes:
        body, head: entries of the adapters' A and B that a token meets (of experts' adapters those of the experts that it
            goes to; of an embedding's B alone), and of the head's that a scored token meets.
        has_whole_head: whether the head is trained whole. Of the other modules that are, the embedding and norms, none is a
            product.
    """

    body: float
    head: float
    has_whole_head: bool

    @staticmethod
    def of(shape: ModelShape, adapter: AdapterSpec) -> AdapterWork:
        """Of the adapters of a model of this shape."""
        shapes, experts = all_shapes(shape), shape.experts
        body = head = 0.0
        for module in adapter.modules:
            size = adapter.rank_of(module) * sum(shapes[f"{module}.weight"])
            if f"{module}.weight" == HEAD:
                head += size
            elif f"{module}.weight" == EMBEDDING:
                body += adapter.rank_of(module) * shape.hidden_size
            elif ".experts." in module and experts is not None:
                body += size * experts.per_token / experts.count
            else:
                body += size
        heads = [HEAD, SCORE, *([EMBEDDING] if shape.tied_embeddings else [])]
        return AdapterWork(body, head, any(f"{module}.weight" in heads for module in adapter.modules_to_save))


def training_flop(
    shape: ModelShape, num_tokens: float, num_scored: float, attention: float, adapter: AdapterWork | None
) -> float:
    """FLOP of the policy's forward and backward passes.

    Args:
        attention: FLOP of the forward pass's attention.
        adapter: what is trained in place of the model's own parameters; None: those are.
    """
    body, head = 2 * body_parameters(shape) * num_tokens, 2 * head_parameters(shape) * num_scored
    if adapter is None:
        return 3 * (body + head + attention)
    own = 6 * (adapter.body * num_tokens + adapter.head * num_scored)
    return 2 * body + (3 if adapter.has_whole_head else 2) * head + 3 * attention + own


@dataclass(frozen=True)
class Work:
    """What every group of a data set costs.

    Attributes:
        num_tokens_G, num_scored_G: tokens of its stream with its prompt once, and of its responses.
        attended_G: for each kind of layer, by its window and chunk, the query-key pairs.
    """

    num_tokens_G: IntArray
    num_scored_G: IntArray
    attended_G: dict[tuple[int | None, int | None], FloatArray]

    @staticmethod
    def of(groups: GroupStore, *shapes: ModelShape) -> Work:
        """Of these groups, for models of these shapes."""
        columns = groups.columns
        starts = np.asarray(columns.segment_offsets_S)
        first = np.asarray(columns.group_segments_G)
        num_scored_G = starts[first[1:]] - starts[first[:-1] + columns.num_prompts_G]
        reaches = {reach for shape in shapes for reach in softmax_reaches(shape)}
        attended_G = {reach: attention_pairs(groups, True, *reach) for reach in reaches}
        return Work(groups.num_tokens(True), num_scored_G, attended_G)

    def forward(self, shape: ModelShape, group_ids: IntArray) -> tuple[float, float]:
        """FLOP of products with weights, and of attention, of a forward pass on these groups."""
        tokens, scored = self._tokens(group_ids)
        products = forward_flop(tokens, scored, 0, body_parameters(shape), head_parameters(shape), 0)
        attention = tokens * linear_attention_flop(shape)
        for reach, num_layers in Counter(softmax_reaches(shape)).items():
            width = num_layers * attention_width(shape)
            attention += forward_flop(0, 0, float(self.attended_G[reach][group_ids].sum()), 0, 0, width)
        return products, attention

    def _tokens(self, group_ids: IntArray) -> tuple[float, float]:
        """Of these groups: all, and those that are scored."""
        return float(self.num_tokens_G[group_ids].sum()), float(self.num_scored_G[group_ids].sum())

    def step(
        self, policy: ModelShape, reference: ModelShape | None, group_ids: IntArray, adapter: AdapterWork | None
    ) -> float:
        """FLOP of an optimizer step.

        Args:
            reference: that of a reference that runs in the step.
            adapter: what is trained in place of the model's own parameters; None: those are.
        """
        _, attention = self.forward(policy, group_ids)
        total = training_flop(policy, *self._tokens(group_ids), attention, adapter)
        return total + (0 if reference is None else sum(self.forward(reference, group_ids)))
