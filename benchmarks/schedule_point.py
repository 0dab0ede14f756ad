"""What the ranks of benchmarks/schedules.py do: the same steps under Megatron's schedules and under ours, timed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Who carries out which schedule.

    Attributes:
        reference: "before", "interleaved" or "none".
    """

    name: str
    is_ours: bool = True
    reference: str = "none"
    zero_bubble: bool = False


ARMS = (
    Arm("Megatron, reference before", is_ours=False, reference="before"),
    Arm("ours, reference before", reference="before"),
    Arm("ours, reference interleaved", reference="interleaved"),
    Arm("ours, zero bubble, reference interleaved", reference="interleaved", zero_bubble=True),
    Arm("Megatron, no reference", is_ours=False),
    Arm("ours, no reference"),
    Arm("ours, zero bubble, no reference", zero_bubble=True),
)
"""Each is compared with the last one of Megatron's before it."""


def measure(rank: int, port: int, point: dict[str, Any], path: str) -> None:
    """One rank of a point: writes {arm: [step's record]} to `path`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(point["stages"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from megadpo.parallel.layout import Layout
    from megadpo.parallel.world import joined_world

    torch.set_num_threads(point["threads"])
    with joined_world(Layout(pipeline=point["stages"], virtual=point["chunks"]), seed=0):
        bench = _Slept(point) if point["operations"] == "slept" else _Computed(point)
        records: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in ARMS}
        for number in range(-1, point["rounds"]):  # the first time connects and allocates
            for arm in ARMS:
                steps = list(_run(bench, arm, point["steps"]))
                if number >= 0:
                    records[arm.name].extend(steps)
        Path(path).write_text(json.dumps({"records": records}))


def _run(bench: Any, arm: Arm, num_steps: int) -> Iterator[dict[str, Any]]:
    """Steps in a row; of each its seconds, the busy ones among them, and when every operation began and ended (as
    (kind, micro-batch, begin, end); one clock for all processes of a machine)."""
    import torch.distributed as dist

    bench.start(arm)
    for step in range(num_steps):
        times: list[tuple[str, int, float, float]] = []
        dist.barrier()
        started = time.perf_counter()
        with _timed(times):
            bench.step(arm, is_last=step == num_steps - 1)
        dist.barrier()
        seconds = time.perf_counter() - started
        yield {"step": step, "seconds": seconds, "busy": sum(end - begin for *_, begin, end in times), "times": times}


@contextmanager
def _timed(times: list[tuple[str, int, float, float]]) -> Iterator[None]:
    """Ours tell what they do and when; of Megatron's schedules, the functions for one forward and one backward do."""
    import torch
    from megatron.core.pipeline_parallel import schedules

    from megadpo.pipeline import operations
    from megadpo.pipeline.executor import Clock, execute

    counts: dict[str, int] = {}

    def timed(function: Callable[..., Any], is_backward: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            kind = "backward" if is_backward else "forward" if torch.is_grad_enabled() else "reference"
            begin = time.perf_counter()
            result = function(*arguments, **named)
            times.append((kind, counts.get(kind, 0), begin, time.perf_counter()))
            counts[kind] = counts.get(kind, 0) + 1
            return result

        return call

    def executed(program: Any, stage_operations: Any, group: Any, held: Any = None) -> Any:
        clock = Clock()
        unread = execute(program, stage_operations, group, held, clock)
        is_reference = all(op.kind == "forward" for op, *_ in clock.times)  # a pass of its own
        times.extend(
            ("reference" if is_reference else op.kind, op.micro_batch, begin, end) for op, begin, end in clock.times
        )
        return unread

    originals = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}
    for name, function in originals.items():
        setattr(schedules, name, timed(function, name == "backward_step"))
    operations.execute = executed  # type: ignore[assignment]
    try:
        yield
    finally:
        operations.execute = execute
        for name, function in originals.items():
            setattr(schedules, name, function)


