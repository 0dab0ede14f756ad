"""A run that breaks off and goes on from its checkpoint is the run that nothing happened to: every line of metrics, every
exported weight and the order of the data, bit for bit. 36 cases, all combinations of

rows     `divisible`: 12 rows, 4 a step, so that an epoch ends with a step; `tail kept`: 13 rows for two epochs, so that a
         step ends one epoch and begins the next, and the last step has 2 rows; `tail dropped`: the same rows for 6 steps,
         which never see those 2;
batches  `whole`: a step is one micro-batch on each process; `accumulated`: it is several, whose gradients are added up;
place    where the run goes on: `before` the end of the first epoch, which is still to come (from step 2); `at` it, where the
         very next step begins the second epoch or is the one with rows of both (from step 3); `after` it (from step 4);
workers  1 process, or 2 data-parallel ones.

A run is saved at that place, breaks off one step later, before that step is saved, and goes on in new processes with a token
cache of their own.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import assert_same_weights, read_metrics, run_settings, save_files
from tests.helpers.worlds import run_world

Order = list[tuple[list[int], list[str]]]
"""Of each step in turn: the groups of the global batch, and a hash of the tokens of each of this process's micro-batches."""


@dataclass(frozen=True)
class Case:
    """A combination of the axes above."""

    rows: str
    batches: str
    place: str
    workers: int

    def __str__(self) -> str:
        return f"{self.rows}, {self.batches}, {self.place}, {self.workers}"

    @property
    def whole(self) -> str:
        """The run that nothing happens to, which cases that only break off elsewhere share."""
        return f"{self.rows}, {self.batches}, {self.workers}"

    @property
    def saved_at(self) -> int:
        return {"before": 2, "at": 3, "after": 4}[self.place]

    @property
    def num_rows(self) -> int:
        return 12 if self.rows == "divisible" else 13

    @property
    def num_samples(self) -> list[int]:
        """Rows of each step."""
        return [4] * 6 + [2] * (self.rows == "tail kept")

    def settings(self, files: Path, output_dir: Path, cache: str) -> dict[str, Any]:
        return run_settings(
            files,
            output_dir,
            data={"train": str(files / f"{self.num_rows}.jsonl"), "max_length": 64, "cache_dir": str(files / cache)},
            train={
                **({"steps": 6} if self.rows == "tail dropped" else {"steps": None, "epochs": 2}),
                "pairs_per_step": 4,
                "hang_timeout": 0,
                "tokens_per_micro_batch": 1024 if self.batches == "whole" else 128,
            },
            checkpoint={"every": self.saved_at, "at_end": False},
        )


ALL = list(
    itertools.starmap(
        Case,
        itertools.product(
            ("divisible", "tail kept", "tail dropped"), ("whole", "accumulated"), ("before", "at", "after"), (1, 2)
        ),
    )
)
FAST = [
    Case("divisible", "accumulated", "at", 1),
    Case("divisible", "accumulated", "after", 1),
    Case("tail kept", "whole", "before", 1),
    Case("tail dropped", "accumulated", "at", 2),
    Case("tail dropped", "accumulated", "before", 2),
    Case("tail kept", "whole", "after", 2),
]


class _BrokenOff(Exception):
    """In place of a kill, on every rank at once, so that these processes can go on to the next case."""


