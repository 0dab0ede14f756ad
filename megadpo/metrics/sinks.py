"""Where a step's metrics go: `metrics.jsonl`, TensorBoard, experiment trackers (background.py, trackers.py), the terminal.
Rank 0 writes; the others open no sinks.

A record is flat: names to numbers, `step` among them. A step may have several records (a step's own, its evaluation's).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megadpo.errors import UserError
from megadpo.files import expanded, make_directory, replacing
from megadpo.metrics.background import BackgroundSink, Record
from megadpo.metrics.progress import ProgressSink
from megadpo.metrics.trackers import KEPT, TRACKERS, TrackedRun
from megadpo.secrets.redact import redact

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the records of a run, in order."""

    def write(self, record: Record) -> None:
        """Takes one record; it has a `step`."""

    def close(self, has_failed: bool = False) -> None:
        """Nothing is written afterwards. Trackers are told whether the run `has_failed`."""


class LoggingOptions(Protocol):
    """The part of the configuration that sinks read: its section `logging`."""

    @property
    def every(self) -> int: ...

    @property
    def tensorboard(self) -> bool: ...

    @property
    def trackers(self) -> list[str]: ...

    @property
    def project(self) -> str: ...

    @property
    def run_name(self) -> str | None: ...

    @property
    def tags(self) -> list[str]: ...

    @property
    def directory(self) -> str | None: ...

    @property
    def offline(self) -> bool: ...


class JsonlSink:
    """One strict JSON object a line, flushed at once.

    JSON has no word for nan and infinity: such a value is written as null and spelled out under `non_finite`, as in
    `{"step": 3, "loss": null, "non_finite": {"loss": "nan"}}`.

    Args:
        path: the file.
        resume_step: the last step that the resumed checkpoint has done: lines of later steps are dropped (they will be
            written anew), as is a half line left by a process that was killed. None for a new run: an older file with
            anything in it is kept under the next free name, metrics.1.jsonl, metrics.2.jsonl, …
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        self._path = path = Path(path)
        with _refusals_of(path):
            keep_earlier(path, resume_step)
            self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Appends the record as a line, or nothing of it.

        Raises:
            UserError: the disk is full or refuses.
        """
        end = self._file.seek(0, os.SEEK_END)
        line = to_line(record).encode()
        with _refusals_of(self._path):
            try:
                while line:  # a disk that has filled takes a part of it first
                    line = line[self._file.write(line) :]
            except OSError:
                self._file.truncate(end)
                raise

    def close(self, has_failed: bool = False) -> None:
        """Closes the file."""
        with _refusals_of(self._path):
            self._file.close()


@contextlib.contextmanager
def _refusals_of(path: Path) -> Iterator[None]:
    """What the disk refuses within, as a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def to_line(record: Record) -> str:
    """The record as a line of strict JSON, its end included."""
    line: dict[str, object] = dict(record)
    non_finite = {name: str(float(value)) for name, value in record.items() if not math.isfinite(value)}
    if non_finite:
        line |= dict.fromkeys(non_finite)
        line["non_finite"] = non_finite
    return json.dumps(line, allow_nan=False) + "\n"


def set_aside(path: Path) -> Path:
    """Renames a file or directory to the first free of name.1.suffix, name.2.suffix, … and returns that."""
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)
    return other


def keep_earlier(path: Path, kept_step: int | None) -> None:
    """Of a file with a line a record, keep what this run has written up to `kept_step`; None: what is there is another
    run's, and is put aside where there is anything."""
    if kept_step is not None and path.exists():
        drop_later_steps(path, kept_step)
    elif path.exists() and path.stat().st_size:
        set_aside(path)


def drop_later_steps(path: Path, last_step: int) -> None:
    """Keeps the lines of steps up to `last_step`, byte by byte; the file is replaced whole or not at all."""
    kept, num_broken = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        step = step_of(line)
        if step is None:
            num_broken += 1
        elif step <= last_step:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if num_broken:
        logger.warning("%s: dropped %d line(s) that are not whole records", path, num_broken)
    with replacing(path) as half_written, half_written.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())


