"""What the operations of our own schedules do on this rank's stage, and how a schedule of them is run here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.model.attention.prompt_kv import PromptKeys
from megadpo.model.router_load import RouterWatch
from megadpo.model.weight_gradients import Products, delay_products
from megadpo.pipeline import stage_ops
from megadpo.pipeline.executor import Operations, execute
from megadpo.pipeline.program import Program, make_program
from megadpo.pipeline.schedule import AHEAD, BACKWARD, FORWARD, REFERENCE, WEIGHTS, Op, Schedule
from megadpo.pipeline.simulate import Costs, simulate
from megadpo.pipeline.stage_ops import ResponseGradient
from megadpo.platform.device import compute_device
from megadpo.platform.step_clock import part

Within = Callable[[], contextlib.AbstractContextManager[None]]
"""Makes the context that a forward runs in: models with their adapters off, for instance."""


def run_schedule(
    schedule: Schedule, costs: Costs, operations: Operations, held: dict[Op, Tensor] | None = None
) -> dict[Op, Tensor]:
    """Execute a schedule on this rank's stage; see `executor.execute`."""
    group = parallel_state.get_pipeline_model_parallel_group()
    receives_early = compute_device().type == "cpu"  # over NCCL a posted receive may hold up what comes after it
    instructions = _program(schedule, costs, dist.get_rank(group), receives_early)
    return execute(instructions, operations, group, held)


@functools.lru_cache(maxsize=64)
def _program(schedule: Schedule, costs: Costs, stage: int, receives_early: bool) -> Program:
    return make_program(simulate(schedule, costs), stage, receives_early)


class PolicyOperations:
    """The policy's forwards and backwards on this stage (see `executor.Operations`)."""

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
        self._gradients_of_first_halves: dict[int, Tensor] = {}
        self._delayed: dict[int, Products] = {}
        self._unsynced = [contextlib.ExitStack() for _ in models]
        self._hold_back_reductions()

    def run(self, op: Op, received: Tensor | None) -> Tensor | None:
        if op.kind == WEIGHTS:
            with part("backward"):
                self._delayed.pop(op.micro_batch).add_up()
            return None
        return self._backward(op, received) if op.kind == BACKWARD else self._forward(op, received)

    def empty_message(self, op: Op) -> Tensor:
        return message_like(self.config, self.micro_batches[op.micro_batch].half(op.half))

    def _forward(self, op: Op, received: Tensor | None) -> Tensor | None:
        if received is not None:
            received.requires_grad_()
        prompt_keys = self._prompt_keys.setdefault(op.micro_batch, PromptKeys())
        output = run_forward(self.models, op, received, self.micro_batches[op.micro_batch], self.watch, prompt_keys)
        self._kept[op.micro_batch, op.chunk, op.half] = received, output
        if has_head(op, len(self.models)):
            return None
        # Only its place in the autograd graph is needed here; its memory is freed when the message has been sent.
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
        with delay_products() if self.is_zero_bubble else contextlib.nullcontext() as products:
            below: Tensor | None = backward_step(received, output, gradient, get_model_type(model), self.config)
        if products is not None:
            self._delayed[op.micro_batch] = products
        if op.half == 0:
            self._prompt_keys.pop(op.micro_batch, None)
        return None if below is None else below.contiguous()

    def _surrogate(self, op: Op, output: Tensor) -> Tensor:
        """The scalar to call backward on. The second half goes backward first: then the loss of both is computed, from its
        output and the first half's, whose gradient is kept for its own backward."""
        model, micro_batch = self.models[op.chunk], self.micro_batches[op.micro_batch]
        if not micro_batch.halves:
            return stage_ops.surrogate(model, output, op.micro_batch, micro_batch, self.response_gradient, self.ld_alpha)
        if op.half == 0:
            return (output * self._gradients_of_first_halves.pop(op.micro_batch)).sum()
        outputs = self._kept[op.micro_batch, op.chunk, 0][1], output
        leaves = [half.detach().requires_grad_() for half in outputs]
        both = stage_ops.join_halves(model, leaves, micro_batch)
        scalar = stage_ops.surrogate(model, both, op.micro_batch, micro_batch, self.response_gradient, self.ld_alpha)
        self._gradients_of_first_halves[op.micro_batch], gradient = torch.autograd.grad(scalar, leaves)
        return (output * gradient).sum()

    def _hold_back_reductions(self) -> None:
        """As Megatron's schedules: gradients are reduced over replicas with, or after, the last backward of a chunk."""
        functions = self.config.no_sync_func
        if functions is None:
            return
        functions = functions if isinstance(functions, list) else [functions] * len(self.models)
        for stack, no_sync in zip(self._unsynced, functions, strict=True):
            stack.enter_context(no_sync())

    def finish_gradients(self) -> None:
        """After the last backward: start the reductions that were held back."""
        functions = self.config.grad_sync_func
        for chunk, stack in enumerate(self._unsynced):
            stack.close()
            if functions is not None and not parallel_state.is_pipeline_first_stage():
                reduce_gradients = functions[chunk] if isinstance(functions, list) else functions
                reduce_gradients(self.models[chunk].parameters())
            elif self.is_zero_bubble and self.config.no_sync_func is not None:
                self.models[chunk].start_grad_sync()


