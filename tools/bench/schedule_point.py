"""What the ranks of tools/bench/schedules.py do: the same steps under Megatron's schedules and under ours, timed."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ARMS = ("Megatron, reference before", "ours, reference before", "ours, reference interleaved")


def measure(rank: int, port: int, point: dict[str, Any], path: str) -> None:
    """One rank of a point: writes {arm: [step's record]} and the seconds of a message to `path`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(point["stages"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from megadpo.parallel.layout import Layout
    from megadpo.platform.world import joined_world

    torch.set_num_threads(point["threads"])
    with joined_world(Layout(pipeline=point["stages"], virtual=point["chunks"]), seed=0):
        bench = _Slept(point) if point["operations"] == "slept" else _Computed(point)
        records: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(2):  # the first time connects and allocates
            message = _message_seconds(bench.message())
        for number in range(-1, point["rounds"]):
            for arm in ARMS:
                steps = list(_run(bench, arm, point["steps"]))
                if number >= 0:
                    records[arm].extend(steps)
        Path(path).write_text(json.dumps({"records": records, "message": message}))


def _run(bench: Any, arm: str, num_steps: int) -> Iterator[dict[str, Any]]:
    """Steps in a row; of each its seconds, the busy ones among them, and every operation's."""
    import torch.distributed as dist

    bench.start(arm)
    for step in range(num_steps):
        bench.times = []
        dist.barrier()
        started = time.perf_counter()
        bench.step(arm, is_last=step == num_steps - 1)
        dist.barrier()
        seconds = time.perf_counter() - started
        yield {"step": step, "seconds": seconds, "busy": sum(took for _, took in bench.times), "times": bench.times}


def _message_seconds(tensor: Any) -> float:
    """Half of a way there and back between the first two stages, median."""
    import torch.distributed as dist

    took = []
    for _ in range(9):
        dist.barrier()
        started = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif dist.get_rank() == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)
        took.append((time.perf_counter() - started) / 2)
    return statistics.median(took)


class _Slept:
    """Operations that take a known time and no processor."""

    def __init__(self, point: dict[str, Any]) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.transformer.transformer_config import TransformerConfig

        self.point = point
        self.seconds = {kind: point[kind] for kind in ("forward", "backward", "reference")}
        self.seconds["ahead"] = self.seconds["reference"]
        self.times: list[tuple[str, float]] = []
        self.group = parallel_state.get_pipeline_model_parallel_group()
        config = TransformerConfig(
            num_layers=point["stages"],
            hidden_size=64,
            num_attention_heads=4,
            pipeline_model_parallel_size=point["stages"],
            pipeline_dtype=torch.float32,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",  # asked for by the line above, experts or not
            deallocate_pipeline_outputs=True,
            calculate_per_token_loss=True,
        )
        self.model = SimpleNamespace(config=config, model_type=None, set_input_tensor=self._set_input)
        self.input: Any = None
        self.done: Any = None
        self.held: dict[Any, Any] = {}

    def message(self) -> Any:
        import torch

        return torch.zeros(16, 1, 64)

    def start(self, arm: str) -> None:
        self.done, self.held = None, {}

    def step(self, arm: str, is_last: bool) -> None:
        count, stages = self.point["micro_batches"], self.point["stages"]
        if arm == ARMS[0]:
            self._megatron("reference", forward_only=True)
            self._megatron("forward", forward_only=False)
            return
        from megadpo.parallel.own_schedule import run
        from megadpo.pipeline.fill import reference_before, with_reference
        from megadpo.pipeline.simulate import Costs

        costs = Costs(message=0.02)
        if arm == ARMS[1]:
            run(reference_before(stages, count), costs, self)
            return
        schedule, self.done = with_reference(stages, count, 1, self.done, 0 if is_last else count, costs)
        unread = run(schedule, costs, self, self.held)
        self.held = {op._replace(kind="reference"): tensor for op, tensor in unread.items()}

    def do(self, op: Any, received: Any) -> Any:
        self._sleep(op.kind)
        return self.message()

    def empty(self, op: Any) -> Any:
        return self.message()

    def _sleep(self, kind: str) -> None:
        started = time.perf_counter()
        time.sleep(self.seconds[kind])
        self.times.append((kind, time.perf_counter() - started))

    def _set_input(self, tensors: Any) -> None:
        self.input = tensors[0] if isinstance(tensors, list) else tensors

    def _megatron(self, kind: str, forward_only: bool) -> None:
        import torch
        from megatron.core.pipeline_parallel import get_forward_backward_func

        sleep = self._sleep

        class Slept(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, hidden: Any) -> Any:
                sleep(kind)
                return hidden.clone()

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                sleep("backward")
                return gradients[0]

        def forward_step(unused: Any, model: Any) -> Any:
            hidden = torch.zeros(16, 1, 64, requires_grad=True) if self.input is None else self.input
            return Slept.apply(hidden), lambda output: (output.sum(), torch.zeros((), dtype=torch.int), None)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self.model],
            num_microbatches=self.point["micro_batches"],
            seq_length=16,
            micro_batch_size=1,
            forward_only=forward_only,
        )


