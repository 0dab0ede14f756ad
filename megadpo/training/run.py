"""A training run under way, what its user gives it and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.data.batches.prefetch import Prefetcher
from megadpo.metrics.sinks import Sink
from megadpo.objectives.coupled import RunningMean
from megadpo.training.run_lock import Lock
from megadpo.training.setup import RunSetup
from megadpo.training.stop import Stopping
from megadpo.training.watchdog import Progress

if TYPE_CHECKING:
    from megadpo.engine.base import Engine
    from megadpo.training.global_batch import GlobalBatch
    from megadpo.training.reference import References

Metrics = dict[str, float]


@dataclass(frozen=True)
class Callbacks:
    """Functions called on rank 0 while training; all optional.

    Attributes:
        on_step_end: (step, metrics) after every optimizer step; steps count from 1.
        on_evaluation: (step, metrics) after every evaluation.
        on_save: (step, directory) after a checkpoint is written.
    """

    on_step_end: Callable[[int, Metrics], None] | None = None
    on_evaluation: Callable[[int, Metrics], None] | None = None
    on_save: Callable[[int, Path], None] | None = None


@dataclass(frozen=True)
class Result:
    """What training gives back, on every rank.

    Attributes:
        metrics: of the last step, and of the last evaluation under names that begin with "eval_".
        steps: optimizer steps of the whole run.
        model_path: the exported Hugging Face directory.
        output_dir: the run's directory.
    """

    metrics: Metrics
    steps: int
    model_path: Path
    output_dir: Path


@dataclass
class Run:
    """A run under way on this rank.

    Attributes:
        running_mean: of the rewards (BCO).
        num_tokens_seen: stream tokens trained on so far, padding left out.
        metrics: the last ones of every name.
        lock: on the output directory, rank 0's.
        progress: what the watchdog knows of this rank.
        evaluation_due: the evaluation after the last step was left out, for the run is to stop.
        batches: `get(step)` gives a step's global batch on this rank, packed while the step before it computes.
    """

    setup: RunSetup
    engine: Engine
    references: References
    callbacks: Callbacks
    sinks: list[Sink] = field(default_factory=list)
    running_mean: RunningMean = field(default_factory=RunningMean)
    num_tokens_seen: int = 0
    metrics: Metrics = field(default_factory=dict)
    stopping: Stopping = field(default_factory=Stopping)
    lock: Lock | None = None
    progress: Progress = field(default_factory=Progress)
    evaluation_due: bool = False
    batches: Prefetcher[GlobalBatch] = field(init=False)

    def __post_init__(self) -> None:
        from megadpo.training.global_batch import pack_global_batch

        setup = self.setup

        def pack(step: int) -> GlobalBatch:
            return pack_global_batch(setup.train, setup.sampler.group_ids(step), setup.objective)

        self.batches = Prefetcher(pack, setup.num_steps)

    def close(self) -> None:
        """End the thread that packs batches, and write what was not written yet."""
        self.batches.close()
        self.references.train.write()
        for sink in self.sinks:
            sink.close()
