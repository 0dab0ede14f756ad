"""How a run is spread over processes: tensor x pipeline x data, and what is impossible, said before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megadpo.errors import UserError
from megadpo.model.families import Experts, experts_of


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Ranks are numbered as Megatron does: tensor fastest, then data, then pipeline.

    Attributes:
        tensor: ranks that share each matrix.
        pipeline: stages that the layers are cut into.
        data: replicas that see different pairs.
        sequence: whether norms and residuals are split over the tensor ranks along the stream.
        expert: ranks, among those of a stage, that share the experts of a layer.
        expert_tensor: ranks that share each expert's matrices. Experts go over tensor x data ranks in this order:
            expert_tensor fastest, then expert, then replicas.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        sequence = " + sequence" if self.sequence else ""
        experts = (
            f", expert {self.expert} x expert_tensor {self.expert_tensor}" if self.expert * self.expert_tensor > 1 else ""
        )
        return f"tensor {self.tensor}{sequence} x pipeline {self.pipeline} x data {self.data}{experts}"

    def layers_of_stage(self, num_layers: int, stage: int) -> range:
        """Global numbers of the layers that pipeline stage number `stage` holds."""
        per_stage = num_layers // self.pipeline
        return range(stage * per_stage, (stage + 1) * per_stage)


def choose_layout(parallel: Any, world_size: int) -> Layout:
    """The layout that the `parallel` section of a Config asks for on `world_size` processes.

    Raises:
        UserError: the sizes do not fit the number of processes or each other.
    """
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise UserError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} needs a multiple of {model_size} "
            f"processes but there are {world_size}; start with --nproc {model_size * max(1, world_size // model_size)} "
            "or lower one of the two"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence is true but parallel.tensor is 1; sequence parallelism needs tensor > 1")
    sequence = parallel.tensor > 1 if parallel.sequence is None else parallel.sequence
    expert, expert_tensor, data = parallel.expert, parallel.expert_tensor, world_size // model_size
    if parallel.tensor * data % (expert * expert_tensor):
        raise UserError(
            f"parallel.expert {expert} x parallel.expert_tensor {expert_tensor} must divide the {parallel.tensor * data} "
            f"processes of a pipeline stage (tensor {parallel.tensor} x data {data}); lower one of the two"
        )
    return Layout(parallel.tensor, parallel.pipeline, data, sequence, expert, expert_tensor)


def check_layout(layout: Layout, hf_config: Any, pairs_per_step: int | None = None) -> None:
    """Refuse a layout that the model or the batch cannot be spread over.

    Args:
        hf_config: a transformers config with num_attention_heads, num_key_value_heads, num_hidden_layers, intermediate_size.
        pairs_per_step: pairs of a global batch, where the run has any.

    Raises:
        UserError: naming the axis, the model's figure and what to change.
    """
    num_heads = hf_config.num_attention_heads
    num_key_value_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
    experts = experts_of(hf_config)
    divided = {"attention heads": num_heads, "key-value heads": num_key_value_heads}
    if experts is None or len(experts.layers) < hf_config.num_hidden_layers:
        divided["MLP columns"] = hf_config.intermediate_size
    for what, number in divided.items():
        if number % layout.tensor:
            raise UserError(
                f"parallel.tensor {layout.tensor} does not divide the model's {number} {what}; "
                f"use one of {_divisors(*divided.values())}"
            )
    _check_experts(layout, experts)
    if hf_config.num_hidden_layers % layout.pipeline:
        raise UserError(
            f"parallel.pipeline {layout.pipeline} does not divide the model's {hf_config.num_hidden_layers} layers; "
            f"use one of {_divisors(hf_config.num_hidden_layers)}"
        )
    if pairs_per_step is not None and pairs_per_step < layout.data:
        raise UserError(
            f"train.pairs_per_step {pairs_per_step} is less than the {layout.data} data-parallel replicas; "
            f"raise it to at least {layout.data} or use fewer processes"
        )


def _check_experts(layout: Layout, experts: Experts | None) -> None:
    if experts is None:
        if layout.expert * layout.expert_tensor > 1:
            option = "expert" if layout.expert > 1 else "expert_tensor"
            raise UserError(f"parallel.{option} is {getattr(layout, option)}, but the model has no experts; leave it at 1")
        return
    if experts.count % layout.expert:
        raise UserError(
            f"parallel.expert {layout.expert} does not divide the model's {experts.count} experts; "
            f"use one of {_divisors(experts.count)}"
        )
    if experts.columns % layout.expert_tensor:
        raise UserError(
            f"parallel.expert_tensor {layout.expert_tensor} does not divide the {experts.columns} columns of an expert; "
            f"use one of {_divisors(experts.columns)}"
        )
    if layout.tensor > 1 and not layout.sequence:
        raise UserError(
            f"parallel.sequence is false with parallel.tensor {layout.tensor}, but a model with experts needs it: "
            "without it every tensor rank would route every token; leave it at null"
        )


def _divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]
