"""A training run under way, what its user gives it and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.data.batches.prefetch import Prefetcher
from megadpo.errors import UserError
from megadpo.metrics.best import Best
from megadpo.metrics.sinks import Sink, close_all
from megadpo.metrics.spikes import SpikeWatch
from megadpo.objectives.coupled import RunningMean
from megadpo.parallel.world import rank
from megadpo.training.callbacks import Callbacks, Metrics
from megadpo.training.console import log, log_stream
from megadpo.training.feed import StoredFeed, StreamFeed, feed_of, news
from megadpo.training.profile import ProfileWindow
from megadpo.training.run_lock import Lock
from megadpo.training.run_record import RunRecord
from megadpo.training.saving import Saver
from megadpo.training.setup import RunSetup
from megadpo.training.step_figures import StepFigures
from megadpo.training.stop import Stopping
from megadpo.training.watchdog import Progress
from megadpo.validation.evaluation import best_of

if TYPE_CHECKING:
    from megadpo.data.rows.stream import Position
    from megadpo.data.store import GroupStore
    from megadpo.engine.base import Engine
    from megadpo.training.global_batch import GlobalBatch
    from megadpo.training.reference import References

__all__ = ["Callbacks", "Metrics", "Result", "Run", "call"]


@dataclass(frozen=True)
class Result:
    """What training gives back, on every rank.

    Attributes:
        metrics: of the last step, and of the last evaluation under names that begin with "eval_". What a rank measures of
            itself (times, memory, what is counted a second) is its own; `mfu` is rank 0's alone.
        steps: optimizer steps of the whole run; fewer than planned where it has ended early.
        model_path: the exported Hugging Face directory.
        output_dir: the run's directory.
        pushed_to: the address of the repository on the Hub that the model was pushed to, on rank 0; None: it was not.
        best_step: with `eval.best_metric`, the step of the best evaluation, whose model is exported. None: it is the last.
        best_value: the metric there.
        ended: why the run has ended before its last step, by `eval.patience` or a callback; None: it has not.
    """

    metrics: Metrics
    steps: int
    model_path: Path
    output_dir: Path
    pushed_to: str | None = None
    best_step: int | None = None
    best_value: float | None = None
    ended: str | None = None


@dataclass(frozen=True)
class Ended:
    """Why a run ends before its last step, as after it.

    Attributes:
        why: for the user.
        by: "patience" or "callback".
    """

    why: str
    by: str


@dataclass
class Run:
    """A run under way on this rank.

    Attributes:
        running_mean: of the rewards (BCO).
        num_tokens_seen: stream tokens trained on so far, padding left out.
        metrics: the last ones of every name.
        spikes: the last losses and gradient norms, and how many steps were left out.
        saver: writes checkpoints.
        lock: on the output directory, rank 0's.
        record: what the run was and how it ended, for `run.json` and the report.
        progress: what the watchdog knows of this rank.
        num_spikes_written: lines of spikes.jsonl that this process has written.
        evaluation_due: the evaluation after the last step was left out, for the run is to stop.
        best: the best evaluation so far, by `eval.best_metric`.
        heard: the callbacks that rank 0 has, known to all ranks.
        ended: what ends the run before its last step; None: it goes on.
        batches: `get(step)` gives a step's global batch on this rank, packed while the step before it computes.
        figures: what steps take.
        profile: the steps that torch's profiler records.
        feed: what gives each step its groups.
        groups: those that the groups of the step under way are of.
        position: of a stream: where it is after that step.
    """

    setup: RunSetup
    engine: Engine
    references: References
    callbacks: Callbacks
    sinks: list[Sink] = field(default_factory=list)
    running_mean: RunningMean = field(default_factory=RunningMean)
    num_tokens_seen: int = 0
    metrics: Metrics = field(default_factory=dict)
    spikes: SpikeWatch = field(init=False)
    stopping: Stopping = field(default_factory=Stopping)
    lock: Lock | None = None
    record: RunRecord = field(default_factory=RunRecord)
    progress: Progress = field(default_factory=Progress)
    evaluation_due: bool = False
    best: Best = field(init=False)
    heard: frozenset[str] = frozenset()
    ended: Ended | None = None
    num_spikes_written: int = 0
    batches: Prefetcher[GlobalBatch] = field(init=False)
    saver: Saver = field(init=False)
    figures: StepFigures = field(init=False)
    profile: ProfileWindow = field(init=False)
    feed: StoredFeed | StreamFeed = field(init=False)
    groups: GroupStore = field(init=False)
    position: Position | None = None

    def __post_init__(self) -> None:
        from megadpo.training.global_batch import pack_global_batch

        setup = self.setup

        def pack(step: int) -> GlobalBatch:
            found = self.feed.step(step)
            batch = pack_global_batch(found.packing, found.group_ids, setup.objective)
            return replace(batch, position=found.position)

        self.best = best_of(setup.config)
        sets = ((name, packing.groups) for name, packing in setup.eval.items())
        self.best.held_out = ", ".join(f"{name}:{groups.digest}:{len(groups)}" for name, groups in sets)
        self.feed, self.groups = feed_of(setup), setup.train.groups
        self.spikes = SpikeWatch(setup.config.train.spike_deviations)
        self.batches = Prefetcher(pack, setup.num_steps)
        self.figures = StepFigures(setup)
        self.profile = ProfileWindow(setup.config.logging, setup.output_dir)
        self.saver = Saver(
            root=setup.output_dir / "checkpoints",
            options=setup.config.checkpoint,
            companions=setup.companions if setup.adapter is None else replace(setup.companions, passthrough=None),
            hf_config=setup.policy.config,
            shapes=setup.search.shapes,
            kept=setup.search.kept,
            log=log,
            check_owner=self.check_owner,
            on_saved=lambda step, directory: call(self.callbacks.on_save, step, directory),
            kept_steps=lambda: self.best.steps,
        )

    def end(self, why: str, by: str) -> None:
        """End before the last step, as after it; the first reason stays."""
        if self.ended is None and self.record.last_step < self.setup.num_steps:
            self.ended = Ended(why, by)
            log(f"the run ends after step {self.record.last_step} of {self.setup.num_steps}: {why}")

    def take(self, batch: GlobalBatch) -> None:
        """The step under way is this batch's; of a stream, say what has become of its rows for the first time."""
        assert batch.packing is not None
        self.groups = batch.packing.groups
        if batch.position is not None:
            for line in news(self.position, batch.position):
                log(f"train: {line}")
        self.position = batch.position

    def check_owner(self) -> None:
        """Raises UserError where the output directory is another run's by now; on rank 0, which has the lock."""
        if self.lock is not None:
            self.lock.check()

    def write(self, record: Metrics) -> None:
        """A record of metrics, to where they go; on rank 0.

        Raises:
            UserError: the disk refuses, and `checkpoint.on_failed_write` is `stop`.
        """
        for sink in self.sinks:
            try:
                sink.write(record)
            except UserError as error:
                if self.setup.config.checkpoint.on_failed_write == "stop":
                    raise
                log(f"warning: {error}; going on without the metrics of step {int(record['step'])} there")

    def close(self, has_failed: bool = False, at_once: bool = False) -> None:
        """End the threads that pack batches and write checkpoints, and write what was not written yet.

        Args:
            at_once: of a failed run: wait for no save.

        Raises:
            UserError: something cannot be written, unless the run `has_failed` for another reason.
        """
        self.batches.close(at_once or has_failed)
        self.profile.close()
        if not has_failed:
            self.figures.close()
            log_stream(self.setup, self.position)
        self.references.train.write()
        self.saver.close(has_failed, at_once)
        for error in list(close_all(self.sinks, has_failed)):
            if not has_failed and self.setup.config.checkpoint.on_failed_write == "stop":
                raise error
            log(f"warning: {error}")


def call(callback: Callable[..., Any] | None, *arguments: Any) -> None:
    """Call a user's callback on rank 0."""
    if callback is not None and rank() == 0:
        callback(*arguments)
