"""`megadpo plan CONFIG --layouts [N …]`: every layout of a model and a configuration on N processes; starts nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megadpo.checkpoint.hf import read_hf_config
from megadpo.config.schema import Config, copy_config
from megadpo.errors import UserError
from megadpo.model.families import shape_of, shard_parameters, with_reward_head
from megadpo.model.shape import ModelShape
from megadpo.objectives.specs import has_reward_head
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.validation.layout import check_layout
from megadpo.validation.values import validate

DEFAULT_COUNTS = (1, 2, 4, 8)
SPREAD = ("tensor", "context", "pipeline")
"""Sizes under `parallel` whose product divides the number of processes; data parallelism is what they leave."""
WITHIN = ("virtual_pipeline",)
"""Sizes under `parallel` that take no processes of their own."""


@dataclass(frozen=True)
class Fit:
    """A layout that would run.

    Attributes:
        sizes: of SPREAD and WITHIN, by name.
        parameters: of the process that has most.
    """

    sizes: dict[str, int]
    layout: Layout
    parameters: int


def list_layouts(config: Config, counts: Sequence[int] = ()) -> str:
    """What `megadpo plan --layouts` prints.

    Raises:
        UserError: no model to plan for, or a number of processes below 1.
    """
    if not config.model.path or not Path(config.model.path).is_dir():
        raise UserError(f"model.path: there is no directory {config.model.path!r}; plan reads the model's config.json")
    hf_config = read_hf_config(config.model.path)
    if has_reward_head(config.objective.loss_types):
        hf_config = with_reward_head(hf_config, hf_config.pad_token_id)
    reference = None if config.reference.path is None else shape_of(read_hf_config(config.reference.path))
    return "\n\n".join(_page(config, shape_of(hf_config), reference, count) for count in counts or DEFAULT_COUNTS) + "\n"


def layouts(
    config: Config, shape: ModelShape, reference: ModelShape | None, num_processes: int
) -> tuple[list[Fit], Counter[str]]:
    """Every layout that would run on `num_processes`, and why the others would not (reason -> how many).

    Args:
        shape, reference: of the policy, and of the reference where it is another model.

    Virtual stages are looked at where all chunks get the same number of layers, or where the configuration asks for them.
    """
    if num_processes < 1:
        raise UserError(f"--layouts: the number of processes must be at least 1, got {num_processes}")
    fits: list[Fit] = []
    refused: Counter[str] = Counter()
    for sizes in _candidates(config, shape.num_layers, num_processes):
        try:
            layout = _layout(config, shape, reference, sizes, num_processes)
        except UserError as error:
            refused[str(error)] += 1
        else:
            fits.append(Fit(sizes, layout, most_parameters(layout, shape)))
    return fits, refused


def most_parameters(layout: Layout, shape: ModelShape) -> int:
    """Parameters of the process that has most, tied ones once a process."""
    return max(_parameters(layout, shape, stage) for stage in range(layout.pipeline))


def _parameters(layout: Layout, shape: ModelShape, stage: int) -> int:
    chunks = [
        shard_parameters(
            shape,
            tensor_rank=0,
            num_tensor=layout.tensor,
            layers=layout.layers_of_stage(shape.num_layers, stage, chunk),
            has_embedding=stage == chunk == 0,
            has_head=stage == layout.pipeline - 1 and chunk == layout.virtual - 1,
        )
        for chunk in range(layout.virtual)
    ]
    return sum(prod(shard.shape) for shards in chunks for shard in shards)


def _candidates(config: Config, num_layers: int, num_processes: int) -> Iterator[dict[str, int]]:
    numbers = [n for n in range(1, num_processes + 1) if num_processes % n == 0]
    for spread in itertools.product(numbers, repeat=len(SPREAD)):
        if num_processes % prod(spread):
            continue
        sizes = dict(zip(SPREAD, spread, strict=True))
        pipeline, configured = sizes["pipeline"], config.parallel.virtual_pipeline
        yield sizes | {"virtual_pipeline": 1}
        for virtual in range(2, num_layers // pipeline + 1 if pipeline > 1 else 0):
            if virtual == configured or num_layers % (pipeline * virtual) == 0:
                yield sizes | {"virtual_pipeline": virtual}


def _layout(
    config: Config, shape: ModelShape, reference: ModelShape | None, sizes: dict[str, int], num_processes: int
) -> Layout:
    """The layout of these sizes, or UserError as a run would raise it."""
    candidate = copy_config(config)
    configured = (config.parallel.pipeline, config.parallel.virtual_pipeline)
    for name, size in sizes.items():
        setattr(candidate.parallel, name, size)
    if configured != (sizes["pipeline"], sizes["virtual_pipeline"]):
        candidate.parallel.pipeline_layout = None  # made for the sizes that the configuration names
    validate(candidate)
    layout = choose_layout(candidate.parallel, num_processes)
    check_layout(layout, shape, candidate.train.pairs_per_step)
    if reference is not None:
        check_layout(layout, reference)
    return layout


def _page(config: Config, shape: ModelShape, reference: ModelShape | None, num_processes: int) -> str:
    fits, refused = layouts(config, shape, reference, num_processes)
    names = [*SPREAD, *WITHIN]
    rows = [[*names, "data", "layers of each stage", "parameters of a process"]]
    for fit in fits:
        sizes = [f"{fit.sizes[name]}" for name in names]
        rows.append([*sizes, f"{fit.layout.data}", _layers(fit.layout, shape), f"{fit.parameters:,}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    processes = "process" if num_processes == 1 else "processes"
    lines = [f"{num_processes} {processes}: {len(fits)} {'layout' if len(fits) == 1 else 'layouts'}"]
    if fits:
        lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"  refused: {reason}" + (f" ({count} layouts)" if count > 1 else "") for reason, count in refused.items()]
    return "\n".join(lines)


def _layers(layout: Layout, shape: ModelShape) -> str:
    """ "4+4 6+4" for two stages of two chunks; "7 x 4" for four stages of 7."""
    stages = [
        "+".join(str(len(layout.layers_of_stage(shape.num_layers, stage, chunk))) for chunk in range(layout.virtual))
        for stage in range(layout.pipeline)
    ]
    return f"{stages[0]} x {len(stages)}" if len(set(stages)) == 1 and len(stages) > 1 else " ".join(stages)
