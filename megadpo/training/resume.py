"""Which checkpoint a run goes on from: the newest one that is, byte by byte, what was written. All ranks decide alike.

What can be seen quickly is looked at before the processes are joined (`find_checkpoint`): the hash of checkpoint.json, the
sizes of the files, the state, the tensors' shapes. The joined processes then hash the files, each its share of them
(`settle_checkpoint`), and take an older checkpoint where one of them finds damage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megadpo.checkpoint.sharded import Checkpoint, open_checkpoint, step_directories
from megadpo.config.schema import Config
from megadpo.data.rows.report import counted
from megadpo.engine.parameter_groups import state_shapes
from megadpo.errors import UserError
from megadpo.parallel.agreement import first_problem, from_all_ranks, problem_of
from megadpo.training.inputs import changed_inputs, refuse_changed
from megadpo.training.training_state import TrainingState, open_training_state, optimizer_record


@dataclass(frozen=True)
class Origin:
    """Where a run goes on, and how that was found.

    Attributes:
        checkpoint: the step directory; None: the run begins anew.
        left_out: why newer ones were not taken, a sentence each.
        changed_inputs: what has changed since it was made, in words, and may have.
    """

    checkpoint: Path | None
    left_out: tuple[str, ...] = ()
    changed_inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """What makes a checkpoint one that this run can go on from.

    Attributes:
        root: the directory of the run's checkpoints.
        chosen: what `checkpoint.resume` names; None: the newest under `root`.
        began_with: what `checkpoint.resume` names where checkpoints under `root` came of it: it is the oldest choice.
        shapes: of what is trained, by logical name.
        kept: of what a checkpoint has of it, by kind too.
        adapter: the adapter's settings in a checkpoint; None: the whole model is trained.
        optimizer: what a checkpoint says of the optimizer.
        inputs: digests of what the run is made from, see inputs.py.
        accept_changes: of these inputs.
        num_steps: that the run now has.
        with_reference: a moving reference is part of the state.
        verify: compare hashes.
    """

    root: Path
    chosen: Path | None
    began_with: Path | None
    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[str, tuple[int, ...]]]
    adapter: dict[str, Any] | None
    optimizer: dict[str, Any]
    inputs: dict[str, str]
    accept_changes: bool
    num_steps: int
    with_reference: bool
    verify: bool

    @staticmethod
    def of(
        config: Config,
        shapes: Mapping[str, tuple[int, ...]],
        inputs: dict[str, str],
        num_steps: int,
        adapter: dict[str, Any] | None = None,
    ) -> Search:
        root, named = Path(config.output_dir) / "checkpoints", config.checkpoint.resume
        chosen = None if named in ("auto", "never") else Path(named)
        # The same command again: the run goes on from its own, and what it began with may be gone by now.
        is_repeated = chosen is not None and came_of(root, chosen)
        return Search(
            root=root,
            chosen=None if is_repeated else chosen,
            began_with=chosen if is_repeated else None,
            shapes=shapes,
            kept=state_shapes(shapes, config.train),
            adapter=adapter,
            optimizer=optimizer_record(config.train),
            inputs=inputs,
            accept_changes=config.checkpoint.changed_inputs == "accept",
            num_steps=num_steps,
            with_reference=config.reference.sync_every is not None,
            verify=config.checkpoint.verify,
        )

    def candidates(self) -> list[Path]:
        """What may be gone on from, the newest first."""
        if self.chosen is not None:
            return [self.chosen]
        own = step_directories(self.root)[::-1]
        return [*own, self.began_with] if self.began_with is not None and self.began_with.is_dir() else own

    def alternatives(self) -> list[Path]:
        """Where a path was given: the other checkpoints beside it, and of this run, the newest first."""
        if self.chosen is None:
            return []
        roots = dict.fromkeys([self.chosen.absolute().parent, self.root.absolute()])
        found = [path for root in roots for path in step_directories(root)[::-1]]
        return [path for path in found if path != self.chosen.absolute()]

    def open(self, directory: Path) -> tuple[Checkpoint, TrainingState]:
        """A checkpoint and its state, looked at but for the hashes of the tensors' files.

        Raises:
            UserError: naming what is damaged or missing.
        """
        return open_training_state(directory, self.kept, self.adapter, self.optimizer, self.with_reference, self.verify)

    def look_at(self, directory: Path) -> TrainingState:
        """The state that `open` gives."""
        return self.open(directory)[1]

    def hash_files(self, directory: Path, share: int = 0, num_shares: int = 1) -> None:
        """This process's share of them, where they are to be verified.

        Raises:
            UserError: naming the damaged file.
        """
        if self.verify:
            open_checkpoint(directory).check_files(share, num_shares)

    def check_fits(self, directory: Path, state: TrainingState) -> tuple[str, ...]:
        """Refuse an undamaged checkpoint that this run cannot go on from; what has changed since it was made, and may have.

        Raises:
            UserError: it was made from something else, or is beyond the last step.
        """
        changed = changed_inputs(state.inputs, self.inputs)
        if not self.accept_changes:
            refuse_changed(directory, changed)
        if state.step > self.num_steps:
            planned = counted(self.num_steps, "step")
            raise UserError(f"{directory} is at step {state.step}, beyond the {planned} of this run; raise train.steps")
        return tuple(changed)


def find_checkpoint(search: Search) -> Origin:
    """The newest checkpoint that looks whole, or the one that was asked for; before the processes are joined.

    Raises:
        UserError: each of the run's is damaged, or this run cannot go on from what was found.
    """

    def examine(directory: Path) -> str | None:
        return problem_of(lambda: search.look_at(directory))

    if search.chosen is not None and examine(search.chosen) is not None:
        return Origin(search.chosen)  # refused by the joined processes, which together look for an intact one
    return _first_sound(search, search.candidates(), examine)


def settle_checkpoint(search: Search, origin: Origin) -> Origin:
    """The newest checkpoint that is whole to the last byte, from the one that was found on; collective.

    Raises:
        UserError: as `find_checkpoint`, or the one that was asked for is damaged, with the newest intact one named.
    """
    # Rank 0's view of the directory is everybody's: another process may see a file of a shared disk later.
    found = [] if origin.checkpoint is None else [origin.checkpoint]
    view = [found, search.candidates(), search.alternatives()]
    left_out, *first_view = from_all_ranks([list(origin.left_out), *([str(path) for path in paths] for paths in view)])[0]
    found, candidates, others = ([Path(path) for path in paths] for paths in first_view)
    origin = Origin(found[0] if found else None, tuple(left_out))
    if origin.checkpoint is None:
        return origin
    share, num_shares = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def examine(directory: Path) -> str | None:
        def all_of_it() -> None:
            search.look_at(directory)
            search.hash_files(directory, share, num_shares)

        return first_problem(problem_of(all_of_it))

    older = candidates[candidates.index(origin.checkpoint) :] if origin.checkpoint in candidates else [origin.checkpoint]
    if search.chosen is not None and (problem := examine(search.chosen)) is not None:
        intact = next((directory for directory in others if examine(directory) is None), None)
        named = f"the newest intact one is checkpoint.resume={intact}" if intact else "there is no intact one beside it"
        raise UserError(f"checkpoint.resume: {problem}; {named}")
    settled = _first_sound(search, older, examine)
    return replace(settled, left_out=(*origin.left_out, *settled.left_out))


def _first_sound(search: Search, candidates: list[Path], examine: Callable[[Path], str | None]) -> Origin:
    left_out: list[str] = []
    for directory in candidates:
        problem = examine(directory)
        if problem is None:
            changed = search.check_fits(directory, search.look_at(directory))
            return Origin(directory, tuple(left_out), changed)
        left_out.append(problem)
    if any(any(directory.iterdir()) for directory in candidates):
        raise UserError(
            f"{search.root} holds {counted(len(left_out), 'checkpoint')} and none can be resumed from "
            f"({'; '.join(left_out)}); checkpoint.resume=never begins anew and sets them aside"
        )
    return Origin(None, tuple(left_out))


def came_of(root: Path, chosen: Path) -> bool:
    """Whether a run has written checkpoints under `root` that began with the step directory `chosen`."""
    return any(began_with(own) == str(chosen.resolve()) for own in step_directories(root))


def began_with(checkpoint: Path) -> str | None:
    """The step directory that a checkpoint's run once began with, by `checkpoint.resume`; None: there was none."""
    try:
        state = open_checkpoint(checkpoint, verify=False).state
    except UserError:
        return None
    return state.get("resumed_from") if isinstance(state.get("resumed_from"), str) else None


def newest_that_opens(roots: Sequence[Path]) -> Path | None:
    """The newest checkpoint of the first of the directories that has one with its own hash and files of the right sizes."""
    for directory in (path for root in roots for path in step_directories(root)[::-1]):
        if _opens(directory):
            return directory
    return None


def _opens(directory: Path) -> bool:
    return problem_of(lambda: open_checkpoint(directory)) is None
