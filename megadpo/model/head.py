"""From hidden states to token log-probs: projection and log-softmax as one operation over tiles of tokens.

Only scored positions (the ones a completion token follows) are projected, `TILE_ROWS` at a time, with the vocabulary
sharded over tensor ranks. The full logits never exist; the backward pass computes each tile again.

Axes: T stream tokens, N scored positions, H hidden, V this rank's vocabulary rows (padding included), S statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megadpo.data.micro_batch import MicroBatch

TILE_ROWS = 256
"""Scored positions projected at once: memory is O(TILE_ROWS x V), whatever N."""

TOKEN_STATISTICS = ("logp", "entropy", "correct", "mean_logit", "log_square")
"""Columns of the head's output: log-prob of the target, entropy of the distribution, 1 where the target has the
largest logit, the mean of the logits over the (unpadded) vocabulary, and the log of the sum of squared probabilities."""


class LogProbHead(torch.nn.Module):
    """GPTModel's output layer: hidden [T, 1, H] -> statistics [N, 1, S], float32; only "logp" carries a gradient.

    The only reader of the output matrix, forward and backward; `weight` is None where it is tied to an embedding on
    the same stage, which GPTModel then hands to `forward`.
    """

    def __init__(self, weight: torch.nn.Parameter | None, vocab_size: int, sequence_parallel: bool) -> None:
        """`vocab_size` is the model's own, without the rows that pad it for tensor parallelism."""
        super().__init__()
        self.weight = weight
        self.vocab_size = vocab_size
        self.sequence_parallel = sequence_parallel
        self.micro_batch: MicroBatch | None = None

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:
        assert self.micro_batch is not None, "set micro_batch before the model's forward"
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        held = self.micro_batch.held
        scored_NH = hidden.squeeze(1).index_select(0, held.scored_N)
        matrix_VH = self.weight if weight is None else weight
        assert matrix_VH is not None
        first_row = parallel_state.get_tensor_model_parallel_rank() * matrix_VH.shape[0]
        num_real_rows = max(0, min(self.vocab_size - first_row, matrix_VH.shape[0]))
        statistics_NS = _TokenStatistics.apply(
            scored_NH,
            matrix_VH,
            held.targets_N - first_row,
            num_real_rows,
            self.vocab_size,
            parallel_state.get_tensor_model_parallel_group(),
        )
        return statistics_NS.unsqueeze(1), None


class _TokenStatistics(torch.autograd.Function):
    """Statistics of the next-token distribution at N positions, vocabulary-parallel; see TOKEN_STATISTICS."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        matrix_VH: Tensor,
        local_targets_N: Tensor,
        num_real_rows: int,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        statistics_NS = hidden_NH.new_empty((len(hidden_NH), len(TOKEN_STATISTICS)), dtype=torch.float32)
        log_normaliser_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
        for rows in _tiles(len(hidden_NH)):
            # No name for the tile's logits: it would keep them alive while the next tile is made.
            statistics_NS[rows], log_normaliser_N[rows] = _tile_statistics(
                _tile_logits(hidden_NH[rows], matrix_VH, num_real_rows),
                local_targets_N[rows],
                num_real_rows,
                vocab_size,
                group,
            )
        ctx.save_for_backward(hidden_NH, matrix_VH, local_targets_N, log_normaliser_N)
        ctx.num_real_rows = num_real_rows
        return statistics_NS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """d logp / d logits = onehot(target) - softmax; the other statistics are for reading only."""
        hidden_NH, matrix_VH, local_targets_N, log_normaliser_N = ctx.saved_tensors
        gradient_N = gradients[0][:, 0]
        hidden_gradient_NH = torch.empty_like(hidden_NH)
        matrix_gradient_VH = torch.zeros_like(matrix_VH, dtype=torch.float32)
        for rows in _tiles(len(hidden_NH)):
            gradient = _tile_gradient(
                _tile_logits(hidden_NH[rows], matrix_VH, ctx.num_real_rows),
                log_normaliser_N[rows],
                gradient_N[rows],
                local_targets_N[rows],
                ctx.num_real_rows,
            ).to(matrix_VH.dtype)
            torch.mm(gradient, matrix_VH[: ctx.num_real_rows], out=hidden_gradient_NH[rows])
            _add_product(matrix_gradient_VH[: ctx.num_real_rows], gradient.t(), hidden_NH[rows])
            del gradient
        return hidden_gradient_NH, matrix_gradient_VH.to(matrix_VH.dtype), None, None, None, None


def _tile_gradient(
    logits: Tensor, log_normalisers: Tensor, gradients: Tensor, local_targets: Tensor, num_real_rows: int
) -> Tensor:
    """d loss / d logits of a tile, in the memory of its logits."""
    gradient = logits.sub_(log_normalisers[:, None]).exp_().mul_(-gradients[:, None])
    here, column = _target_columns(local_targets, num_real_rows)
    gradient[here, column] += gradients[here]
    return gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in fp32, without a product-sized temporary where the operands are fp32 too."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    else:
        total += left @ right


def _tiles(num_rows: int) -> list[slice]:
    return [slice(start, min(start + TILE_ROWS, num_rows)) for start in range(0, num_rows, TILE_ROWS)]


def _tile_logits(hidden: Tensor, matrix: Tensor, num_real_rows: int) -> Tensor:
    """float32 logits of the vocabulary rows that are no padding."""
    return (hidden @ matrix[:num_real_rows].t()).float()


def _target_columns(local_targets: Tensor, num_real_rows: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this rank's part of the vocabulary, and in which columns."""
    here = ((local_targets >= 0) & (local_targets < num_real_rows)).nonzero().squeeze(1)
    return here, local_targets[here]


def _tile_statistics(
    logits: Tensor, local_targets: Tensor, num_real_rows: int, vocab_size: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """One maximum and one sum over the tensor ranks give a tile's statistics [rows, S] and log-normalisers [rows]."""
    maximum = logits.amax(-1) if num_real_rows else logits.new_full((len(logits),), -torch.inf)
    _reduce(maximum, dist.ReduceOp.MAX, group)
    here, column = _target_columns(local_targets, num_real_rows)
    # Summed over ranks: exp, exp * shifted logit, shifted logit, target's shifted logit, exp squared.
    sums = logits.new_zeros((5, len(logits)))
    if num_real_rows:
        # One temporary the size of the tile and no more: this is where the memory of a long batch would go.
        shifted = logits.sub_(maximum[:, None])
        sums[2] = shifted.sum(-1)
        sums[3, here] = shifted[here, column]
        exponentials = shifted.exp()
        sums[0] = exponentials.sum(-1)
        sums[4] = torch.bmm(exponentials[:, None], exponentials[:, :, None]).flatten()
        sums[1] = exponentials.mul_(shifted).sum(-1)
    _reduce(sums, dist.ReduceOp.SUM, group)
    log_sum = sums[0].log()
    statistics = torch.stack(
        [
            sums[3] - log_sum,
            log_sum - sums[1] / sums[0],
            (sums[3] == 0).float(),
            sums[2] / vocab_size + maximum,
            sums[4].log() - 2 * log_sum,
        ],
        dim=-1,
    )
    return statistics, maximum + log_sum


def _reduce(values: Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=operation, group=group)
