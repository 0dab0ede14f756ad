"""`megadpo plan CONFIG --schedule [FILE]`: the schedule of a configuration's steps, drawn, with idle shares; starts nothing.

Costs are those that a model's shapes suggest: a forward counts the elements of a stage's matrices, a backward twice that
(three times with full recomputation).
"""

from __future__ import annotations

from pathlib import Path

from megadpo.checkpoint.hf import read_hf_config
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.model.families import shape_of, shard_parameters
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.pipeline.draw import svg
from megadpo.pipeline.fill import MESSAGE_COST, policy_schedule, rough_costs, with_reference, with_reference_before
from megadpo.pipeline.schedule import Schedule
from megadpo.pipeline.simulate import Costs, Timing, peak_activations, simulate
from megadpo.validation.layout import check_layout


def draw_schedule(config: Config, path: str, num_micro_batches: int | None) -> str:
    """Draw to `path`; what is printed.

    Args:
        num_micro_batches: of a step on each replica; None: four for each stage.

    Raises:
        UserError: a model that is not there, or sizes that do not go together.
    """
    if not config.model.path or not Path(config.model.path).is_dir():
        raise UserError(f"model.path: there is no directory {config.model.path!r}; plan reads the model's config.json")
    shape = shape_of(read_hf_config(config.model.path))
    parallel = config.parallel
    layout = choose_layout(parallel, parallel.tensor * parallel.pipeline * parallel.context * parallel.expert)
    check_layout(layout, shape)
    count = 4 * layout.pipeline if num_micro_batches is None else num_micro_batches
    if count < 1 or count % layout.micro_batches_multiple_of:
        raise UserError(
            f"--micro-batches {count} is not a multiple of {layout.micro_batches_multiple_of}, as "
            "parallel.virtual_pipeline needs it"
        )
    costs = stage_costs(shape, layout, config.train.recompute)
    if config.schedule.split_pairs:
        costs = costs.in_halves()
    if config.schedule.zero_bubble:
        costs = costs.with_separate_weight_gradients()
    panels = [(name, simulate(schedule, costs)) for name, schedule in _steps(config, layout, count)]
    try:
        Path(path).write_text(svg([(_title(name, timing), timing) for name, timing in panels]), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--schedule {path} cannot be written: {error.strerror}") from error
    lines = [f"{layout}, {count} micro-batches a step, drawn in {path}"]
    if config.schedule.split_pairs:
        lines.append(
            "  if both halves of a micro-batch cost the same: with long prompts the first one costs more, and it may not pay"
        )
    lines += ["  " + _title(name, timing) for name, timing in panels]
    kept = "halves of micro-batches" if config.schedule.split_pairs else "micro-batches"
    lines.append(f"  most {kept} kept for their backward, by stage: {peak_activations(panels[-1][1].schedule)}")
    return "\n".join(lines) + "\n"


def stage_costs(shape: ModelShape, layout: Layout, recompute: str) -> Costs:
    """Costs in forwards of a mean chunk, from the parameters of each stage's matrices (the embedding is looked up)."""
    sizes = [_matrix_parameters(shape, layout, stage) / layout.virtual for stage in range(layout.pipeline)]
    mean = sum(sizes) / len(sizes)
    forward = tuple(size / mean for size in sizes)
    factor = 3.0 if recompute == "full" else 2.0
    message = MESSAGE_COST if layout.pipeline > 1 else 0.0
    return Costs(forward, tuple(factor * cost for cost in forward), forward, message)


def _matrix_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    shards = [
        shard
        for chunk in range(layout.virtual)
        for shard in shard_parameters(
            shape,
            tensor_rank=0,
            num_tensor=layout.tensor,
            layers=layout.layers_of_stage(shape.num_layers, stage, chunk),
            has_embedding=False,
            has_head=stage == layout.pipeline - 1 and chunk == layout.virtual - 1,
        )
    ]
    return sum(shard.shape[0] * shard.shape[1] for shard in shards if len(shard.shape) == 2)


def _steps(config: Config, layout: Layout, count: int) -> list[tuple[str, Schedule]]:
    schedule = config.schedule
    policy = policy_schedule(layout.pipeline, count, layout.virtual, 2 if schedule.split_pairs else 1, schedule.zero_bubble)
    if config.reference.mode not in ("resident", "adapter"):
        return [("every step", policy)]
    if schedule.reference == "before":
        return [("every step", with_reference_before(policy))]
    steps, done, costs = [], None, rough_costs(config.train.recompute == "full", schedule.zero_bubble)
    for name, ahead in (("first step", count), ("second step", count), ("last step", 0)):
        whole, done = with_reference(policy, done, ahead, costs)
        steps.append((name, whole))
    return steps


def _title(name: str, timing: Timing) -> str:
    """Times are in forwards of a mean chunk."""
    return f"{name}: idle share {timing.idle_share:.1%}, {timing.seconds:.1f} forwards long"
