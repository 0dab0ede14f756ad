"""Stand-ins for torch.distributed's functions, on a CPU: what came is there once it has been waited for, not before."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.machine import on
from tests.gpu.staged_gloo import use_staged_gloo


def collectives() -> dict[str, bool]:
    """In a world of one rank."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer

    dist.init_process_group("gloo")
    use_staged_gloo()
    use_staged_gloo()  # a second time changes nothing
    own, found = torch.arange(4.0), {}
    reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func
    for name, call in {
        "all_reduce": lambda out: dist.all_reduce(out.copy_(own), async_op=True),
        "all_gather_into_tensor": lambda out: dist.all_gather_into_tensor(out, own, async_op=True),
        "reduce_scatter_tensor": lambda out: reduce_scatter(output=out, input=own, async_op=True),
        "all_to_all_single": lambda out: dist.all_to_all_single(out, own, group=dist.group.WORLD, async_op=True),
        "all_gather": lambda out: dist.all_gather([out], own, async_op=True),
    }.items():
        out = torch.full((4,), -1.0)
        handle = call(out)
        untouched = name == "all_reduce" or bool((out == -1).all())
        handle.wait()
        found[name] = untouched and torch.equal(out, own)
    out = torch.full((2, 4), -1.0)
    with param_and_grad_buffer._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        for row in out:
            param_and_grad_buffer.dist_all_gather_func(row, own, group=dist.group.WORLD, async_op=True)
    untouched = bool((out == -1).all())
    manager.wait()
    found["coalesced"] = untouched and torch.equal(out, own.expand(2, 4))
    out.fill_(-1)
    with param_and_grad_buffer._coalescing_manager(dist.group.WORLD):
        param_and_grad_buffer.dist_all_gather_func(out[0], own, group=dist.group.WORLD)
    found["coalesced, waited for"] = torch.equal(out[0], own)
    dist.broadcast(own, 0)
    dist.barrier()
    found["waited for"] = dist.all_reduce(own) is None and torch.equal(own, torch.arange(4.0))
    return found


def messages() -> dict[str, bool]:
    """Between two ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    use_staged_gloo()
    rank = dist.get_rank()
    sent, came = torch.full((3,), float(rank)), torch.full((3,), -1.0)
    operations = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, came, 1 - rank)]
    handles = dist.batch_isend_irecv(operations)
    untouched = bool((came == -1).all())
    for handle in handles:
        handle.wait()
    total = torch.ones(2, dtype=torch.bfloat16)
    dist.all_reduce(total)
    return {"came": bool((came == 1 - rank).all()), "not before": untouched, "added up": bool((total == 2).all())}


@pytest.mark.slow
def test_collectives():
    found = on("cpu", collectives)
    assert all(found.values()), found


@pytest.mark.slow
def test_messages():
    found = on("cpu", messages, num_ranks=2)
    assert all(found.values()), found
