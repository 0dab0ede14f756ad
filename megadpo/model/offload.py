"""Activations wait for their backward pass outside the accelerator: in pinned host memory or in files.

What autograd saves in a stage's forward pass is copied, storage by storage, to an `OffloadTarget`. The copies run at the
same time as the computation; at most a window of bytes waits to be copied. In the backward pass, storages are fetched
before they are needed, at most a window of bytes ahead. Under pipeline parallelism several micro-batches are offloaded at
once, each in its own order. Bytes are copied as they are, so that gradients keep every bit.

A storage is copied once, whatever views of it are saved, and only if it is large. Storages that stay in memory anyway are
not copied: parameters, and the input that the pipeline schedule holds.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megadpo.errors import UserError
from megadpo.model.activations import Activations

MIN_BYTES = 1 << 20
"""Smaller storages are not offloaded: so many copies would cost more than their memory."""


def offload_activations(models: Sequence[Any], activations: Activations) -> Offloader | None:
    """Make a stage's chunks offload as `activations` says; None where it asks for no offloading."""
    if activations.offload == "none":
        return None
    assert activations.offload == "cpu" or activations.offload_dir is not None
    target = PinnedMemory() if activations.offload_dir is None else Files(activations.offload_dir)
    offloader = Offloader(target, activations.offload_window_mib << 20)
    for model in models:
        offloader.follow(model)
    return offloader


class Copy(Protocol):
    """The offloaded copy of one storage, complete or being written."""

    def wait_until_away(self) -> None:
        """After this call, in the order of the computing stream, the original may be overwritten."""
        ...

    def start_fetch(self) -> None:
        """Begin to copy the bytes back; called once."""
        ...

    def fetched(self) -> Tensor:
        """The bytes, uint8, on the device they came from; after `start_fetch`."""
        ...


class OffloadTarget(Protocol):
    """Memory or files that activations are offloaded to."""

    def begin_pass(self) -> None:
        """A further forward pass begins."""
        ...

    def put(self, resident: Tensor) -> Copy:
        """Begin to copy bytes (uint8) away."""
        ...


class _Entry:
    """One storage that was saved.

    Attributes:
        resident: its bytes on the device: until they are away, and again from when they are back.
        coming: whether they are being fetched.
    """

    __slots__ = ("__weakref__", "coming", "copy", "index", "num_bytes", "resident", "shelf")

    def __init__(self, resident: Tensor, copy: Copy, shelf: list[weakref.ref[_Entry]]) -> None:
        self.resident: Tensor | None = resident
        self.num_bytes = resident.numel()
        self.copy, self.coming = copy, False
        self.shelf, self.index = shelf, len(shelf)
        shelf.append(weakref.ref(self))

    def needed_before(self) -> Iterator[_Entry]:
        """Entries of the same pass that were saved earlier and are still alive, the latest first: backward's order."""
        for index in range(self.index - 1, -1, -1):
            entry = self.shelf[index]()
            if entry is not None:
                yield entry


class _View:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("dtype", "entry", "offset", "shape", "stride")

    def __init__(self, tensor: Tensor, entry: _Entry) -> None:
        self.entry, self.dtype, self.shape = entry, tensor.dtype, tensor.shape
        self.stride, self.offset = tensor.stride(), tensor.storage_offset()

    def on(self, resident: Tensor) -> Tensor:
        """The saved tensor again."""
        empty = torch.empty(0, dtype=self.dtype, device=resident.device)
        return empty.set_(resident.untyped_storage(), self.offset, self.shape, self.stride)


