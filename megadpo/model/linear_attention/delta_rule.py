"""The gated delta rule (arXiv:2412.06464) over a packed stream, by chunks, in torch's operations.

A head's state S [K, V] goes from token to token, with the decay e^g, the rate b, the key k and the value v of each:
S <- e^g S, then S <- S + k (b (v - S^T k))^T; the token's output is S^T q / sqrt(K). Queries and keys have length 1.

Within a chunk the rates' terms depend on each other by a triangular system of C equations, whose solution turns its tokens
into a few products (arXiv:2406.06484); between chunks the state is handed on. transformers computes the same in
`torch_chunk_gated_delta_rule`, of one sequence.

Axes: T stream tokens, N chunks, C tokens of a chunk, G key heads, R value heads that read each of them, H = G R value heads,
K columns of a query and key head, V of a value head.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megadpo.model.linear_attention.by_inputs import keeping_inputs
from megadpo.model.linear_attention.chunks import Chunks

LENGTH_EPSILON = 1e-6
"""Added to squared lengths, as in transformers and fla."""


def gated_delta_rule(
    query_TGK: Tensor, key_TGK: Tensor, value_THV: Tensor, log_decay_TH: Tensor, rate_TH: Tensor, chunks: Chunks
) -> Tensor:
    """[T, H, V] in the type of `value_THV`; computed in float32, or float64 where the inputs are.

    Args:
        query_TGK, key_TGK: of any length.
        log_decay_TH: g, at most 0.
        rate_TH: b, between 0 and 1.
    """
    rule = functools.partial(_outputs, chunks=chunks)
    return keeping_inputs(rule, query_TGK, key_TGK, value_THV, log_decay_TH, rate_TH)


def _outputs(
    query_TGK: Tensor, key_TGK: Tensor, value_THV: Tensor, log_decay_TH: Tensor, rate_TH: Tensor, chunks: Chunks
) -> Tensor:
    wide, num_key_heads = torch.promote_types(value_THV.dtype, torch.float32), query_TGK.shape[1]

    def in_chunks(x: Tensor) -> Tensor:
        """[N, heads, C, ...], from [T, heads, ...]; zero where a chunk has no token: such a one changes no state."""
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])]).to(wide)
        rows = padded.index_select(0, chunks.tokens_NC.flatten())
        return rows.unflatten(0, chunks.tokens_NC.shape).transpose(1, 2)

    def by_key_head(x: Tensor) -> Tensor:
        """[N, G, R, ...], from [N, H, ...]."""
        return x.unflatten(1, (num_key_heads, -1))

    query, key = (in_chunks(_of_length_1(x.to(wide))).unsqueeze(2) for x in (query_TGK, key_TGK))
    query = query * query.shape[-1] ** -0.5
    value, log_decay, rate = (by_key_head(in_chunks(x)) for x in (value_THV, log_decay_TH, rate_TH))
    # From the chunk's beginning up to each token, its own included: in float64, as differences of large sums follow.
    decay_to = log_decay.double().cumsum(-1)
    between, to_token, to_end = _decay_between(decay_to).to(wide), decay_to.exp().to(wide), _decay_to_end(decay_to).to(wide)
    system = rate.unsqueeze(-1) * (key @ key.mT) * between
    scores = (query @ key.mT) * between
    # Both right sides at once: what values would be written, and what the state at the chunk's beginning takes off them.
    sides = torch.cat([rate.unsqueeze(-1) * value, (rate * to_token).unsqueeze(-1) * key], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    written, taken = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    reading = query * to_token.unsqueeze(-1)
    writing = key * to_end.unsqueeze(-1)
    outputs = _by_steps(written, taken, scores, reading, writing, to_token[..., -1], chunks)
    rows = outputs.flatten(1, 2).transpose(1, 2).flatten(0, 1)
    return rows.index_select(0, chunks.place_T).to(value_THV.dtype)


def _by_steps(
    written: Tensor, taken: Tensor, scores: Tensor, reading: Tensor, writing: Tensor, decay: Tensor, chunks: Chunks
) -> Tensor:
    """Outputs [N, G, R, C, V] of all chunks, the states [.., G, R, K, V] going from step to step."""
    outputs: list[Tensor] = []
    state: Tensor | None = None
    of_steps = (x.split(list(chunks.steps)) for x in (written, taken, scores, reading, writing, decay))
    for step, (new, old, score, read, write, decayed) in enumerate(zip(*of_steps, strict=True)):
        if state is None:
            output = score @ new
        else:
            state = state.index_select(0, chunks.before[step - 1])
            new = new - old @ state
            output = read @ state + score @ new
            state = state * decayed[..., None, None]
        outputs.append(output)
        if step + 1 < len(chunks.steps):
            added = write.mT @ new
            state = added if state is None else state + added
    return torch.cat(outputs)


def _decay_between(decay_to: Tensor) -> Tensor:
    """[..., C, C]: from the second token up to the first one; 0 where that comes before it."""
    difference = decay_to.unsqueeze(-1) - decay_to.unsqueeze(-2)
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(later, float("-inf")).exp()


def _decay_to_end(decay_to: Tensor) -> Tensor:
    """[..., C]: from each token up to the chunk's end."""
    return (decay_to[..., -1:] - decay_to).exp()


def _of_length_1(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + LENGTH_EPSILON)
