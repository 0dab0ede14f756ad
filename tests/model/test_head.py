"""The head: vocabulary-parallel token statistics equal a plain float64 log-softmax, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megadpo.parallel.layout import Layout
from tests.worlds import run_world

HIDDEN, VOCAB = 24, 37  # an odd vocabulary: tensor parallelism pads it


def _run(num_tensor: int, sequence: bool, tile_rows: int, num_scored: int) -> tuple[torch.Tensor, ...]:
    from megatron.core import parallel_state

    from megadpo.data.micro_batch import MicroBatch
    from megadpo.model import head
    from megadpo.platform.world import joined_world

    head.TILE_ROWS = tile_rows
    with joined_world(Layout(tensor=num_tensor, sequence=sequence), seed=0):
        rank = parallel_state.get_tensor_model_parallel_rank()
        hidden, matrix, scored, targets, weights = _inputs(num_scored)
        rows = -(-VOCAB // num_tensor)
        padded = torch.zeros(rows * num_tensor, HIDDEN)
        padded[:VOCAB] = matrix
        padded[VOCAB:] = 100.0  # must not enter the softmax whatever it holds
        local = torch.nn.Parameter(padded[rank * rows : (rank + 1) * rows].clone())
        module = head.LogProbHead(local, VOCAB, sequence)
        empty = torch.zeros(0, dtype=torch.int64)
        module.micro_batch = MicroBatch(empty, empty, (), scored, targets, empty, empty, empty, empty, empty, (), (), 0)
        length = len(hidden) // num_tensor if sequence else len(hidden)
        own = hidden[rank * length : (rank + 1) * length] if sequence else hidden
        own = own[:, None].clone().requires_grad_()
        statistics, _ = module(own)
        (statistics[:, 0, 0] * weights).sum().backward()
        return statistics[:, 0].detach(), own.grad[:, 0], local.grad


def _inputs(num_scored: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(20, HIDDEN, generator=generator)
    matrix = torch.randn(VOCAB, HIDDEN, generator=generator)
    scored = torch.randint(0, 20, (num_scored,), generator=generator)  # some rows twice: a shared prompt's end
    targets = torch.randint(0, VOCAB, (num_scored,), generator=generator)
    return hidden, matrix, scored, targets, torch.randn(num_scored, generator=generator)


@pytest.mark.parametrize(("num_tensor", "sequence"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("tile_rows", "num_scored"), [(256, 13), (4, 13), (4, 0), (4, 1)])
def test_statistics_and_gradients_equal_a_float64_log_softmax(num_tensor, sequence, tile_rows, num_scored):
    results = run_world(num_tensor, _run, num_tensor, sequence, tile_rows, num_scored)
    hidden, matrix, scored, targets, weights = (x.double() if x.is_floating_point() else x for x in _inputs(num_scored))
    hidden.requires_grad_()
    matrix.requires_grad_()
    logits = hidden[scored] @ matrix.t()
    logps = logits.log_softmax(-1)
    chosen = logps.gather(1, targets[:, None])[:, 0]
    (chosen * weights).sum().backward()
    entropy = -(logps.exp() * logps).sum(-1)
    squares = logps.exp().square().sum(-1).log()
    expected = torch.stack([chosen, entropy, (logits.argmax(-1) == targets).double(), logits.mean(-1), squares], -1)
    for statistics, _, _ in results:
        torch.testing.assert_close(statistics.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    grads = [grad for _, grad, _ in results]
    hidden_grad = torch.cat(grads) if sequence else grads[0]
    torch.testing.assert_close(hidden_grad.double(), hidden.grad, rtol=1e-5, atol=1e-5)
    matrix_grad = torch.cat([grad for _, _, grad in results])
    torch.testing.assert_close(matrix_grad[:VOCAB].double(), matrix.grad, rtol=1e-5, atol=1e-5)
    assert not matrix_grad[VOCAB:].any(), "padded vocabulary rows must get no gradient"