class Offloader:
    """Hooks on what a stage's chunks save for the backward pass.

    Attributes:
        num_bytes_moved: of all storages copied away so far.
    """

    def __init__(self, target: OffloadTarget, window_bytes: int) -> None:
        """`window_bytes`: most that may wait to be moved away, and most that is fetched ahead."""
        self.target, self.window_bytes = target, window_bytes
        self.num_bytes_moved = 0
        self._leaving: list[weakref.ref[_Entry]] = []
        self._shelf: list[weakref.ref[_Entry]] = []
        self._left_alone: set[int] = set()
        self._seen: dict[int, tuple[StorageWeakRef, _Entry]] = {}
        self._hooks: Any = None

    def follow(self, model: Any) -> None:
        """Offload what `model` (a GPTModel) saves from now on, whoever calls it."""
        model.register_forward_pre_hook(self._begin_pass)
        model.register_forward_hook(self._end_pass, always_call=True)

    def _begin_pass(self, model: Any, arguments: Any) -> None:
        if not torch.is_grad_enabled():
            return
        stays = [*model.parameters(), *model.buffers(), model.decoder.input_tensor]
        self._left_alone = {tensor.untyped_storage()._cdata for tensor in stays if tensor is not None}
        self._shelf = []
        self.target.begin_pass()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()

    def _end_pass(self, *unused: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
        self._seen.clear()

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd is to keep of a tensor that it saves during a pass."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < MIN_BYTES or storage._cdata in self._left_alone:
            return tensor
        seen = self._seen.get(storage._cdata)
        if seen is not None:
            return _View(tensor, seen[1])
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        entry = _Entry(whole, self.target.put(whole), self._shelf)
        # The weak reference keeps the address of a storage that is freed meanwhile from being given to another one.
        self._seen[storage._cdata] = (StorageWeakRef(storage), entry)
        self.num_bytes_moved += entry.num_bytes
        self._leaving.append(weakref.ref(entry))
        self._let_go()
        return _View(tensor, entry)

    def _let_go(self) -> None:
        """Free the oldest copied storages until at most a window of bytes is still being copied."""
        leaving = [entry for reference in self._leaving if (entry := reference()) is not None]
        num_bytes, num_gone = sum(entry.num_bytes for entry in leaving), 0
        while num_bytes > self.window_bytes:
            oldest = leaving[num_gone]
            oldest.copy.wait_until_away()
            oldest.resident = None
            num_bytes, num_gone = num_bytes - oldest.num_bytes, num_gone + 1
        self._leaving = [weakref.ref(entry) for entry in leaving[num_gone:]]

    def unpack(self, saved: Tensor | _View) -> Tensor:
        """The tensor again, from what `pack` gave."""
        if isinstance(saved, Tensor):
            return saved
        entry = saved.entry
        if entry.resident is None:
            self._fetch(entry)
            entry.resident = entry.copy.fetched()
        self._fetch_ahead(entry)
        return saved.on(entry.resident)

    def _fetch_ahead(self, entry: _Entry) -> None:
        num_bytes = 0
        for earlier in entry.needed_before():
            num_bytes += earlier.num_bytes
            if num_bytes > self.window_bytes:
                return
            if earlier.resident is None:
                self._fetch(earlier)

    def _fetch(self, entry: _Entry) -> None:
        if not entry.coming:
            entry.coming = True
            entry.copy.start_fetch()


class PinnedMemory:
    """Offloads CUDA tensors to the host's pinned memory, on streams of its own."""

    def __init__(self) -> None:
        self.leaving, self.coming = torch.cuda.Stream(), torch.cuda.Stream()

    def begin_pass(self) -> None:
        pass

    def put(self, resident: Tensor) -> Copy:
        return _Pinned(self, resident)


class _Pinned:
    """One storage in pinned memory.

    Memory on the device is freed and used again in the order of the computing stream, so that stream waits for the copy
    before the original is freed. (With `record_stream` instead, memory would come back only when the host looks.)
    """

    def __init__(self, place: PinnedMemory, resident: Tensor) -> None:
        self.place, self.device = place, resident.device
        self.host = torch.empty(resident.numel(), dtype=torch.uint8, pin_memory=True)
        place.leaving.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(place.leaving):
            self.host.copy_(resident, non_blocking=True)
            self.away = place.leaving.record_event()
        self.back: Tensor | None = None
        self.arrived: Any = None

    def wait_until_away(self) -> None:
        torch.cuda.current_stream().wait_event(self.away)

    def start_fetch(self) -> None:
        self.back = torch.empty(self.host.numel(), dtype=torch.uint8, device=self.device)
        self.place.coming.wait_stream(torch.cuda.current_stream())  # the block's last user
        self.place.coming.wait_event(self.away)
        with torch.cuda.stream(self.place.coming):
            self.back.copy_(self.host, non_blocking=True)
            self.arrived = self.place.coming.record_event()

    def fetched(self) -> Tensor:
        back, self.back = self.back, None
        assert back is not None
        torch.cuda.current_stream().wait_event(self.arrived)
        return back

    def __del__(self) -> None:
        if self.back is not None:  # never fetched, and the copy may still be writing
            self.back.record_stream(self.place.coming)


class Files:
    """Offloads to a directory: one nameless file for each forward pass, written and read by a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megadpo-offload")
        self.file: _File | None = None

    def begin_pass(self) -> None:
        self.file = _File(self.directory)

    def put(self, resident: Tensor) -> Copy:
        assert self.file is not None
        return _InFile(self.thread, self.file, resident)


class _File:
    """A file without a name: it is gone when the last copy in it is, or this process."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.size = directory, 0
        self.descriptor, name = tempfile.mkstemp(prefix="megadpo-", dir=directory)
        os.unlink(name)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def write(self, data: Tensor, offset: int) -> None:
        rest = data.numpy().data
        try:
            while rest:
                num_written = os.pwrite(self.descriptor, rest, offset)
                rest, offset = rest[num_written:], offset + num_written
        except OSError as error:
            raise UserError(
                f"train.activation_offload_dir: {self.directory} took no more activations: {error.strerror}; "
                "choose a larger disk, or lower train.tokens_per_micro_batch"
            ) from error

    def read(self, num_bytes: int, offset: int) -> Tensor:
        data = torch.empty(num_bytes, dtype=torch.uint8)
        rest = data.numpy().data
        while rest:
            num_read = os.preadv(self.descriptor, [rest], offset)
            assert num_read > 0, "an activation file is shorter than what was written to it"
            rest, offset = rest[num_read:], offset + num_read
        return data


class _InFile:
    """Written, then read, by the one thread, which keeps the order."""

    def __init__(self, thread: ThreadPoolExecutor, file: _File, resident: Tensor) -> None:
        self.thread, self.file, self.device, self.num_bytes = thread, file, resident.device, resident.numel()
        self.offset = file.size
        file.size += self.num_bytes
        self.written: Future[None] = thread.submit(file.write, resident.cpu(), self.offset)
        self.reading: Future[Tensor] | None = None

    def wait_until_away(self) -> None:
        self.written.result()

    def start_fetch(self) -> None:
        self.reading = self.thread.submit(self.file.read, self.num_bytes, self.offset)

    def fetched(self) -> Tensor:
        assert self.reading is not None
        return self.reading.result().to(self.device)

    def __del__(self) -> None:
        self.written.cancel()  # nobody will read it