def _trained(settings: dict[str, Any], breaks_off_after: int | None) -> Order:
    """Train; what this process saw. The run breaks off after a step, before that is saved."""
    from unittest import mock

    import megadpo
    from megadpo.training import step, trainer

    seen: Order = []
    take_step, save = step.optimizer_step, trainer.save_where_due

    def watched(engine: Any, reference: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        hashes = [hashlib.sha256(each.tokens_T.numpy().tobytes()).hexdigest() for each in batch.micro_batches]
        seen.append((batch.group_ids.tolist(), hashes))
        return take_step(engine, reference, batch, *rest, **options)

    def save_or_break_off(run: Any, done: int, *ends: bool) -> bool:
        if done == breaks_off_after:
            raise _BrokenOff
        return save(run, done, *ends)

    with mock.patch.object(step, "optimizer_step", watched), mock.patch.object(trainer, "save_where_due", save_or_break_off):
        try:
            megadpo.train(settings)
            assert breaks_off_after is None
        except _BrokenOff:
            pass
    return seen


def _each_trained(runs: list[tuple[dict[str, Any], int | None]]) -> list[Order]:
    return [_trained(*run) for run in runs]


@dataclass
class Outcome:
    """What a case and its whole run have left. Orders are those of each rank."""

    broken: list[Order]
    resumed: list[Order]
    whole: list[Order]
    directory: Path
    whole_directory: Path


class Outcomes(dict[Case, Outcome]):
    """Of every case, made with the others of its part and number of workers: two worlds for all of them."""

    def __init__(self, files: Path, root: Path) -> None:
        super().__init__()
        self._files, self._root = files, root

    def __missing__(self, case: Case) -> Outcome:
        part = FAST if case in FAST else [other for other in ALL if other not in FAST]
        cases = [other for other in part if other.workers == case.workers]
        wholes = list({other.whole: other for other in cases}.values())
        breaking = [(self._settings(other, str(other), "cache"), other.saved_at + 1) for other in cases]
        broken = run_world(case.workers, _each_trained, breaking)
        going_on = [(self._settings(other, str(other), "another cache"), None) for other in cases]
        root = self._root / ("fast" if case in FAST else "all others")
        going_on += [(other.settings(self._files, root / other.whole, "another cache"), None) for other in wholes]
        gone_on = run_world(case.workers, _each_trained, going_on)
        for number, other in enumerate(cases):
            whole = len(cases) + next(place for place, run in enumerate(wholes) if run.whole == other.whole)
            self[other] = Outcome(
                *(
                    [orders[place] for orders in found]
                    for found, place in ((broken, number), (gone_on, number), (gone_on, whole))
                ),
                self._root / str(other),
                root / other.whole,
            )
        return self[case]

    def _settings(self, case: Case, name: str, cache: str) -> dict[str, Any]:
        return case.settings(self._files, self._root / name, cache)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    files = save_files(
        tmp_path_factory.mktemp("files"), "qwen3", 20, num_hidden_layers=1, hidden_size=32, intermediate_size=48
    )
    rows = (files / "train.jsonl").read_text().splitlines(keepends=True)
    for count in (12, 13):
        (files / f"{count}.jsonl").write_text("".join(rows[:count]))
    return Outcomes(files, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in ALL if case not in FAST)], ids=str
)
def test_a_run_that_broke_off_goes_on_as_the_one_that_did_not(case: Case, outcomes: Outcomes) -> None:
    outcome, saved_at = outcomes[case], case.saved_at
    for broken, resumed, whole in zip(outcome.broken, outcome.resumed, outcome.whole, strict=True):
        assert len(broken) == saved_at + 1 and broken == whole[: saved_at + 1]
        assert resumed == whole[saved_at:], "the first step is the one after the checkpoint"
    num_batches = {
        sum(len(batches) for _, batches in step) for step in zip(*outcome.whole, strict=True) if len(step[0][0]) == 4
    }
    assert num_batches == {case.workers} if case.batches == "whole" else min(num_batches) > case.workers
    order = [group for groups, _ in outcome.whole[0] for group in groups]
    first, second = order[: case.num_rows], order[case.num_rows :]
    assert [len(groups) for groups, _ in outcome.whole[0]] == case.num_samples
    assert sorted(first) == list(range(case.num_rows)), "an epoch sees every row once"
    assert len(set(second)) == len(second) == sum(case.num_samples) - case.num_rows and second != first[: len(second)]
    metrics = read_metrics(outcome.directory)
    assert [record["step"] for record in metrics] == list(range(1, len(case.num_samples) + 1))
    assert metrics == read_metrics(outcome.whole_directory)
    assert_same_weights(outcome.directory, outcome.whole_directory)


def test_there_are_36_cases_of_which_the_fast_ones_have_every_value_of_every_axis() -> None:
    assert len(set(ALL)) == 36 and set(FAST) < set(ALL) and len(set(FAST)) == 6
    for axis in ("rows", "batches", "place", "workers"):
        assert {getattr(case, axis) for case in FAST} == {getattr(case, axis) for case in ALL}
