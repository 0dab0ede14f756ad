"""The head: vocabulary-parallel token statistics equal a plain float64 log-softmax, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megadpo.parallel.layout import Layout
from tests.helpers.worlds import run_world

HIDDEN, LENGTH = 24, 20


@dataclass(frozen=True)
class Case:
    """One use of the head.

    Attributes:
        vocab_size: odd by default: tensor parallelism pads it; 5 leaves nothing for the last of 4 ranks.
        keeps_gradient: the engine has a buffer for the matrix gradient, which holds ones already.
    """

    num_scored: int = 13
    tile_rows: int = 4
    vocab_size: int = 37
    kernels: str = "auto"
    dtype: torch.dtype = torch.float32
    keeps_gradient: bool = False
    multiplier: float = 1.0
    softcap: float | None = None


CASES = [
    Case(),
    Case(tile_rows=256),
    Case(num_scored=0),
    Case(num_scored=1),
    Case(vocab_size=5),
    Case(keeps_gradient=True),
    Case(num_scored=0, keeps_gradient=True),
    Case(num_scored=8, keeps_gradient=True),
    Case(kernels="torch"),
    Case(kernels="torch", vocab_size=5),
    Case(kernels="torch", keeps_gradient=True),
    Case(num_scored=3, dtype=torch.bfloat16),
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.bfloat16, keeps_gradient=True),
    Case(dtype=torch.bfloat16, kernels="torch"),
    Case(multiplier=0.3, softcap=2.5),
    Case(multiplier=0.3, keeps_gradient=True),
    Case(softcap=2.5, kernels="torch", vocab_size=5),
    Case(softcap=2.5, num_scored=0, keeps_gradient=True),
]


def _run(num_tensor: int, sequence: bool, cases: Sequence[Case]) -> list[tuple[Tensor, ...]]:
    from megadpo.parallel.world import joined_world

    with joined_world(Layout(tensor=num_tensor, sequence=sequence), seed=0):
        return [_head_step(num_tensor, sequence, case) for case in cases]


def _head_step(num_tensor: int, sequence: bool, case: Case) -> tuple[Tensor, ...]:
    from megatron.core import parallel_state

    from megadpo.model.heads import logprob as head
    from megadpo.model.heads.kernels import choose_kernels

    head.TILE_ROWS = case.tile_rows
    choose_kernels(case.kernels, torch.device("cpu"))
    rank = parallel_state.get_tensor_model_parallel_rank()
    hidden, matrix, scored, targets, weights = _inputs(case)
    rows = -(-case.vocab_size // num_tensor)
    padded = torch.full((rows * num_tensor, HIDDEN), 100.0, dtype=case.dtype)  # must not enter, whatever it holds
    padded[: case.vocab_size] = matrix
    local = torch.nn.Parameter(padded[rank * rows : (rank + 1) * rows].clone())
    module = head.LogProbHead(local, case.vocab_size, sequence, case.multiplier, case.softcap)
    buffer = torch.ones_like(local, dtype=torch.float32)
    if case.keeps_gradient:
        module.configure(gradient_buffer=lambda parameter: buffer if parameter is local else None)
    micro_batch = _micro_batch(scored, targets)
    length = LENGTH // num_tensor if sequence else LENGTH
    own = hidden[rank * length : (rank + 1) * length] if sequence else hidden
    own = own[:, None].clone().requires_grad_()
    with module.reading(micro_batch):
        statistics, _ = module(own)
    (statistics[:, 0, 0] * weights).sum().backward()
    assert own.grad is not None
    if case.keeps_gradient:
        assert local.grad is None, "the gradient has gone to the engine's buffer, and nowhere else"
    matrix_gradient = buffer - 1 if case.keeps_gradient else local.grad
    assert matrix_gradient is not None
    with torch.no_grad(), module.reading(micro_batch):
        alone, _ = module(own)
    assert torch.equal(alone, statistics), "a forward without gradients gives the same bits"
    return statistics[:, 0].detach(), own.grad[:, 0], matrix_gradient


def _micro_batch(scored: Tensor, targets: Tensor) -> Any:
    from megadpo.data.batches.micro_batch import MicroBatch

    empty = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(empty, empty, (), scored, targets, empty, empty, empty, empty, empty, (), (), 0)


def _inputs(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, HIDDEN, generator=generator).to(case.dtype)
    matrix = torch.randn(case.vocab_size, HIDDEN, generator=generator).to(case.dtype)
    scored = torch.randint(0, LENGTH, (case.num_scored,), generator=generator)  # some rows twice: a shared prompt's end
    targets = torch.randint(0, case.vocab_size, (case.num_scored,), generator=generator)
    return hidden, matrix, scored, targets, torch.randn(case.num_scored, generator=generator)


def _expected(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Statistics and gradients of plain torch in `dtype`: matrix product, log_softmax in at least float32, gather."""
    hidden, matrix, scored, targets, weights = _inputs(case)
    hidden, matrix = (x.to(dtype).requires_grad_() for x in (hidden, matrix))
    logits = (hidden[scored] @ matrix.t()).to(torch.promote_types(dtype, torch.float32)) * case.multiplier
    if case.softcap is not None:
        logits = case.softcap * (logits / case.softcap).tanh()
    logps = logits.log_softmax(-1)
    chosen = logps.gather(1, targets[:, None])[:, 0]
    (chosen * weights).sum().backward()
    entropy = -(logps.exp() * logps).sum(-1)
    squares = logps.exp().square().sum(-1).log()
    correct = (logits.argmax(-1) == targets).to(logits.dtype)
    statistics = torch.stack([chosen, entropy, correct, logits.mean(-1), squares], -1)
    assert hidden.grad is not None and matrix.grad is not None
    return statistics.detach(), hidden.grad, matrix.grad


