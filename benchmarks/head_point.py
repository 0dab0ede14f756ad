"""One point of benchmarks.head_memory, measured in the process that calls it; imported by its fork server."""

from __future__ import annotations

import os
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import interleaved, median_ratio
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.parallel.layout import Layout
from megadpo.parallel.world import joined_world
from megadpo.platform.megatron_cpu import prepare_megatron

prepare_megatron()  # before the head's import, which brings Megatron in

from megadpo.model.heads import logprob as head_module  # noqa: E402
from megadpo.model.heads.kernels import choose_kernels  # noqa: E402
from megadpo.model.heads.logprob import LogProbHead  # noqa: E402

MIB = 2**20
WANTED = ("logp", "entropy", "correct", "mean_logit")
"""What training reads of a policy; of a reference it reads the log-probs."""


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: extra memory of one step, or seconds of both ways in turns."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if point["tile_mib"] is not None:
        head_module.CPU_TILE_BYTES = point["tile_mib"] * MIB
    with joined_world(Layout(), seed=0):
        kernels = choose_kernels(point["kernels"], torch.device("cpu"))
        for tiny_step in _steps(point | {"tokens": 4, "scored": 2, "hidden": 8, "vocabulary": 16}).values():
            tiny_step(0)  # threads, code and communication buffers are there before the peak is read
        steps = _steps(point)
        if point["way"] == "both":
            seconds = interleaved(steps, point["rounds"], 1)
            ours, plain = seconds.values()
            medians = {way: statistics.median(values) for way, values in seconds.items()}
            times = {"seconds": seconds, "median_seconds": medians, "time_ratio": median_ratio(ours, plain)}
            return times | {"kernels_used": kernels}
        from megadpo.platform.allocator import give_back_freed_blocks

        give_back_freed_blocks()
        before = peak_bytes()
        steps[point["way"]](0)
        extra = peak_bytes() - before
    return {"extra_mib": extra / MIB, "hidden_states_mib": 4 * point["tokens"] * point["hidden"] / MIB}


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _steps(point: dict[str, Any]) -> dict[str, Callable[[int], Any]]:
    """A log-prob step each way, on the same hidden states, weights and targets; gradients are in place beforehand."""
    num_scored = point["scored"]
    hidden = torch.empty(point["tokens"], 1, point["hidden"]).normal_().requires_grad_(point["backward"])
    weight = torch.nn.Parameter(torch.empty(point["vocabulary"], point["hidden"]).normal_(std=0.02))
    weight.requires_grad_(point["backward"])
    if point["backward"]:
        # Written to, so that their pages count before the step and not in it.
        hidden.grad, weight.grad = torch.ones_like(hidden), torch.ones_like(weight)
    scored, targets = torch.arange(num_scored), torch.randint(0, point["vocabulary"], (num_scored,))
    head = LogProbHead(weight, point["vocabulary"], sequence_parallel=False)
    # As the engines give it: the gradient is added up where it is kept. Autograd does so for the plain way.
    head.configure(WANTED if point["backward"] else ("logp",), lambda matrix: matrix.grad)
    none = torch.zeros(0, dtype=torch.int64)
    micro_batch = MicroBatch(scored, scored, (), scored, targets, none, none, none, none, none, (), (), 0)

    def ours() -> torch.Tensor:
        with head.reading(micro_batch):
            return head(hidden)[0][:, 0, 0]

    def plain() -> torch.Tensor:
        logps = (hidden[:, 0] @ weight.t()).log_softmax(-1)
        return logps[:num_scored].gather(1, targets[:, None])[:, 0]

    def step_of(way: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        def step(number: int) -> None:
            logps = way()
            if point["backward"]:
                logps.sum().backward()

        return step

    return {"megadpo": step_of(ours), "log_softmax + gather": step_of(plain)}
