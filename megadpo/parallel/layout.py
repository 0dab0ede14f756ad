"""How a run is spread over processes: tensor x context x pipeline x data, experts among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
        virtual: chunks of layers that each stage holds. Chunk number c of the model is on stage c % pipeline.
        chunk_layers: layers of each chunk, in the model's order; None: as even as possible, see `even_chunks`.
        expert: ranks, among those of a stage, that share the experts of a layer.
        expert_tensor: ranks that share each expert's matrices. Experts go over tensor x context x data ranks in this order:
            expert_tensor fastest, then expert, then replicas.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    context: int = 1
    context_method: str = "auto"
    virtual: int = 1
    chunk_layers: tuple[int, ...] | None = None
    expert: int = 1
    expert_tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data * self.context

    def __str__(self) -> str:
        sequence = " + sequence" if self.sequence else ""
        context = f" x context {self.context} ({self.context_method})" if self.context > 1 else ""
        virtual = f" of {self.virtual} chunks" if self.virtual > 1 else ""
        layers = f" ({', '.join(map(str, self.chunk_layers))} layers)" if self.chunk_layers else ""
        experts = (
            f", expert {self.expert} x expert_tensor {self.expert_tensor}" if self.expert * self.expert_tensor > 1 else ""
        )
        layout = f"tensor {self.tensor}{sequence}{context} x pipeline {self.pipeline}{virtual}{layers} x data {self.data}"
        return layout + experts

    @property
    def stream_multiple(self) -> int:
        """What the length of every micro-batch's stream must be a multiple of."""
        return self.context * (self.tensor if self.sequence else 1)

    @property
    def num_chunks(self) -> int:
        """Chunks of layers of the whole model."""
        return self.pipeline * self.virtual

    @property
    def micro_batches_multiple_of(self) -> int:
        """What a replica's number of micro-batches must be a multiple of: the interleaved schedule goes in rounds."""
        return self.pipeline if self.virtual > 1 else 1

    def layers_of_stage(self, num_layers: int, stage: int, chunk: int = 0) -> range:
        """Global numbers of the layers in a chunk, 0 .. virtual - 1, of pipeline stage number `stage`."""
        return self.layers_of_chunks(num_layers)[chunk * self.pipeline + stage]

    def layers_of_chunks(self, num_layers: int) -> list[range]:
        """Global numbers of the layers of every chunk, in the model's order."""
        sizes = self.chunk_layers or even_chunks(num_layers, self.num_chunks)
        ends = list(itertools.accumulate(sizes))
        return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def even_chunks(num_layers: int, num_chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as even as possible: first and last, with embedding and head, are the first to get less."""
    least, more = divmod(num_layers, num_chunks)
    from_the_middle = sorted(range(num_chunks), key=lambda chunk: (chunk in (0, num_chunks - 1), chunk))
    return tuple(least + (from_the_middle.index(chunk) < more) for chunk in range(num_chunks))


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
    expert, expert_tensor, data = parallel.expert, parallel.expert_tensor, world_size // model_size
    num_of_stage = parallel.tensor * parallel.context * data
    if num_of_stage % (expert * expert_tensor):
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.expert {expert} x parallel.expert_tensor {expert_tensor} must divide the {num_of_stage} "
            f"processes of a pipeline stage (tensor {parallel.tensor}{context} x data {data}); lower one of the two"
        )
    return Layout(
        parallel.tensor,
        parallel.pipeline,
        data,
        sequence,
        context=parallel.context,
        context_method=parallel.context_method,
        virtual=parallel.virtual_pipeline,
        chunk_layers=read_chunk_layers(parallel.pipeline_layout, parallel.pipeline, parallel.virtual_pipeline),
        expert=expert,
        expert_tensor=expert_tensor,
    )


def context_method(layout: Layout, num_key_value_heads: int) -> str | None:
    """How context ranks attend to each other's parts of the stream: "ulysses" or "allgather"; None without them.

    `auto` is all-to-all over heads where every rank gets the same number of key-value heads, which leaves each rank
    1 / context of attention's memory; else, and so for more ranks than heads, all-gather.
    """
    if layout.context == 1:
        return None
    if layout.context_method != "auto":
        return layout.context_method
    return "allgather" if num_key_value_heads // layout.tensor % layout.context else "ulysses"


def read_chunk_layers(value: str | Sequence[int] | None, pipeline: int, virtual: int) -> tuple[int, ...] | None:
    """`parallel.pipeline_layout` as numbers of layers, given as a list or as text ("3,4,4,3").

    Raises:
        UserError: not whole numbers above 0, or not one for each chunk.
    """
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else [str(part) for part in value]
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"parallel.pipeline_layout is {value!r}; give the number of layers of each stage, all above 0, "
            "for example 3,4,4,3"
        )
    if len(parts) != pipeline * virtual:
        chunks = f"parallel.pipeline {pipeline}" + (f" x parallel.virtual_pipeline {virtual}" if virtual > 1 else "")
        raise UserError(
            f"parallel.pipeline_layout has {len(parts)} numbers of layers but {chunks} needs {pipeline * virtual}; "
            "give one for each, in the model's order"
        )
    return tuple(int(part) for part in parts)