def step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, or None if it is not a whole record."""
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


class TensorBoardSink:
    """Scalars for TensorBoard, under the metrics' names.

    Args:
        directory: of the event files.
        resume_step: events of later steps, written before the run was resumed, are hidden.

    Raises:
        UserError: the package `tensorboard` is not installed.
    """

    def __init__(self, directory: Path | str, resume_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"logging.tensorboard is true but TensorBoard cannot be imported ({error}): "
                "run `pip install tensorboard`, or set logging.tensorboard=false"
            ) from error
        self._directory = Path(directory)
        purge_step = None if resume_step is None else resume_step + 1
        with _refusals_of(self._directory):
            self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge_step)
            # An error of its thread is raised by the next call; the thread would print a traceback of it, too.
            writer = self._writer.file_writer
            if writer is not None:
                writer.event_writer._async_writer._worker._invoke_excepthook = lambda *unused: None

    def write(self, record: Record) -> None:
        """One scalar a metric, at the record's step.

        Raises:
            UserError: the disk is full or refuses.
        """
        with _refusals_of(self._directory):
            for name, value in record.items():
                if name not in ("step", "time"):
                    self._writer.add_scalar(name, value, int(record["step"]))

    def close(self, has_failed: bool = False) -> None:
        """Writes what is still in memory.

        Raises:
            UserError: the disk is full or refuses.
        """
        with _refusals_of(self._directory):
            self._writer.close()


def open_sinks(
    output_dir: Path | str,
    logging_config: LoggingOptions,
    total_steps: int,
    resume_step: int | None = None,
    keeps_records: bool = True,
    config: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = logger.warning,
    held_out: Sequence[str] = ("",),
) -> list[Sink]:
    """The sinks of a run, for rank 0: `output_dir/metrics.jsonl`, `output_dir/tensorboard/`, trackers, progress on stderr.

    Args:
        output_dir: made if it does not exist.
        logging_config: the configuration's section `logging`.
        total_steps: steps of the whole run.
        resume_step: the last step already done if the run is resumed, else None.
        keeps_records: whether what was written up to that step is this run's; else it is set aside.
        config: the run's configuration, for trackers, without secrets.
        log: shows the user a line, from any thread.
        held_out: the names of the sets that are evaluated.

    Raises:
        UserError: `logging.tensorboard` is on and TensorBoard is not installed; nothing is written then.
    """
    output_dir = Path(output_dir)
    sinks: list[Sink] = []
    kept_step = resume_step if keeps_records else None
    if logging_config.tensorboard:
        events = output_dir / "tensorboard"
        if kept_step is None and events.exists():
            with _refusals_of(events):
                set_aside(events)
        sinks.append(TensorBoardSink(events, kept_step))
    make_directory(output_dir, "output_dir")
    sinks.append(JsonlSink(output_dir / "metrics.jsonl", kept_step))
    run = _tracked(output_dir, logging_config, kept_step is not None, config or {}, log)
    sinks += [BackgroundSink(name, partial(TRACKERS[name], run), log) for name in logging_config.trackers]
    sinks.append(ProgressSink(total_steps, resume_step, logging_config.every, held_out=held_out))
    return sinks


def _tracked(
    output_dir: Path, options: LoggingOptions, is_resumed: bool, config: Mapping[str, Any], log: Callable[[str], None]
) -> TrackedRun:
    directory = output_dir / "trackers" if options.directory is None else expanded(options.directory, "logging.directory")
    return TrackedRun(
        project=redact(options.project),
        name=redact(options.run_name or output_dir.absolute().name),
        directory=directory,
        has_chosen_directory=options.directory is not None,
        is_offline=options.offline,
        kept=output_dir / KEPT,
        is_resumed=is_resumed,
        tags=[redact(tag) for tag in options.tags],
        config=config,
        log=log,
    )


def close_all(sinks: Sequence[Sink], has_failed: bool) -> Iterator[UserError]:
    """Close every sink, trackers all at the same time; what cannot be written."""
    for sink in sinks:
        if isinstance(sink, BackgroundSink):
            sink.begin_close(has_failed)
    for sink in sinks:
        try:
            sink.close(has_failed)
        except UserError as error:
            yield error
