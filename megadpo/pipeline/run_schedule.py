"""Micro-batches through the pipeline stages by our own schedules (pipeline/), with the same functions as schedule.py,
which leaves it to Megatron's.

What an operation does to the model are Megatron's own functions for one forward and one backward, and the backwards of
each parameter come in the same order: gradients are the same bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.attention.prompt_kv import PromptKeys
from megadpo.model.moe.load import RouterWatch
from megadpo.model.weight_gradients import Products, put_off
from megadpo.pipeline import fill, stage_ops
from megadpo.pipeline.executor import Work, carry_out
from megadpo.pipeline.interleaved_reference import ReferenceBeside, ReferencePass
from megadpo.pipeline.program import Program, program
from megadpo.pipeline.schedule import AHEAD, BACKWARD, FORWARD, REFERENCE, WEIGHTS, Op, Schedule
from megadpo.pipeline.schedule import forward_only as forward_only_schedule
from megadpo.pipeline.simulate import Costs, simulate
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform.device import compute_device


def forward_only(
    models: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    ld_alpha: float | None = None,
    watch: RouterWatch | None = None,
) -> list[Tensor]:
    """See `schedule.forward_only`."""
    sums: dict[int, Tensor] = {}
    work = _Forwards(models, ReferencePass.of(micro_batches), ld_alpha, sums.__setitem__, watch)
    order = forward_only_schedule(_num_stages(), len(micro_batches), len(models), num_halves=_num_halves(micro_batches))
    run(order, Costs(), work)
    return [sums[number] for number in range(len(sums))]


def forward_backward(
    models: Sequence[Any],
    micro_batches: Sequence[MicroBatch],
    response_gradient: ResponseGradient,
    ld_alpha: float | None = None,
    watch: RouterWatch | None = None,
    beside: ReferenceBeside | None = None,
    is_zero_bubble: bool = False,
) -> None:
    """See `schedule.forward_backward`.

    Args:
        beside: the reference whose forwards run among the policy's operations.
        is_zero_bubble: gradients of weights are operations of their own; the linear layers must put them off for that
            (gradient_fusion.fuse_gradients).
    """
    work = _Work(models, micro_batches, response_gradient, ld_alpha, watch, is_zero_bubble)
    recomputes = get_model_config(models[0]).recompute_granularity == "full"
    costs = fill.proportions(recomputes, is_zero_bubble)
    sizes = _num_stages(), len(micro_batches), len(models), _num_halves(micro_batches)
    policy = fill.policy_alone(*sizes, is_zero_bubble)
    if beside is None:
        run(policy, costs, work)
    else:
        _with_reference(policy, work, costs, beside)
    work.finish_gradients()


def complete(beside: ReferenceBeside) -> None:
    """Do now what is left of the reference's forwards of this step."""
    passed = beside.this_step
    num_halves = _num_halves(passed.micro_batches)
    whole = forward_only_schedule(_num_stages(), len(passed.micro_batches), len(beside.models), REFERENCE, num_halves)
    done = passed.done or (0,) * whole.num_stages
    left = tuple(order[start:] for order, start in zip(whole.stages, done, strict=True))
    run(replace(whole, stages=left), Costs(), _reference_work(beside, passed), passed.received)
    passed.done, passed.received = tuple(map(len, whole.stages)), {}


def run(schedule: Schedule, costs: Costs, work: Work, held: dict[Op, Tensor] | None = None) -> dict[Op, Tensor]:
    """Carry a schedule out on this rank's stage; what was received for operations that are not in it."""
    group = parallel_state.get_pipeline_model_parallel_group()
    receives_early = compute_device().type == "cpu"  # over NCCL a posted receive may hold up what comes after it
    instructions = _program(schedule, costs, dist.get_rank(group), receives_early)
    return carry_out(instructions, work, group, held)


@functools.lru_cache(maxsize=64)
def _program(schedule: Schedule, costs: Costs, stage: int, receives_early: bool) -> Program:
    return program(simulate(schedule, costs), stage, receives_early)


def _with_reference(policy: Schedule, work: _Work, costs: Costs, beside: ReferenceBeside) -> None:
    this_step, ahead = beside.this_step, beside.next_step
    num_ahead = 0 if ahead is None else len(ahead.micro_batches)
    filled, progress = fill.with_reference(policy, this_step.done, num_ahead, costs)
    both = _Both(work, _reference_work(beside, this_step), None if ahead is None else _reference_work(beside, ahead))
    unread = run(filled, costs, both, this_step.received)
    this_step.received = {}
    if ahead is not None:
        ahead.done = progress
        ahead.received = {op._replace(kind=REFERENCE): tensor for op, tensor in unread.items()}


