"""All checks in their order: versions first, as nothing else works without them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadpo.config.schema import Config
from megadpo.doctor.check import Check, has_failed
from megadpo.doctor.versions import check_versions
from megadpo.errors import UserError, reason
from megadpo.launch.supervisor import start_workers


def examine(config: Config | None) -> Iterator[Check]:
    """The checks of this machine, and of a configuration where one is given.

    What needs packages is looked at only where all of them are there.
    """
    versions = list(check_versions())
    yield from versions
    if has_failed(versions):
        return
    from megadpo.doctor.files import check_directories
    from megadpo.doctor.machine import check_machine

    if config is None:
        yield from check_machine()
        return
    yield from _of_model(config)
    yield from check_directories(config)
    yield from _disk(config)
    if config.hub.push is not None:
        yield pushing(config.hub.push, config.hub.private)


def _of_model(config: Config) -> Iterator[Check]:
    """The machine, with attention as the model needs it, then the model."""
    from megadpo.doctor.machine import check_machine
    from megadpo.doctor.model import check_model
    from megadpo.inspect.data import open_shape
    from megadpo.model.attention.base import AttentionNeeds
    from megadpo.platform.device import compute_device, resolve_dtype

    needs = None
    with contextlib.suppress(UserError):  # which check_model says
        shape = open_shape(config).shape
        needs = AttentionNeeds.of(shape, compute_device(), resolve_dtype(config.model.dtype))
    yield from check_machine(needs)
    if config.model.path:
        yield from check_model(config)


def pushing(repository: str, is_private: bool) -> Check:
    """Whether the trained model could be pushed from here."""
    from megadpo.platform.hub import check_push

    try:
        return Check("hub.push", "ok", f"{repository}, as {check_push(repository, is_private)}")
    except UserError as error:
        return Check("hub.push", "failed", str(error), "Do what the sentence says, or leave hub.push out.")


def _disk(config: Config) -> Iterator[Check]:
    """Room for checkpoints, where the model can be opened."""
    from megadpo.doctor.files import bytes_needed, check_disk
    from megadpo.inspect.data import open_shape
    from megadpo.model.adapters.spec import adapter_shapes
    from megadpo.model.families import logical_shapes
    from megadpo.training.models import open_model, trained_adapter, with_adapter_s_base

    if not (config.output_dir and config.model.path):
        return
    with contextlib.suppress(UserError):  # which check_model says
        config = with_adapter_s_base(config)
        whole = logical_shapes(open_shape(config).shape)
        trained = whole
        if config.adapter.kind != "none":
            adapter = trained_adapter(config, open_model(config.model.path, "model.path", config))
            assert adapter is not None
            trained = adapter_shapes(open_shape(config).shape, adapter.spec)
        needed = bytes_needed(config, trained, whole)
        yield check_disk(Path(config.output_dir), needed, config.checkpoint.keep)


def examine_ranks(nproc: int, worker: Sequence[str]) -> list[Check]:
    """Starts `nproc` processes here with our launcher, each ``megadpo *worker FILE``, and reads what they found."""
    from megadpo.doctor.ranks import read_checks

    with tempfile.TemporaryDirectory(prefix="megadpo-doctor-") as directory:
        path = Path(directory) / "checks.json"
        try:
            status = start_workers(nproc, [sys.executable, "-m", "megadpo", *worker, str(path)])
            found = read_checks(path)
        except (OSError, ValueError) as error:
            status, found = 1, [Check(f"{nproc} processes", "failed", reason(error), "See what they printed above.")]
    if found is None:
        words = f"they ended with status {status} and said nothing"
        return [Check(f"{nproc} processes", "failed", words, "See what they printed above.")]
    return found
