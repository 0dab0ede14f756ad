"""The training state of a checkpoint, read strictly: every field of its type, every tensor of the model there."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadpo.checkpoint.passthrough import PASSTHROUGH
from megadpo.checkpoint.sharded import Checkpoint, open_checkpoint, step_of
from megadpo.config.schema import TrainConfig
from megadpo.data.rows.stream import Position
from megadpo.errors import UserError

MAY_CHANGE = ("base_model_name_or_path",)
"""Of an adapter's settings, what a run may go on with that has changed."""
FIRST_OPTIMIZER = {"name": "adamw", "freeze": []}
"""Of checkpoints of versions that had no other."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run was when its checkpoint was written.

    Attributes:
        step: optimizer steps done.
        num_steps: that the run was planned for.
        num_tokens: stream tokens trained on, padding left out.
        delta: BCO's running mean of the rewards: their sum and their count.
        metrics: the last ones of every name.
        inputs: digests of what the run was made from, see inputs.py; earlier versions knew the data's only, and had nothing
            in 4 bits.
        spikes: of `train.on_spike`; earlier versions had none.
        evaluation_due: the evaluation after `step` was left out; earlier versions left none out.
        best: what the evaluations have given, see metrics/best.py; earlier versions did not look for it.
        ended: why the run has ended with `step`, before its last one, and by what; empty: it has not.
        random_state: of torch's generator on the CPU.
        position: of a stream of training groups, after `step`.
    """

    step: int
    num_steps: int
    num_tokens: int
    delta: tuple[float, int]
    metrics: dict[str, float]
    inputs: dict[str, str]
    spikes: dict[str, Any]
    evaluation_due: bool
    best: dict[str, Any]
    ended: dict[str, str]
    random_state: Tensor
    position: Position | None = None

    @staticmethod
    def of(checkpoint: Checkpoint) -> TrainingState:
        """The state of a checkpoint that training wrote.

        Raises:
            UserError: a field is missing or not what it must be, or the step is not the one in the directory's name.
        """
        state, where = checkpoint.state, checkpoint.directory
        fields = _Fields(state, where)
        step = fields.count("step")
        if step_of(where) not in (None, step):
            raise UserError(f"{where}: its state is of step {step}, not of the step in its name; it is damaged")
        return TrainingState(
            step=step,
            num_steps=fields.count("num_steps"),
            num_tokens=fields.count("num_tokens"),
            delta=fields.delta(),
            metrics=fields.numbers("metrics"),
            inputs={"data": fields.text("data_digest"), "quantization": "none", **fields.texts("inputs")},
            spikes=fields.spikes(),
            evaluation_due=state.get("evaluation_due") is True,
            best=fields.best(),
            ended=fields.texts("ended"),
            random_state=fields.random_state("rng"),
            position=fields.position("stream"),
        )


