"""How a run is spread over processes: tensor x pipeline x data, and what is impossible, said before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megadpo.errors import UserError

CONTEXT_METHODS = ("auto", "ulysses", "allgather")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. Ranks are numbered as Megatron does: tensor fastest, then context, data, pipeline.

    Attributes:
        tensor: ranks that share each matrix.
        pipeline: stages that the layers are cut into.
        data: replicas that see different pairs.
        sequence: whether norms and residuals are split over the tensor ranks along the stream.
        context: ranks that each hold a part of a replica's stream.
        context_method: how they attend to each other's parts, one of CONTEXT_METHODS.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    context: int = 1
    context_method: str = "auto"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data * self.context

    def __str__(self) -> str:
        sequence = " + sequence" if self.sequence else ""
        context = f" x context {self.context} ({self.context_method})" if self.context > 1 else ""
        return f"tensor {self.tensor}{sequence}{context} x pipeline {self.pipeline} x data {self.data}"

    @property
    def stream_multiple(self) -> int:
        """What the length of every micro-batch's stream must be a multiple of."""
        return self.context * (self.tensor if self.sequence else 1)

    def layers_of_stage(self, num_layers: int, stage: int) -> range:
        """Global numbers of the layers that pipeline stage number `stage` holds."""
        per_stage = num_layers // self.pipeline
        return range(stage * per_stage, (stage + 1) * per_stage)


def choose_layout(parallel: Any, world_size: int) -> Layout:
    """The layout that the `parallel` section of a Config asks for on `world_size` processes.

    Raises:
        UserError: the sizes do not fit the number of processes or each other.
    """
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        context = f" x parallel.context {parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}{context} needs a multiple of "
            f"{model_size} processes but there are {world_size}; start with --nproc "
            f"{model_size * max(1, world_size // model_size)} or lower one of them"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence is true but parallel.tensor is 1; sequence parallelism needs tensor > 1")
    sequence = parallel.tensor > 1 if parallel.sequence is None else parallel.sequence
    return Layout(
        parallel.tensor,
        parallel.pipeline,
        world_size // model_size,
        sequence,
        context=parallel.context,
        context_method=parallel.context_method,
    )


def context_method(layout: Layout, hf_config: Any) -> str | None:
    """How context ranks attend to each other's parts of the stream: "ulysses" or "allgather"; None without them.

    `auto` is all-to-all over heads where every rank gets the same number of key-value heads, which leaves each rank
    1 / context of attention's memory; else, and so for more ranks than heads, all-gather.
    """
    if layout.context == 1:
        return None
    if layout.context_method != "auto":
        return layout.context_method
    num_key_value_heads = getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads
    return "allgather" if num_key_value_heads // layout.tensor % layout.context else "ulysses"


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
    divided = {
        "attention heads": num_heads,
        "key-value heads": num_key_value_heads,
        "MLP columns": hf_config.intermediate_size,
    }
    for what, number in divided.items():
        if number % layout.tensor:
            raise UserError(
                f"parallel.tensor {layout.tensor} does not divide the model's {number} {what}; "
                f"use one of {_divisors(num_heads, num_key_value_heads, hf_config.intermediate_size)}"
            )
    if hf_config.num_hidden_layers % layout.pipeline:
        raise UserError(
            f"parallel.pipeline {layout.pipeline} does not divide the model's {hf_config.num_hidden_layers} layers; "
            f"use one of {_divisors(hf_config.num_hidden_layers)}"
        )
    if layout.context_method == "ulysses":
        _check_ulysses(layout, num_heads // layout.tensor, num_key_value_heads // layout.tensor)
    if pairs_per_step is not None and pairs_per_step < layout.data:
        raise UserError(
            f"train.pairs_per_step {pairs_per_step} is less than the {layout.data} data-parallel replicas; "
            f"raise it to at least {layout.data} or use fewer processes"
        )


def _check_ulysses(layout: Layout, num_heads: int, num_key_value_heads: int) -> None:
    """Every context rank gets the same number of the tensor rank's heads, and the key-value heads these read."""
    fits = num_heads % layout.context == 0
    fits = fits and (num_key_value_heads % layout.context == 0 or layout.context % num_key_value_heads == 0)
    if not fits:
        raise UserError(
            f"parallel.context_method ulysses cannot spread {num_heads} attention heads with {num_key_value_heads} "
            f"key-value heads (on each of {layout.tensor} tensor ranks) over parallel.context {layout.context}; "
            "set context_method to allgather or auto"
        )


def _divisors(*numbers: int) -> list[int]:
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]
