"""Reference log-probs on disk: whole files, and the shards that a run leaves while its reference still computes them.

A whole cache is one file, `<key>.safetensors`. Until every response is known, each run adds shards of what it has computed
to `<key>.parts/`, under names of its own: a run that was killed goes on from its shards, and runs with the same key read
each other's when they start.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from megadpo.data.batches.bin_packing import FloatArray, IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.files import replacing
from megadpo.parallel.context import is_first_rank_of_stage
from megadpo.platform.device import compute_device

SECONDS_BETWEEN_SHARDS = 60.0


class LogpTable:
    """The reference log-probs of a data set, as far as they are known: the same on every rank.

    Args:
        path: of the whole cache.
        log: shows the user a line.

    Attributes:
        logps_R: float64, of every response of `groups`; nan where it is not known.
        num_unknown: of them.
    """

    def __init__(self, path: Path, groups: GroupStore, log: Callable[[str], None]) -> None:
        """Reads what is on disk; collective. Rank 0 reads and writes, the values reach the others over the process group.

        Raises:
            UserError: a file of the cache is damaged.
        """
        self.path, self.groups, self._log = path, groups, log
        found_R = _read_all(path, groups.num_responses) if dist.get_rank() == 0 else np.zeros(groups.num_responses)
        shared = torch.from_numpy(found_R).to(compute_device())
        dist.broadcast(shared, 0)
        self.logps_R: FloatArray = shared.cpu().numpy()
        self.num_unknown = int(np.isnan(self.logps_R).sum())
        self._unwritten: list[tuple[IntArray, FloatArray]] = []
        self._written_at = time.monotonic()
        self._name, self._num_shards = uuid.uuid4().hex, 0

    @property
    def is_whole(self) -> bool:
        """Whether every response is known."""
        return self.num_unknown == 0

    def knows(self, group_ids: IntArray) -> bool:
        """Whether all responses of the groups `group_ids` are known."""
        return not np.isnan(self.logps_R[self.groups.response_ids_of(group_ids)]).any()

    def add(self, group_ids: IntArray, micro_batches: Sequence[MicroBatch], logps: Sequence[Tensor | None]) -> None:
        """Take in what was computed of a global batch of the groups `group_ids`; collective.

        Args:
            micro_batches: this replica's.
            logps: [R] of each of them, on last stages; elsewhere it may be empty.
        """
        responses = np.unique(self.groups.response_ids_of(group_ids))
        values = torch.full((len(responses),), -torch.inf, dtype=torch.float64, device=compute_device())
        if is_first_rank_of_stage():
            for micro_batch, logps_R in zip(micro_batches, logps, strict=False):
                assert logps_R is not None
                places = np.searchsorted(responses, self.groups.response_ids_of(micro_batch.group_ids))
                values[torch.from_numpy(places).to(values.device)] = logps_R
        # One rank of each replica brings each value; a group that the batch has twice counts once.
        dist.all_reduce(values, dist.ReduceOp.MAX)
        self.num_unknown -= int(np.isnan(self.logps_R[responses]).sum())
        self.logps_R[responses] = values.cpu().numpy()
        self._unwritten.append((responses, self.logps_R[responses]))
        if self.is_whole or time.monotonic() - self._written_at > SECONDS_BETWEEN_SHARDS:
            self.write()

    def write(self) -> None:
        """Put what is not on disk there; of a whole table, the file that takes the shards' place."""
        unwritten, self._unwritten, self._written_at = self._unwritten, [], time.monotonic()
        if dist.get_rank() != 0 or not unwritten or self.path.is_file():
            return
        parts = parts_of(self.path)
        try:
            if self.is_whole:
                write_logps(self.path, {"logps_R": self.logps_R})
                shutil.rmtree(parts, ignore_errors=True)
                return
            responses, logps = (np.concatenate(columns) for columns in zip(*unwritten, strict=True))
            write_logps(parts / f"{self._name}-{self._num_shards}.safetensors", {"responses": responses, "logps": logps})
            self._num_shards += 1
        except OSError as error:
            # The run does not need it: another run, or this one when it is resumed, would compute it again.
            self._log(f"warning: the reference cache {self.path} cannot be written ({error}); going on without")


def parts_of(path: Path) -> Path:
    """The directory of the shards of a cache that is not whole."""
    return path.with_suffix(".parts")


def read_logps(path: Path, num_responses: int) -> FloatArray:
    """A whole cache.

    Raises:
        UserError: it is damaged, or not of so many responses.
    """
    logps_R: FloatArray = _load(path)["logps_R"]
    if logps_R.shape != (num_responses,):
        raise UserError(f"the reference cache {path} holds {logps_R.shape} values, not {(num_responses,)}; delete it")
    return logps_R


def write_logps(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A file of the cache, whole or not at all.

    Raises:
        OSError: the disk is full or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            save_file(arrays, partial)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _read_all(path: Path, num_responses: int) -> FloatArray:
    """What whole cache and shards know; nan for the rest."""
    logps_R = np.full(num_responses, np.nan)
    for shard in _shards(path):
        responses, logps = shard["responses"], shard["logps"]
        if responses.shape != logps.shape or responses.min(initial=0) < 0 or responses.max(initial=0) >= num_responses:
            raise UserError(f"the reference cache {parts_of(path)} is not of this data set; delete it")
        logps_R[responses] = logps
    # Another run may have made the whole file, and removed the shards, while they were read.
    return read_logps(path, num_responses) if path.is_file() else logps_R


def _shards(path: Path) -> Iterator[dict[str, np.ndarray]]:
    for part in sorted(parts_of(path).glob("*.safetensors")):
        try:
            yield _load(part)
        except UserError:
            if part.exists():
                raise


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the reference cache {path} is damaged ({error}); delete it") from error