class _Work:
    """The policy's operations on this stage (see `executor.Work`)."""

    def __init__(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None,
        watch: RouterWatch | None,
        is_zero_bubble: bool,
    ) -> None:
        self.models, self.micro_batches, self.ld_alpha, self.watch = models, micro_batches, ld_alpha, watch
        self.response_gradient, self.is_zero_bubble = response_gradient, is_zero_bubble
        self.config = get_model_config(models[0])
        self._kept: dict[tuple[int, int, int], tuple[Tensor | None, Tensor]] = {}
        self._prompt_keys: dict[int, PromptKeys] = {}
        self._of_first_halves: dict[int, Tensor] = {}
        self._put_off: dict[int, Products] = {}
        self._unsynced = [contextlib.ExitStack() for _ in models]
        self._hold_back_reductions()

    def do(self, op: Op, received: Tensor | None) -> Tensor | None:
        if op.kind == WEIGHTS:
            self._put_off.pop(op.micro_batch).add_up()
            return None
        return self._backward(op, received) if op.kind == BACKWARD else self._forward(op, received)

    def empty(self, op: Op) -> Tensor:
        return message_like(self.config, self.micro_batches[op.micro_batch].half(op.half))

    def _forward(self, op: Op, received: Tensor | None) -> Tensor | None:
        if received is not None:
            received.requires_grad_()
        prompt_keys = self._prompt_keys.setdefault(op.micro_batch, PromptKeys())
        output = stage_forward(self.models, op, received, self.micro_batches[op.micro_batch], self.watch, prompt_keys)
        self._kept[op.micro_batch, op.chunk, op.half] = received, output
        if has_head(op, len(self.models)):
            return None
        # Only its place in the graph is needed here: the memory goes when the message has gone.
        sent = output.detach()
        deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)
        return sent

    def _backward(self, op: Op, gradient: Tensor | None) -> Tensor | None:
        model = self.models[op.chunk]
        received, output = self._kept.pop((op.micro_batch, op.chunk, op.half))
        if has_head(op, len(self.models)):
            output = self._surrogate(op, output)
        is_last = op.micro_batch == len(self.micro_batches) - 1 and op.half == 0 and not self.is_zero_bubble
        if is_last and (self.config.grad_sync_func is None or parallel_state.is_pipeline_first_stage()):
            self._unsynced[op.chunk].close()
        with put_off() if self.is_zero_bubble else contextlib.nullcontext() as products:
            below: Tensor | None = backward_step(received, output, gradient, get_model_type(model), self.config)
        if products is not None:
            self._put_off[op.micro_batch] = products
        if op.half == 0:
            self._prompt_keys.pop(op.micro_batch, None)
        return None if below is None else below.contiguous()

    def _surrogate(self, op: Op, output: Tensor) -> Tensor:
        """The scalar that goes backward. Halves are brought together for it: when the second one goes backward, which is
        first, the first one's output still waits."""
        model, micro_batch = self.models[op.chunk], self.micro_batches[op.micro_batch]
        if not micro_batch.halves:
            return stage_ops.surrogate(model, output, op.micro_batch, micro_batch, self.response_gradient, self.ld_alpha)
        if op.half == 0:
            return (output * self._of_first_halves.pop(op.micro_batch)).sum()
        outputs = self._kept[op.micro_batch, op.chunk, 0][1], output
        leaves = [half.detach().requires_grad_() for half in outputs]
        both = stage_ops.joined(model, leaves, micro_batch)
        scalar = stage_ops.surrogate(model, both, op.micro_batch, micro_batch, self.response_gradient, self.ld_alpha)
        self._of_first_halves[op.micro_batch], gradient = torch.autograd.grad(scalar, leaves)
        return (output * gradient).sum()

    def _hold_back_reductions(self) -> None:
        """As Megatron's schedules: gradients are reduced with, or after, the last backward of a chunk."""
        functions = self.config.no_sync_func
        if functions is None:
            return
        functions = functions if isinstance(functions, list) else [functions] * len(self.models)
        for stack, no_sync in zip(self._unsynced, functions, strict=True):
            stack.enter_context(no_sync())

    def finish_gradients(self) -> None:
        """After the last backward: the reductions that were left for the bubble at the end."""
        functions = self.config.grad_sync_func
        for chunk, stack in enumerate(self._unsynced):
            stack.close()
            if functions is not None and not parallel_state.is_pipeline_first_stage():
                reduce_gradients = functions[chunk] if isinstance(functions, list) else functions
                reduce_gradients(self.models[chunk].parameters())
            elif self.is_zero_bubble and self.config.no_sync_func is not None:
                self.models[chunk].start_grad_sync()


