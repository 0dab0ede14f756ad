"""What training asks of an engine: forward and backward passes, gradients summed over ranks, optimizer steps, state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.pipeline.stage_ops import ResponseGradient

if TYPE_CHECKING:
    from megadpo.model.build import Stage
    from megadpo.model.families import ParameterShard
    from megadpo.model.routes import Routes

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """Owns the policy's parameters, gradients and optimizer on this rank.

    Attributes:
        routes: the reference's, by which its passes send tokens to experts; None: the policy's routers choose.
    """

    stage: Stage
    routes: Routes | None

    def forward(self, micro_batches: Sequence[MicroBatch], ld_alpha: float | None = None) -> list[Tensor]:
        """Response sums [R, S] of each micro-batch on the last pipeline stage, elsewhere an empty list; no gradients."""
        ...

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        response_gradient: ResponseGradient,
        ld_alpha: float | None = None,
    ) -> None:
        """Forward and backward of every micro-batch through all stages, gradients added up on each rank."""
        ...

    def finish_gradients(self) -> None:
        """Add gradients up over replicas, sequence-parallel norms and tied embeddings: afterwards they are exact."""
        ...

    def gradient_buffer(self, parameter: Tensor) -> Tensor | None:
        """Where a backward may add a parameter's gradient up itself, instead of handing it to autograd: a tensor of its
        shape and of its dtype or float32; None where the gradient has to go through autograd."""
        ...

    def router_metrics(self) -> dict[str, float]:
        """Of a mixture of experts, how evenly the last global batch was spread (`router_load.Load`); collective."""
        ...

    def step(self, learning_rate: float, accepts: Callable[[float], bool] | None = None) -> float:
        """Clip, update, clear the gradients; the global gradient norm before clipping.

        Args:
            accepts: asked with the norm; where it says no, on every rank, gradients are cleared and nothing else changes.
                None: accepts every norm that is finite.

        Raises:
            ArithmeticError: without `accepts`, the norm is not finite; the parameters are left as they were.
        """
        ...

    def wait_for_parameters(self) -> None:
        """Wait until `stage` has the last step's parameters, whose gather over replicas may still be running; collective."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """After `finish_gradients`: (global parameter name, gradient of this rank's tensor-parallel shard, fp32)."""
        ...

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(global parameter name, whole tensor-parallel shard, as the model computes with it); collective over replicas."""
        ...

    def state(self, kinds: Sequence[str] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, global parameter name, fp32 tensor of the shard's shape) of weights and what the optimizer keeps beside
        them (`parameter_groups.KEPT`), or of some kinds; collective. What is frozen has weights alone. The tensors are the
        caller's own: no later step changes them."""
        ...

    def own_state(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        """What this rank itself keeps of `state`: (kind, shard, first element in the flattened shard, values)."""
        ...

    def own_gradients(self) -> Iterator[tuple[str, ParameterShard, int, Tensor]]:
        """The same of the gradients, under the kind "gradient"; after `finish_gradients`, before `step` has ended."""
        ...

    def load_state(self, read: Callable[[str, str], Tensor], num_steps: int) -> None:
        """Set what `state` yields: `read(kind, global parameter name)` after `num_steps` optimizer steps."""
        ...

    def describe(self) -> dict[str, Any]:
        """The engine, its optimizer and options that were chosen on this machine: name -> value, for the console."""
        ...