@dataclass(frozen=True)
class _Fields:
    """The fields of a state, each of its type or refused."""

    state: dict[str, Any]
    where: Path

    def _refuse(self, name: str, expected: str) -> UserError:
        what = f"{name} {str(self.state[name])[:40]!r}, which is not {expected}" if name in self.state else f"no {name}"
        return UserError(f"{self.where}: its state has {what}; it is damaged")

    def count(self, name: str) -> int:
        value = self.state.get(name)
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise self._refuse(name, "a count")
        return value

    def text(self, name: str) -> str:
        value = self.state.get(name)
        if not isinstance(value, str):
            raise self._refuse(name, "a text")
        return value

    def numbers(self, name: str) -> dict[str, float]:
        values = self.state.get(name)
        if not isinstance(values, dict) or not all(_is_number(value) for value in values.values()):
            raise self._refuse(name, "names with finite numbers")
        return dict(values)

    def section(self, name: str) -> dict[str, Any]:
        """Empty where there is none."""
        values = self.state.get(name, {})
        if not isinstance(values, dict):
            raise self._refuse(name, "an object")
        return dict(values)

    def spikes(self) -> dict[str, Any]:
        values = self.section("spikes")
        lists = [values.get(name, []) for name in ("losses", "norms")]
        counts = [values.get(name, 0) for name in ("num_left_out", "num_in_a_row")]
        are_lists = all(isinstance(each, list) and all(map(_is_number, each)) for each in lists)
        if not are_lists or not all(type(each) is int and each >= 0 for each in counts):
            raise self._refuse("spikes", "the last losses and norms with counts")
        return values

    def best(self) -> dict[str, Any]:
        values = self.section("best")
        found, count = values.get("found", []), values.get("num_without", 0)
        are_pairs = isinstance(found, list) and all(isinstance(one, list) and len(one) == 2 for one in found)
        if (
            not are_pairs
            or not all(type(step) is int and _is_number(value) for step, value in found)
            or type(count) is not int
        ):
            raise self._refuse("best", "steps with the best metrics and a count")
        return {"metric": None, "found": [], "num_without": 0, **values}

    def texts(self, name: str) -> dict[str, str]:
        values = self.section(name)
        if not all(isinstance(value, str) for value in values.values()):
            raise self._refuse(name, "names with texts")
        return values

    def delta(self) -> tuple[float, int]:
        """Checkpoints of the first versions have none."""
        value = self.state.get("delta", [0.0, 0])
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)) or value[1] != int(value[1]):
            raise self._refuse("delta", "a sum and a count")
        return float(value[0]), int(value[1])

    def random_state(self, name: str) -> Tensor:
        try:
            state = torch.frombuffer(bytearray(base64.b64decode(self.text(name), validate=True)), dtype=torch.uint8)
            torch.Generator().set_state(state)
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._refuse(name, "the state of a random generator") from error
        return state

    def position(self, name: str) -> Position | None:
        if name not in self.state:
            return None
        try:
            return Position.of(self.section(name))
        except (KeyError, TypeError, ValueError) as error:
            raise self._refuse(name, "a position in a stream") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def open_training_state(
    directory: Path,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    adapter: Mapping[str, Any] | None,
    optimizer: Mapping[str, Any],
    with_reference: bool,
    verify: bool,
) -> tuple[Checkpoint, TrainingState]:
    """A checkpoint that training can go on from: its own hash, the sizes of its files, its state, its tensors' shapes.

    Args:
        shapes: of what is trained and what the optimizer keeps of it, by kind and logical name.
        adapter: what its state must say of adapters; None: the whole model is trained.
        optimizer: what it must say of the optimizer (`optimizer_record`).
        with_reference: a moving reference is part of it.
        verify: as in `open_checkpoint`.

    Raises:
        UserError: naming what is damaged or missing; or that it is a converted model without a training state.
    """
    checkpoint = open_checkpoint(directory, verify)
    if "data_digest" not in checkpoint.state and not set(checkpoint.kinds) - {"weights", PASSTHROUGH}:
        raise UserError(f"{directory} holds no training state to resume from; it is a converted model")
    state = TrainingState.of(checkpoint)
    _check_adapter(checkpoint, adapter)
    _check_optimizer(checkpoint, optimizer)
    for kind, sizes in (dict(shapes) | ({"reference": shapes["weights"]} if with_reference else {})).items():
        source = checkpoint.source(kind)
        found = set(source.names())
        for name, size in sizes.items():
            if name not in found:
                raise UserError(f"{directory}: it has no {kind} of {name}; it is damaged")
            if tuple(source.shape(name)) != size:
                found_size = list(source.shape(name))
                raise UserError(f"{directory}: {kind} of {name} has shape {found_size}, not the model's {list(size)}")
    return checkpoint, state


def optimizer_record(train: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says of the optimizer: a run that goes on from it must say the same."""
    record: dict[str, Any] = {"name": train.optimizer, "freeze": sorted(train.freeze)}
    return record | ({"has_momentum": train.momentum != 0} if train.optimizer in ("sgd", "muon") else {})


def _check_optimizer(checkpoint: Checkpoint, optimizer: Mapping[str, Any]) -> None:
    """The checkpoint has what this run's optimizer keeps."""
    stored, where = checkpoint.state.get("optimizer", FIRST_OPTIMIZER), checkpoint.directory
    if not isinstance(stored, dict):
        raise UserError(f"{where}: its state's optimizer is {str(stored)[:40]!r}, which is no object; it is damaged")
    for name, option in (("name", "optimizer"), ("freeze", "freeze"), ("has_momentum", "momentum")):
        if stored.get(name) != optimizer.get(name):
            now, then = (
                ("above 0" if record.get(name) else "0") if name == "has_momentum" else record.get(name)
                for record in (optimizer, stored)
            )
            raise UserError(
                f"{where} is of a run with train.{option} {then}, and this one has {now}; set it alike, or begin anew from "
                "what that run has exported"
            )


def _check_adapter(checkpoint: Checkpoint, adapter: Mapping[str, Any] | None) -> None:
    """The checkpoint is of the same adapters: what they compute depends on more than their tensors' shapes."""
    stored, where = checkpoint.state.get("adapter"), checkpoint.directory
    if (stored is None) != (adapter is None):
        kinds = ("adapters", "the whole model") if adapter is None else ("the whole model", "adapters")
        raise UserError(
            f"{where} is of a run that trains {kinds[0]}, and this one trains {kinds[1]}; set adapter.kind alike"
        )
    if adapter is None:
        return
    if not isinstance(stored, dict):
        raise UserError(f"{where}: its state's adapter is {str(stored)[:40]!r}, which is no object; it is damaged")
    for name in adapter:
        if name not in MAY_CHANGE and stored.get(name) != adapter[name]:
            raise UserError(
                f"{where}: its adapters have {name} {stored.get(name)!r}, and this run's {adapter[name]!r}; give the "
                "options that it was made with"
            )