class ForwardOperations:
    """Forwards without gradients on this stage (see `executor.Operations`)."""

    def __init__(
        self,
        models: Sequence[Any],
        micro_batches: Sequence[MicroBatch],
        ld_alpha: float | None,
        keep: Callable[[int, Tensor], None],
        watch: RouterWatch | None = None,
        within: Within = contextlib.nullcontext,
    ) -> None:
        """`keep` is given the number of each micro-batch and its response sums [R, S]; forwards run `within` a context."""
        self.models, self.micro_batches, self.ld_alpha = models, micro_batches, ld_alpha
        self.keep, self.watch, self.within = keep, watch, within
        self.config = get_model_config(models[0])
        # By micro-batch, what was made of its first half and is needed for its second.
        self._prompt_keys: dict[int, PromptKeys] = {}
        self._outputs: dict[int, Tensor] = {}

    def run(self, op: Op, received: Tensor | None) -> Tensor | None:
        micro_batch = self.micro_batches[op.micro_batch]
        prompt_keys = self._prompt_keys.setdefault(op.micro_batch, PromptKeys())
        is_part = op.half < len(micro_batch.halves) - 1
        if not is_part:
            self._prompt_keys.pop(op.micro_batch)
        with self.within(), torch.no_grad():
            output = run_forward(self.models, op, received, micro_batch, self.watch, prompt_keys)
            if not has_head(op, len(self.models)):
                return output
            if is_part:
                self._outputs[op.micro_batch] = output
                return None
            if micro_batch.halves:
                output = stage_ops.join_halves(self.models[-1], (self._outputs.pop(op.micro_batch), output), micro_batch)
            self.keep(op.micro_batch, stage_ops.sums_of(self.models[-1], output, micro_batch, self.ld_alpha))
        return None

    def empty_message(self, op: Op) -> Tensor:
        return message_like(self.config, self.micro_batches[op.micro_batch].half(op.half))


class CombinedOperations:
    """The policy's operations and the reference's, of this step and of the next."""

    def __init__(self, policy: PolicyOperations, reference: ForwardOperations, ahead: ForwardOperations | None) -> None:
        self._of: dict[str, Operations | None] = {FORWARD: policy, BACKWARD: policy, WEIGHTS: policy}
        self._of |= {REFERENCE: reference, AHEAD: ahead}

    def run(self, op: Op, received: Tensor | None) -> Tensor | None:
        with part("reference") if op.kind in (REFERENCE, AHEAD) else contextlib.nullcontext():
            return self._operations_of(op).run(op, received)

    def empty_message(self, op: Op) -> Tensor:
        return self._operations_of(op).empty_message(op)

    def _operations_of(self, op: Op) -> Operations:
        operations = self._of[op.kind]
        assert operations is not None
        return operations


def run_forward(
    models: Sequence[Any],
    op: Op,
    received: Tensor | None,
    micro_batch: MicroBatch,
    watch: RouterWatch | None,
    prompt_keys: PromptKeys,
) -> Tensor:
    """A chunk's forward of a micro-batch or of a half of it, by Megatron's function for one forward."""
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
    """Whether the operation is on the chunk that has the head."""
    return parallel_state.is_pipeline_last_stage() and op.chunk == num_chunks - 1


def message_like(config: Any, micro_batch: MicroBatch) -> Tensor:
    """An empty tensor of the shape [tokens of this rank, 1, hidden] of the hidden states, or their gradients, that go from
    stage to stage."""
    num_tokens = len(micro_batch.local.tokens_T)
    if config.sequence_parallel:
        num_tokens //= parallel_state.get_tensor_model_parallel_world_size()
    return torch.empty(num_tokens, 1, config.hidden_size, dtype=config.pipeline_dtype, device=compute_device())


def num_halves(micro_batches: Sequence[MicroBatch]) -> int:
    """2 where micro-batches travel in halves, else 1."""
    return max((len(micro_batch.halves) for micro_batch in micro_batches), default=0) or 1


def num_stages() -> int:
    """Pipeline stages of the joined world."""
    return parallel_state.get_pipeline_model_parallel_world_size()