@pytest.mark.parametrize(("num_tensor", "sequence"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_statistics_and_gradients_equal_a_float64_log_softmax(num_tensor, sequence):
    ranks = run_world(num_tensor, _run, num_tensor, sequence, CASES)
    for number, case in enumerate(CASES):
        results = [rank[number] for rank in ranks]
        found = (
            results[0][0],
            torch.cat([hidden for _, hidden, _ in results]) if sequence else results[0][1],
            torch.cat([matrix for _, _, matrix in results]),
        )
        assert all(torch.equal(statistics, found[0]) for statistics, _, _ in results), f"{case}: ranks differ"
        assert not found[2][case.vocab_size :].any(), "padded vocabulary rows must get no gradient"
        true, torchs = _expected(case, torch.float64), _expected(case, case.dtype)
        for ours, theirs, exact in zip((*found[:2], found[2][: case.vocab_size]), torchs, true, strict=True):
            if case.dtype is torch.float32:
                torch.testing.assert_close(
                    ours.double(), exact, rtol=1e-5, atol=1e-5, msg=lambda text, c=case: f"{c}: {text}"
                )
            elif exact.numel():
                # Ours over torch's own error against float64; a sum over tensor ranks is rounded once a rank.
                ratio = (ours.double() - exact).norm() / (theirs.double() - exact).norm()
                assert ratio <= 2, f"{case}: {ratio:.2f} times torch's own error"


def _wanted(names: Sequence[str]) -> Tensor:
    from megadpo.model.heads import logprob as head
    from megadpo.parallel.world import joined_world

    case = Case()
    head.TILE_ROWS = case.tile_rows
    hidden, matrix, scored, targets, _ = _inputs(case)
    with joined_world(Layout(), seed=0):
        module = head.LogProbHead(torch.nn.Parameter(matrix), case.vocab_size, False)
        with module.reading(_micro_batch(scored, targets)):
            everything = module(hidden[:, None])[0].detach()
            module.configure(names)
            return torch.stack([everything, module(hidden[:, None])[0].detach()])


def test_only_wanted_statistics_are_there_and_they_have_the_same_bits():
    everything, some = run_world(1, _wanted, ("logp", "mean_logit"))[0]
    assert torch.equal(some[..., [0, 3]], everything[..., [0, 3]])
    assert not some[..., [1, 2, 4]].any() and everything[..., [1, 4]].all()