class _Computed:
    """A real policy and reference, equal micro-batches."""

    def __init__(self, point: dict[str, Any]) -> None:
        import torch
        from transformers import LlamaConfig

        from megadpo.model.build import build_stage
        from megadpo.parallel.layout import Layout

        self.point, self.times = point, []
        config = LlamaConfig(
            vocab_size=point["vocabulary"],
            hidden_size=point["hidden"],
            intermediate_size=point["hidden"] * 11 // 4,
            num_hidden_layers=point["layers"],
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=point["tokens"],
        )
        layout = Layout(pipeline=point["stages"], virtual=point["chunks"])
        self.policy, self.reference = (build_stage(config, layout, torch.float32) for _ in range(2))
        with torch.no_grad():
            for stage in (self.policy, self.reference):
                for model in stage.models:
                    for parameter in model.parameters():
                        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for model in self.reference.models:
            model.requires_grad_(False)
        self.micro_batches = [_stream(point, number) for number in range(point["micro_batches"])]
        self.beside: Any = None

    def message(self) -> Any:
        import torch

        return torch.zeros(len(self.micro_batches[0].tokens_T), 1, self.point["hidden"])

    def start(self, arm: str) -> None:
        from megadpo.pipeline.beside import ReferenceBeside

        self.beside = ReferenceBeside(self.reference.models, None)

    def step(self, arm: str, is_last: bool) -> None:
        import torch

        from megadpo.parallel import own_schedule, schedule

        def ones(number: int, sums_RS: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(sums_RS), 1, dtype=torch.float64)

        for model in self.policy.models:
            model.zero_grad(set_to_none=False)
        passes: Any = schedule if arm == ARMS[0] else own_schedule
        with _timed(self.times):
            if arm != ARMS[2]:
                passes.forward_only(self.reference.models, self.micro_batches)
                passes.forward_backward(self.policy.models, self.micro_batches, ones)
                return
            self.beside.begin(self.micro_batches)
            if not is_last:
                self.beside.run_ahead(self.micro_batches)
            passes.forward_backward(self.policy.models, self.micro_batches, ones, beside=self.beside)


@contextmanager
def _timed(times: list[tuple[str, float]]) -> Iterator[None]:
    """Megatron's functions for a forward and a backward tell their seconds, whoever calls them."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from megadpo.parallel import own_schedule

    def timed(function: Callable[..., Any], backward: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            kind = "backward" if backward else "forward" if torch.is_grad_enabled() else "reference"
            times.append((kind, time.perf_counter() - started))
            return result

        return call

    originals = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}
    for name, function in originals.items():
        for module in (schedules, own_schedule):
            setattr(module, name, timed(function, name == "backward_step"))
    try:
        yield
    finally:
        for name, function in originals.items():
            for module in (schedules, own_schedule):
                setattr(module, name, function)


def _stream(point: dict[str, Any], seed: int) -> Any:
    import numpy as np

    from megadpo.data.groups import Group
    from megadpo.data.micro_batch import lay_out

    random, half = np.random.default_rng(seed), point["tokens"] // 4

    def ids(count: int) -> np.ndarray:
        return random.integers(0, point["vocabulary"], count).astype(np.int32)

    return lay_out([Group((ids(2 * half),), (ids(half), ids(half)), seed)], [seed])


def mean_costs(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a stage's operations by kind."""
    by_kind: dict[str, list[float]] = {}
    for record in records:
        for kind, took in record["times"]:
            by_kind.setdefault("reference" if kind == "ahead" else kind, []).append(took)
    return {kind: statistics.mean(times) for kind, times in by_kind.items()}
