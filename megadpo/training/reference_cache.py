"""Reference log-probs on disk: whole files, and the shards that a run leaves while its reference still computes them.

A whole cache is one file, `<key>.safetensors`. Until every response is known, each run adds shards of what it has computed
to `<key>.parts/`, under names of its own: a run that was killed goes on from its shards, and runs with the same key read
each other's when they start. Every file has the hash of what it holds and its cache's key; a damaged one is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from megadpo.data.batches.bin_packing import FloatArray, IntArray
from megadpo.data.batches.micro_batch import MicroBatch
from megadpo.data.rows.dataset import CACHE_SETTING
from megadpo.data.store import GroupStore
from megadpo.errors import UserError, reason
from megadpo.files import cannot_be_used, put_away, replacing
from megadpo.parallel.context import is_first_rank_of_stage
from megadpo.platform.device import compute_device
from megadpo.training.non_finite import require_finite_logps

SECONDS_BETWEEN_SHARDS = 60.0
HASH = "xxh3_128"
"""Under this name a file's metadata have the hash of its arrays."""


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
            UserError: a file of the cache cannot be read.
        """
        self.path, self.groups, self._log = path, groups, log
        found_R = _read_all(path, groups.num_responses, log) if dist.get_rank() == 0 else np.zeros(groups.num_responses)
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

        Raises:
            UserError: a log-prob is not finite: of which rows.
        """
        responses = np.unique(self.groups.response_ids_of(group_ids))
        values = torch.full((len(responses),), -torch.inf, dtype=torch.float64, device=compute_device())
        if is_first_rank_of_stage():
            for micro_batch, logps_R in zip(micro_batches, logps, strict=False):
                assert logps_R is not None
                places = np.searchsorted(responses, self.groups.response_ids_of(micro_batch.group_ids))
                bad = torch.inf  # a maximum passes nan over, and infinity on
                values[torch.from_numpy(places).to(values.device)] = torch.nan_to_num(logps_R, bad, bad, bad)
        # One rank of each replica brings each value; a group that the batch has twice counts once.
        dist.all_reduce(values, dist.ReduceOp.MAX)
        require_finite_logps(self.groups, responses, values.cpu().numpy())
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
            shard = parts / f"{self._name}-{self._num_shards}.safetensors"
            write_logps(shard, {"responses": responses, "logps": logps}, self.path.stem)
            self._num_shards += 1
        except (OSError, SafetensorError) as error:
            # The run does not need it: another run, or this one when it is resumed, would compute it again.
            self._log(f"warning: the reference cache {self.path} cannot be written ({error}); going on without")


def parts_of(path: Path) -> Path:
    """The directory of the shards of a cache that is not whole."""
    return path.with_suffix(".parts")


def read_logps(path: Path, num_responses: int, log: Callable[[str], None]) -> FloatArray | None:
    """A whole cache of so many responses; None where there is none, or one that is damaged, which is removed.

    Raises:
        UserError: it cannot be read.
    """

    def check(arrays: dict[str, np.ndarray]) -> FloatArray:
        logps_R: FloatArray = arrays["logps_R"]
        if logps_R.shape != (num_responses,) or logps_R.dtype != np.float64 or not np.isfinite(logps_R).all():
            raise ValueError(f"it holds {logps_R.dtype} {logps_R.shape}, not {num_responses} finite numbers")
        return logps_R

    return _read(path, path.stem, check, log)


def write_logps(path: Path, arrays: dict[str, np.ndarray], key: str | None = None) -> None:
    """A file of the cache, whole or not at all, with the hash of what it holds and the key of its cache (None: its name).

    Raises:
        OSError: the disk is full or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            save_file(arrays, partial, metadata={HASH: _hash_of(arrays), "key": key or path.stem})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _read_all(path: Path, num_responses: int, log: Callable[[str], None]) -> FloatArray:
    """What whole cache and shards know; nan for the rest."""

    def check(arrays: dict[str, np.ndarray]) -> tuple[IntArray, FloatArray]:
        responses, logps = arrays["responses"], arrays["logps"]
        if responses.shape != logps.shape or responses.dtype.kind != "i" or not np.isfinite(logps).all():
            raise ValueError(
                f"it holds {responses.shape} responses and {logps.shape} log-probs, or some that are not finite"
            )
        if responses.min(initial=0) < 0 or responses.max(initial=0) >= num_responses:
            raise ValueError(f"it has responses beyond the {num_responses} that there are")
        return responses, logps

    logps_R = np.full(num_responses, np.nan)
    for part in _listed(parts_of(path)):
        shard = _read(part, path.stem, check, log)
        if shard is not None:
            logps_R[shard[0]] = shard[1]
    # Another run may have made the whole file, and removed the shards, while they were read.
    whole = read_logps(path, num_responses, log)
    return logps_R if whole is None else whole


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(
            path for path in directory.iterdir() if path.suffix == ".safetensors" and not path.name.startswith(".")
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(cannot_be_used(CACHE_SETTING, directory, error)) from error


T = TypeVar("T")


def _read(path: Path, key: str, check: Callable[[dict[str, np.ndarray]], T], log: Callable[[str], None]) -> T | None:
    """What `check` makes of a file's arrays, which are compared with their hash; None where the file is gone or damaged."""
    try:
        if not os.path.lexists(path):
            return None
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if about.get("key") != key or about.get(HASH) != _hash_of(arrays):
            raise ValueError("it is not what was written under this name")
        return check(arrays)
    except PermissionError as error:
        raise UserError(cannot_be_used(CACHE_SETTING, path, error)) from error
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if not os.path.lexists(path):
            return None  # another run has removed it, since all is known
        log(f"the reference cache {path} is damaged ({reason(error)}): what it held is computed again")
        with contextlib.suppress(OSError):  # another user's, perhaps: what replaces it will fail as well, and say so
            put_away(path)
        return None


def _hash_of(arrays: dict[str, np.ndarray]) -> str:
    hasher = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name} {array.dtype.str} {array.shape};".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()
