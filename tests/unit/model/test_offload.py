"""What is saved for the backward pass really goes, once, comes back as it was, and what is kept anyway stays."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megadpo.errors import UserError
from megadpo.model import offload
from megadpo.model.offload import Files, Offloader

SIZE = 512


class Layers(torch.nn.Module):
    """Three layers, each of which saves a storage twice: whole, and as a view of its half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.randn(SIZE, SIZE) / 16 for _ in range(3))
        self.decoder = SimpleNamespace(input_tensor=None)
        self.made: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight
            self.made.append(StorageWeakRef(x.untyped_storage()))
            x = x.sin() * torch.cat([x[:, SIZE // 2 :], x[:, : SIZE // 2]], dim=1).cos()
        return x.sum()


def gradients(model: Layers, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).backward()
    return [weight.grad.clone() for weight in model.weights]


@pytest.fixture
def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(SIZE + 64 * number, SIZE) for number in range(3)]


@pytest.mark.parametrize("window_mib", [0, 3, 1000])
def test_gradients_are_the_same_with_three_passes_away_at_once_and_in_any_order(tmp_path, inputs, window_mib):
    model = Layers()
    expected = [gradients(model, x) for x in inputs]
    offloader = Offloader(Files(tmp_path), window_mib << 20)
    offloader.follow(model)
    losses = [model(x) for x in inputs]
    for number in (1, 0, 2):
        model.zero_grad()
        losses[number].backward()
        assert all(torch.equal(w.grad, e) for w, e in zip(model.weights, expected[number], strict=True))
    assert not list(tmp_path.iterdir()), "files have no names that a broken run could leave behind"


def test_what_is_away_takes_no_memory_and_goes_once(tmp_path, inputs):
    model, x = Layers(), inputs[0]
    offloader = Offloader(Files(tmp_path), 0)
    offloader.follow(model)
    loss = model(x)
    assert len(model.made) == 3 and all(storage.expired() for storage in model.made)
    # A layer saves its input, x (for the sine and, in halves, the cosine: autograd saves what they are put together to),
    # sine and cosine; the first input is the caller's, whom the offloader does not know.
    assert offloader.num_bytes_moved == 3 * 5 * x.nbytes
    loss.backward()


def test_parameters_and_the_input_that_the_schedule_holds_stay(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    model, x = Layers(), inputs[0].requires_grad_()
    model.decoder.input_tensor = x
    offloader = Offloader(Files(tmp_path), 0)
    offloader.follow(model)
    model(x).backward()
    assert offloader.num_bytes_moved == (3 * 5 - 1) * x.nbytes


def test_a_forward_pass_without_gradients_moves_nothing(tmp_path, inputs):
    model = Layers()
    offloader = Offloader(Files(tmp_path), 0)
    offloader.follow(model)
    with torch.no_grad():
        model(inputs[0])
    assert offloader.num_bytes_moved == 0


def test_what_the_backward_pass_needs_next_is_fetched_before_it_asks(tmp_path, inputs, monkeypatch):
    events: list[str] = []
    start, take = offload._InFile.start_fetch, offload._InFile.fetched
    monkeypatch.setattr(offload._InFile, "start_fetch", lambda copy: (events.append("start"), start(copy))[1])
    monkeypatch.setattr(offload._InFile, "fetched", lambda copy: (events.append("take"), take(copy))[1])
    model, x = Layers(), inputs[0]
    offloader = Offloader(Files(tmp_path), 3 * x.nbytes)
    offloader.follow(model)
    model(x).backward()
    ahead = [events[: place + 1].count("start") - events[: place + 1].count("take") for place in range(len(events))]
    assert events.count("take") == events.count("start") > 3
    assert max(ahead) == 1 + 3, "what was asked for, and as much as the window holds"


class NoStream:
    """A stream, and an event, of a device that does everything at once; it notes what was asked of it."""

    asked: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *unused: (self.asked.append(name), self)[1]


def test_pinned_memory_follows_the_same_protocol(inputs, monkeypatch):
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(offload.torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    model, x = Layers(), inputs[0]
    expected = gradients(model, x)
    for window in (0, 2 * x.nbytes):
        model.made.clear()
        follower = Layers()
        offloader = Offloader(offload.PinnedMemory(), window)
        offloader.follow(follower)
        loss = follower(x)
        assert sum(storage.expired() for storage in follower.made) >= 2
        loss.backward()
        assert all(torch.equal(w.grad, e) for w, e in zip(follower.weights, expected, strict=True))
    assert {"wait_stream", "wait_event", "record_event"} <= set(NoStream.asked)


def test_a_full_disk_is_one_sentence(tmp_path, inputs, monkeypatch):
    def full(*unused: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(offload.os, "pwrite", full)
    model = Layers()
    Offloader(Files(Path(tmp_path)), 0).follow(model)
    with pytest.raises(UserError, match=r"^train.activation_offload_dir: .* No space left on device; choose a larger disk"):
        model(inputs[0])
    monkeypatch.undo()
    monkeypatch.setattr(offload, "MIN_BYTES", 1 << 60)
    model(inputs[0]).backward()  # the hooks are gone with the pass that failed