class _Forwards:
    """Forwards without gradients on this stage."""

    def __init__(
        self,
        models: Sequence[Any],
        passed: ReferencePass,
        ld_alpha: float | None,
        keep: Callable[[int, Tensor], None],
        watch: RouterWatch | None = None,
    ) -> None:
        """`keep` is given the number of each micro-batch and its response sums [R, S]."""
        self.models, self.passed, self.ld_alpha, self.keep, self.watch = models, passed, ld_alpha, keep, watch
        self.config = get_model_config(models[0])

    def do(self, op: Op, received: Tensor | None) -> Tensor | None:
        micro_batch, passed = self.passed.micro_batches[op.micro_batch], self.passed
        prompt_keys = passed.prompt_keys.setdefault(op.micro_batch, PromptKeys())
        is_part = op.half < len(micro_batch.halves) - 1
        if not is_part:
            passed.prompt_keys.pop(op.micro_batch)
        with torch.no_grad():
            output = stage_forward(self.models, op, received, micro_batch, self.watch, prompt_keys)
            if not has_head(op, len(self.models)):
                return output
            if is_part:
                passed.outputs[op.micro_batch] = output
                return None
            if micro_batch.halves:
                output = stage_ops.joined(self.models[-1], (passed.outputs.pop(op.micro_batch), output), micro_batch)
            self.keep(op.micro_batch, stage_ops.sums_of(self.models[-1], output, micro_batch, self.ld_alpha))
        return None

    def empty(self, op: Op) -> Tensor:
        return message_like(self.config, self.passed.micro_batches[op.micro_batch].half(op.half))


def _reference_work(beside: ReferenceBeside, passed: ReferencePass) -> _Forwards:
    """The reference's forwards of one step."""

    def keep(number: int, sums_RS: Tensor) -> None:
        passed.logps[number] = sums_RS[:, 0]

    return _Forwards(beside.models, passed, beside.ld_alpha, keep)


class _Both:
    """The policy's operations and the reference's, of this step and of the next."""

    def __init__(self, policy: _Work, reference: _Forwards, ahead: _Forwards | None) -> None:
        self.of: dict[str, _Work | _Forwards | None] = {FORWARD: policy, BACKWARD: policy, WEIGHTS: policy}
        self.of |= {REFERENCE: reference, AHEAD: ahead}

    def do(self, op: Op, received: Tensor | None) -> Tensor | None:
        work = self.of[op.kind]
        assert work is not None
        return work.do(op, received)

    def empty(self, op: Op) -> Tensor:
        work = self.of[op.kind]
        assert work is not None
        return work.empty(op)


def stage_forward(
    models: Sequence[Any],
    op: Op,
    received: Tensor | None,
    micro_batch: MicroBatch,
    watch: RouterWatch | None,
    prompt_keys: PromptKeys,
) -> Tensor:
    """The stage's forward of a micro-batch or of a half of it, by Megatron's function for one."""
    stream, number = micro_batch.half(op.half), 2 * op.micro_batch + op.half

    def forward(unused: Any, model: Any) -> tuple[Tensor, None]:
        return stage_ops.stage_forward(model, stream, number, watch, prompt_keys), None

    output, _ = forward_step(
        forward,
        None,
        models[op.chunk],
        1,
        received,
        [],
        get_model_config(models[0]),
        parallel_state.get_context_parallel_world_size(),
        is_first_microbatch=op.micro_batch == 0,
        current_microbatch=op.micro_batch,
        vp_stage=op.chunk if len(models) > 1 else None,
        is_last_stage=has_head(op, len(models)),
    )
    return output


def has_head(op: Op, num_chunks: int) -> bool:
    """Whether the operation is on the model's last part."""
    return parallel_state.is_pipeline_last_stage() and op.chunk == num_chunks - 1


def message_like(config: Any, micro_batch: MicroBatch) -> Tensor:
    """Hidden states, or their gradient, between two stages: this rank's tokens of the stream."""
    num_tokens = len(micro_batch.local.tokens_T)
    if config.sequence_parallel:
        num_tokens //= parallel_state.get_tensor_model_parallel_world_size()
    return torch.empty(num_tokens, 1, config.hidden_size, dtype=config.pipeline_dtype, device=compute_device())


def _num_halves(micro_batches: Sequence[MicroBatch]) -> int:
    return max((len(micro_batch.halves) for micro_batch in micro_batches), default=0) or 1


def _num_stages() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()
