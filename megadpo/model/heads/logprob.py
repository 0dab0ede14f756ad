"""From hidden states to token log-probs: projection and log-softmax as one operation over tiles of tokens.

Only scored positions (the ones a completion token follows) are projected, a tile of them at a time, with the vocabulary
sharded over tensor ranks. One buffer of `tile_bytes` holds every tile in turn: logits going forward, and going backward the
gradient in their place. The last tile stays in it between the two passes; the others are computed again.

With an adapter, a second, narrow product is added to each tile (adapters/vocabulary.py). A model's factor on its logits is
one on the hidden states; a softcap bends each tile once it is there.

Axes: T stream tokens, N scored positions, H hidden, V this rank's vocabulary rows (padding included), S statistics, P parts
(kernels.PARTS), R the rank of an adapter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megadpo.model.adapters.linear import OFF, AdapterSwitch
from megadpo.model.adapters.vocabulary import VocabularyAdapter
from megadpo.model.heads.base import StreamHead
from megadpo.model.heads.kernels import PARTS, Kernels, head_kernels, slices
from megadpo.model.heads.tile import CPU_TILE_BYTES, CUDA_TILE_SHARE, TILE_ROWS

TOKEN_STATISTICS = ("logp", "entropy", "correct", "mean_logit", "log_square")
"""Columns of the head's output: log-prob of the target, entropy of the distribution, 1 where the target has the
largest logit, the mean of the logits over the (unpadded) vocabulary, and the log of the sum of squared probabilities.
From the second on they are the last columns of `statistics.RESPONSE_SUMS`, in the same order."""

GradientBuffer = Callable[[Tensor], Tensor | None]
"""A parameter -> where its gradient may be added up in place (its shape, its dtype or float32), or None: hand it to
autograd. See Engine.gradient_buffer."""


def through_autograd(parameter: Tensor) -> None:
    """The gradient buffer of a head without an engine: there is none."""
    return None


class LogProbHead(StreamHead):
    """GPTModel's output layer: hidden [T, 1, H] -> statistics [N, 1, S], float32; only "logp" carries a gradient.

    GPTModel turns what its output layer gives around: the model's output is [1, N, S].

    The only reader of the output matrix, forward and backward; `weight` is None where it is tied to an embedding on
    the same stage, which GPTModel then hands to `forward`.

    Attributes:
        statistics: those of TOKEN_STATISTICS that are computed; the columns of the others are zeros.
        gradient_buffer: where the gradient of the output matrix (or of an adapter's B) is added up.
        adapters: by the state of `adapter_switch`; none in most models.
    """

    adapters: Mapping[str, VocabularyAdapter] = MappingProxyType({})
    adapter_switch: AdapterSwitch | None = None

    def __init__(
        self,
        weight: torch.nn.Parameter | None,
        vocab_size: int,
        sequence_parallel: bool,
        multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        """`vocab_size` is the model's own, without the rows that pad it for tensor parallelism.

        Logits are `multiplier` times the product with the matrix; with `softcap` c, they are c tanh of them over c.
        """
        super().__init__()
        self.multiplier, self.softcap = multiplier, softcap
        self.weight = weight
        self.vocab_size = vocab_size
        self.sequence_parallel = sequence_parallel
        self.statistics: Collection[str] = TOKEN_STATISTICS
        self.gradient_buffer: GradientBuffer = through_autograd

    def configure(self, statistics: Collection[str] | None = None, gradient_buffer: GradientBuffer | None = None) -> None:
        """Set what is computed and where the matrix gradient is added up; None leaves either as it is.

        Until it is called, all of TOKEN_STATISTICS are computed and the gradient goes through autograd.
        """
        if statistics is not None:
            self.statistics = statistics
        if gradient_buffer is not None:
            self.gradient_buffer = gradient_buffer

    def use_adapter(self, state: str, adapter: VocabularyAdapter, switch: AdapterSwitch) -> None:
        """Compute with `adapter` where the switch is turned to `state`."""
        self.adapters, self.adapter_switch = {**self.adapters, state: adapter}, switch

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:
        held = self.micro_batch.local
        low_NR, b_VR = self._low_rank(hidden, held.scored_N)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        scored_NH = hidden.squeeze(1).index_select(0, held.scored_N)
        if self.multiplier != 1.0:
            scored_NH, low_NR = scored_NH * self.multiplier, None if low_NR is None else low_NR * self.multiplier
        matrix_VH = self.weight if weight is None else weight
        assert matrix_VH is not None
        first_row = parallel_state.get_tensor_model_parallel_rank() * matrix_VH.shape[0]
        job = _Job(
            num_real_rows=max(0, min(self.vocab_size - first_row, matrix_VH.shape[0])),
            vocab_size=self.vocab_size,
            statistics=self.statistics,
            softcap=self.softcap,
            group=parallel_state.get_tensor_model_parallel_group(),
            gradient_buffer=self.gradient_buffer,
            keeps_tile=torch.is_grad_enabled()
            and any(each is not None and each.requires_grad for each in (scored_NH, matrix_VH, low_NR)),
        )
        statistics_NS = _TokenStatistics.apply(scored_NH, matrix_VH, low_NR, b_VR, held.targets_N - first_row, job)
        return statistics_NS.unsqueeze(1), None

    def _low_rank(self, hidden: Tensor, scored_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The factors [N, R] and [V, R] of what the adapter that is turned on adds to the logits."""
        state = OFF if self.adapter_switch is None else self.adapter_switch.state
        if state not in self.adapters:
            return None, None
        adapter = self.adapters[state]
        return adapter.low_NR(self, hidden, scored_N), adapter.b(self)


@dataclass(frozen=True)
class _Job:
    """What `_TokenStatistics` takes besides its tensors.

    Attributes:
        num_real_rows: rows of this rank's matrix that are no padding.
        vocab_size: real rows of all ranks.
        statistics, softcap, gradient_buffer: as in LogProbHead.
        group: the tensor ranks, which share the matrix.
        keeps_tile: whether a backward will follow.
    """

    num_real_rows: int
    vocab_size: int
    statistics: Collection[str]
    softcap: float | None
    group: dist.ProcessGroup
    gradient_buffer: GradientBuffer
    keeps_tile: bool

    def tiles(self, hidden_NH: Tensor) -> list[slice]:
        """Rows of each tile; all are full but the first, so that the one that is kept is as large as can be."""
        num_rows = len(hidden_NH)
        row_bytes = max(1, self.num_real_rows) * hidden_NH.element_size()
        length = max(1, min(num_rows, TILE_ROWS, tile_bytes(hidden_NH.device) // row_bytes))
        first = num_rows % length
        bounds = ([0] if first else []) + list(range(first, num_rows + 1, length))
        return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def tile_bytes(device: torch.device) -> int:
    """Most memory of a tile's logits (or one row's, if that is more)."""
    if device.type != "cuda":
        return CPU_TILE_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // CUDA_TILE_SHARE


class _TokenStatistics(torch.autograd.Function):
    """Statistics of the next-token distribution at N positions, vocabulary-parallel; see TOKEN_STATISTICS."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        matrix_VH: Tensor,
        low_NR: Tensor | None,
        b_VR: Tensor | None,
        local_targets_N: Tensor,
        job: _Job,
    ) -> Tensor:
        kernels, tiles = head_kernels(hidden_NH.device), job.tiles(hidden_NH)
        parts_NP = hidden_NH.new_empty((len(hidden_NH), len(PARTS)), dtype=torch.float32)
        buffer = _new_buffer(tiles, hidden_NH, job)
        for rows in tiles:
            logits = _tile_logits(rows, hidden_NH, matrix_VH, low_NR, b_VR, buffer, job.softcap)
            kernels.parts(logits, local_targets_N[rows], job.statistics, parts_NP[rows])
        statistics_NS, log_normaliser_N = _statistics(parts_NP, job)
        ctx.save_for_backward(hidden_NH, low_NR, local_targets_N, log_normaliser_N)
        # Not saved with them: hooks on saved tensors hand out another one, which the engine does not know.
        ctx.matrix_VH, ctx.b_VR = matrix_VH, b_VR
        ctx.job, ctx.buffer = job, buffer if job.keeps_tile else None
        return statistics_NS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d logp / d logits = onehot(target) - softmax; the other statistics are for reading only."""
        hidden_NH, low_NR, local_targets_N, log_normaliser_N = ctx.saved_tensors
        matrix_VH, b_VR, job = ctx.matrix_VH, ctx.b_VR, ctx.job
        kernels, tiles = head_kernels(hidden_NH.device), job.tiles(hidden_NH)
        is_kept, buffer = ctx.buffer is not None, ctx.buffer
        ctx.buffer = None  # freed with this call, and overwritten in it
        if buffer is None:
            buffer = _new_buffer(tiles, hidden_NH, job)
        needs_hidden, needs_matrix, needs_low, needs_b = ctx.needs_input_grad[:4]
        hidden_gradient_NH = torch.empty_like(hidden_NH) if needs_hidden else None
        matrix_gradient = _MatrixGradient(matrix_VH, job, num_parts=len(tiles)) if needs_matrix else None
        low_gradient_NR = torch.empty_like(low_NR) if needs_low else None
        b_gradient = _MatrixGradient(b_VR, job, num_parts=len(tiles)) if needs_b else None
        for rows in reversed(tiles):
            if is_kept and rows is tiles[-1]:
                tile = buffer[: rows.stop - rows.start]
            else:
                tile = _tile_logits(rows, hidden_NH, matrix_VH, low_NR, b_VR, buffer, job.softcap)
            of_rows = (local_targets_N[rows], log_normaliser_N[rows], gradients[0][rows, 0])
            if job.softcap is None:
                kernels.gradient_(tile, *of_rows)
            else:
                _capped_gradient_(kernels, tile, *of_rows, job.softcap)
            if hidden_gradient_NH is not None:
                torch.mm(tile, matrix_VH[: job.num_real_rows], out=hidden_gradient_NH[rows])
            if matrix_gradient is not None:
                matrix_gradient.add(tile, hidden_NH[rows])
            if low_gradient_NR is not None:
                torch.mm(tile, b_VR[: job.num_real_rows], out=low_gradient_NR[rows])
            if b_gradient is not None:
                b_gradient.add(tile, low_NR[rows])
        whole, low = (each.for_autograd() if each else None for each in (matrix_gradient, b_gradient))
        return hidden_gradient_NH, whole, low_gradient_NR, low, None, None


def _new_buffer(tiles: list[slice], hidden_NH: Tensor, job: _Job) -> Tensor:
    num_rows = tiles[-1].stop - tiles[-1].start if tiles else 0
    return hidden_NH.new_empty((num_rows, job.num_real_rows))


def _tile_logits(
    rows: slice,
    hidden_NH: Tensor,
    matrix_VH: Tensor,
    low_NR: Tensor | None,
    b_VR: Tensor | None,
    buffer: Tensor,
    softcap: float | None,
) -> Tensor:
    """Logits of the vocabulary rows that are no padding, in the buffer."""
    num_columns = buffer.shape[1]
    logits = torch.mm(hidden_NH[rows], matrix_VH[:num_columns].t(), out=buffer[: rows.stop - rows.start])
    if low_NR is not None and b_VR is not None:
        logits.addmm_(low_NR[rows], b_VR[:num_columns].t())
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _capped_gradient_(
    kernels: Kernels, tile: Tensor, targets_N: Tensor, log_normaliser_N: Tensor, gradient_N: Tensor, softcap: float
) -> None:
    """`Kernels.gradient_` with respect to the logits before their cap, some rows at a time: d c tanh(x / c) / dx is
    1 - (y / c)^2, of what the cap gave."""
    for rows in slices(tile):
        slope = 1 - (tile[rows].float() / softcap).square_()
        of_rows = (targets_N[rows].contiguous(), log_normaliser_N[rows], gradient_N[rows])
        kernels.gradient_(tile[rows], *of_rows)
        tile[rows] = (tile[rows].float() * slope).to(tile.dtype)


class _MatrixGradient:
    """The sum of the tiles' gradient.t() @ hidden (of an adapter's B: @ low): in the engine's buffer where it has one, else
    in a tensor for autograd.

    The latter is float32 where there are several tiles to add up. Padded rows get none: zeros for autograd.
    """

    def __init__(self, matrix_VH: Tensor, job: _Job, num_parts: int) -> None:
        self.num_real_rows, self.dtype = job.num_real_rows, matrix_VH.dtype
        total = job.gradient_buffer(matrix_VH)
        self.is_engines = total is not None
        if total is None:
            total = torch.empty_like(matrix_VH, dtype=torch.float32 if num_parts > 1 else None)
            # The rest is written, not added to, by the first tile.
            total[job.num_real_rows if num_parts else 0 :].zero_()
        self.total_VH = total
        self.is_empty = not self.is_engines

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        real = self.total_VH[: self.num_real_rows]
        add_product(real, gradient.t(), hidden, beta=0 if self.is_empty else 1)
        self.is_empty = False

    def for_autograd(self) -> Tensor | None:
        return None if self.is_engines else self.total_VH.to(self.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, beta: int = 1) -> None:
    """total = beta total + left @ right; where total is float32 and the operands are not, only in slices a temporary."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif adds_in_one_call(total.device, left.dtype):
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        length = max(1, 2**22 // max(1, total.shape[1]))
        for start in range(0, len(total), length):
            rows = slice(start, start + length)
            if beta == 0:
                total[rows] = left[rows] @ right
            else:
                total[rows] += left[rows] @ right


@functools.cache
def adds_in_one_call(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of matrices of `dtype` to a float32 one (of bfloat16: CUDA, from 2.9 or so on)."""
    if dtype is torch.float32:
        return True
    small = torch.zeros((16, 16), dtype=dtype, device=device)
    total = small.float()
    try:
        torch.addmm(total, small, small, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _statistics(parts_NP: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
    """Statistics [N, S] and log-normalisers [N] from the ranks' parts, which one gather brings together."""
    num_ranks = dist.get_world_size(job.group)
    gathered = parts_NP
    if num_ranks > 1:
        gathered = parts_NP.new_empty((num_ranks * len(parts_NP), len(PARTS)))
        dist.all_gather_into_tensor(gathered, parts_NP, group=job.group)
    parts_RNP = gathered.view(num_ranks, len(parts_NP), len(PARTS))
    maximum_RN, exponentials_RN, target_RN, products_RN, logits_RN, squares_RN = parts_RNP.unbind(-1)
    maximum = maximum_RN.amax(0)
    # A rank without real rows has a maximum of -inf and sums of 0: any finite number that is low enough will do.
    shift_RN = (maximum_RN - maximum).clamp(min=-1e4)
    scale_RN = shift_RN.exp()
    exponentials = (exponentials_RN * scale_RN).sum(0)
    products = ((products_RN + exponentials_RN * shift_RN) * scale_RN).sum(0)
    squares = (squares_RN * scale_RN.square()).sum(0)
    target, log_sum = target_RN.amax(0), exponentials.log()
    columns = {
        "logp": target - maximum - log_sum,
        "entropy": log_sum - products / exponentials,
        "correct": (target == maximum).float(),
        "mean_logit": logits_RN.sum(0) / job.vocab_size,
        "log_square": squares.log() - 2 * log_sum,
    }
    zeros = torch.zeros_like(log_sum)
    statistics_NS = torch.stack([columns[name] if name in job.statistics else zeros for name in TOKEN_STATISTICS], dim=-1)
    return statistics_NS, maximum + log_sum