class _Slept:
    """Operations that take a known time and no processor."""

    def __init__(self, point: dict[str, Any]) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.transformer.transformer_config import TransformerConfig

        self.point = point
        self.seconds = {kind: point[kind] for kind in ("forward", "backward", "reference")}
        self.seconds |= {"ahead": point["reference"], "weights": point["forward"]}
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
        self.is_zero_bubble, self.done = False, None
        self.held: dict[Any, Any] = {}

    def message(self) -> Any:
        import torch

        return torch.zeros(16, 1, 64)

    def start(self, arm: Arm) -> None:
        self.is_zero_bubble, self.done, self.held = arm.zero_bubble, None, {}

    def step(self, arm: Arm, is_last: bool) -> None:
        import torch

        count, stages = self.point["micro_batches"], self.point["stages"]
        if not arm.is_ours:
            if arm.reference == "before":
                with torch.no_grad():
                    self._megatron("reference", forward_only=True)
            self._megatron("forward", forward_only=False)
            return
        from megadpo.pipeline.fill import policy_schedule, rough_costs, with_reference
        from megadpo.pipeline.operations import run_schedule
        from megadpo.pipeline.schedule import all_forwards

        costs = rough_costs(is_zero_bubble=arm.zero_bubble)
        policy = policy_schedule(stages, count, is_zero_bubble=arm.zero_bubble)
        if arm.reference == "before":
            run_schedule(all_forwards(stages, count), costs, self)
        if arm.reference != "interleaved":
            run_schedule(policy, costs, self)
            return
        schedule, self.done = with_reference(policy, self.done, 0 if is_last else count, costs)
        unread = run_schedule(schedule, costs, self, self.held)
        self.held = {op._replace(kind="reference"): tensor for op, tensor in unread.items()}

    def run(self, op: Any, received: Any) -> Any:
        self._sleep(op.kind)
        return self.message()

    def empty_message(self, op: Any) -> Any:
        return self.message()

    def _sleep(self, kind: str) -> None:
        is_part = kind == "backward" and self.is_zero_bubble
        time.sleep(self.seconds[kind] - (self.seconds["weights"] if is_part else 0.0))

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
        from megadpo.model.families import shape_of
        from megadpo.model.weight_gradients import fuse_gradients
        from megadpo.parallel.layout import Layout

        self.point = point
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
        self.policy, self.reference = (build_stage(shape_of(config), layout, torch.float32) for _ in range(2))
        with torch.no_grad():
            for stage in (self.policy, self.reference):
                for model in stage.models:
                    for parameter in model.parameters():
                        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for model in self.reference.models:
            model.requires_grad_(False)
        # As the engine has it: products add to where gradients are kept, at once or later; so does what autograd has.
        for model in self.policy.models:
            for parameter in model.parameters():
                parameter.main_grad = torch.zeros_like(parameter)
                parameter.register_post_accumulate_grad_hook(_into_main_grad)
        fuse_gradients(self.policy.models, "torch")
        self.micro_batches = [_stream(point, number) for number in range(point["micro_batches"])]
        self.schedule: Any = None

    def message(self) -> Any:
        import torch

        return torch.zeros(len(self.micro_batches[0].tokens_T), 1, self.point["hidden"])

    def start(self, arm: Arm) -> None:
        from megadpo.pipeline.interleaved_reference import InterleavedReference
        from megadpo.pipeline.megatron_schedule import MegatronSchedule
        from megadpo.pipeline.own_schedule import OwnSchedule

        interleaved = InterleavedReference(self.reference.models, None) if arm.reference == "interleaved" else None
        self.schedule = OwnSchedule(arm.zero_bubble, interleaved) if arm.is_ours else MegatronSchedule()

    def step(self, arm: Arm, is_last: bool) -> None:
        import torch

        def ones(number: int, sums_RS: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(sums_RS), 1, dtype=torch.float64)

        for model in self.policy.models:
            model.zero_grad(set_to_none=False)
        if arm.reference == "before":
            self.schedule.forward_only(self.reference.models, self.micro_batches)
        if arm.reference == "interleaved":
            self.schedule.reference.begin(self.micro_batches)
            if not is_last:
                self.schedule.reference.run_ahead(self.micro_batches)
        self.schedule.forward_backward(self.policy.models, self.micro_batches, ones)


def _into_main_grad(parameter: Any) -> None:
    if not getattr(parameter, "grad_added_to_main_grad", False):
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


def _stream(point: dict[str, Any], seed: int) -> Any:
    import numpy as np

    from megadpo.data.batches.collate import collate_groups
    from megadpo.data.groups import Group

    random, half = np.random.default_rng(seed), point["tokens"] // 4

    def ids(count: int) -> np.ndarray:
        return random.integers(0, point["vocabulary"], count).astype(np.int32)

    return collate_groups([Group((ids(2 * half),), (ids(half), ids(half)), seed)], [seed])
