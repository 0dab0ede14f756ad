"""What the log-prob head does to a tile of logits, in native code or in plain torch, and which of them is used.

Two operations: `parts` reads the tile once, `gradient_` turns it into its gradient in place. `TorchKernels` works everywhere
and is what the tests compare with; `NativeKernels` calls csrc/head.cpp on a CPU and csrc/head.cu on CUDA.

Axes: N rows of a tile, V this rank's unpadded vocabulary rows, P parts.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megadpo.console.activity import activity
from megadpo.errors import UserError
from megadpo.platform import native

PARTS = ("maximum", "exponentials", "target", "products", "logits", "squares")
"""What is kept of a row: its maximum m, the sum of exp(x - m), the target's logit (-inf where the target is on another
rank), and where they are wanted the sums of exp(x - m) (x - m), of x and of exp(x - m)^2 (else 0). All float32."""

_MORE, _SQUARES = 1, 2


class Kernels(Protocol):
    """One way to do both operations."""

    @property
    def name(self) -> str:
        """For the console."""
        ...

    def parts(self, logits_NV: Tensor, targets_N: Tensor, wanted: Collection[str], out_NP: Tensor) -> None:
        """Fill `out_NP` (float32, see PARTS) from a tile that stays as it is.

        Args:
            logits_NV: float32 or bfloat16, rows one behind the other.
            targets_N: int64, the column of each row's target; outside [0, V) where another rank has it.
            wanted: the head's statistics; what none of them needs is not computed.
        """
        ...

    def gradient_(self, logits_NV: Tensor, targets_N: Tensor, log_normaliser_N: Tensor, gradient_N: Tensor) -> None:
        """In place: logits become (onehot(target) - exp(logits - log_normaliser)) * gradient, rounded to their dtype."""
        ...


class TorchKernels:
    """Plain torch, a few rows at a time, so that temporaries stay small."""

    name = "torch"

    def parts(self, logits_NV: Tensor, targets_N: Tensor, wanted: Collection[str], out_NP: Tensor) -> None:
        more, squares = _what(wanted) & _MORE, _what(wanted) & _SQUARES
        out_NP.zero_()
        out_NP[:, PARTS.index("maximum")] = out_NP[:, PARTS.index("target")] = -torch.inf
        for rows in slices(logits_NV):
            logits = logits_NV[rows].float()
            maximum, exponentials, target, products, sums, squared = out_NP[rows].unbind(1)
            maximum.copy_(logits.amax(-1))
            here, column = _held_targets(targets_N[rows], logits.shape[1])
            target[here] = logits[here, column]
            shifted = logits - maximum[:, None]
            e = shifted.exp()
            exponentials.copy_(e.sum(-1))
            if more:
                sums.copy_(logits.sum(-1))
                products.copy_(shifted.mul_(e).sum(-1))
            if squares:
                squared.copy_(e.square_().sum(-1))

    def gradient_(self, logits_NV: Tensor, targets_N: Tensor, log_normaliser_N: Tensor, gradient_N: Tensor) -> None:
        for rows in slices(logits_NV):
            values = logits_NV[rows].float()  # the tile's own memory where it is float32
            values.sub_(log_normaliser_N[rows, None]).exp_().mul_(-gradient_N[rows, None])
            here, column = _held_targets(targets_N[rows], values.shape[1])
            values[here, column] += gradient_N[rows][here]
            if logits_NV.dtype is not torch.float32:
                logits_NV[rows] = values


class NativeKernels:
    """The library of csrc/ for a kind of device."""

    def __init__(self, device_type: str) -> None:
        """Raises native.Unavailable where the library is not there and cannot be made, or does not run."""
        self.is_cuda = device_type == "cuda"
        with activity("loading the native log-prob head, compiled now where it is not"):
            self.library = native.load("head_cuda" if self.is_cuda else "head")
        # Raw addresses and 64-bit counts; the last argument is a CUDA stream or a number of threads.
        pointer, count, last = ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p if self.is_cuda else ctypes.c_int
        tile: list[Any] = [pointer, ctypes.c_int, count, count, count, pointer]
        self.library.megadpo_head_parts.argtypes = [*tile, ctypes.c_int, pointer, last]
        self.library.megadpo_head_gradient.argtypes = [*tile, pointer, pointer, last]
        self.library.megadpo_head_parts.restype = self.library.megadpo_head_gradient.restype = ctypes.c_int
        self.library.megadpo_head_instructions.restype = ctypes.c_char_p
        if self.is_cuda and (status := self.library.megadpo_head_parts(None, 0, 0, 0, 0, None, 0, None, None)):
            raise native.Unavailable(f"csrc/head.cu does not run on this device (CUDA error {status})")

    @property
    def name(self) -> str:
        """The language and the instruction set that was found."""
        if self.is_cuda:
            return "CUDA"
        return f"C++ ({self.library.megadpo_head_instructions().decode()})"

    def parts(self, logits_NV: Tensor, targets_N: Tensor, wanted: Collection[str], out_NP: Tensor) -> None:
        assert out_NP.is_contiguous() and out_NP.dtype is torch.float32
        arguments = [*self._tile(logits_NV, targets_N), _what(wanted), out_NP.data_ptr()]
        self._check(self.library.megadpo_head_parts(*arguments, self._last(logits_NV)))

    def gradient_(self, logits_NV: Tensor, targets_N: Tensor, log_normaliser_N: Tensor, gradient_N: Tensor) -> None:
        log_normaliser_N, gradient_N = log_normaliser_N.float().contiguous(), gradient_N.float().contiguous()
        arguments = [*self._tile(logits_NV, targets_N), log_normaliser_N.data_ptr(), gradient_N.data_ptr()]
        self._check(self.library.megadpo_head_gradient(*arguments, self._last(logits_NV)))

    def _tile(self, logits_NV: Tensor, targets_N: Tensor) -> list[int]:
        rows, columns = logits_NV.shape
        # Of one column torch's stride says nothing: it is 0 in some tiles without rows.
        assert logits_NV.dtype in (torch.float32, torch.bfloat16) and (columns <= 1 or logits_NV.stride(1) == 1)
        assert targets_N.dtype is torch.int64 and targets_N.is_contiguous()
        is_bf16 = int(logits_NV.dtype is torch.bfloat16)
        return [logits_NV.data_ptr(), is_bf16, rows, columns, logits_NV.stride(0), targets_N.data_ptr()]

    def _last(self, tensor: Tensor) -> int:
        return torch.cuda.current_stream(tensor.device).cuda_stream if self.is_cuda else torch.get_num_threads()

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"the log-prob head's CUDA kernel failed with error {status}")


_choice = "auto"


def choose_kernels(choice: str, device: torch.device) -> str:
    """Set the kernels that this process uses from now on; returns their description for the console.

    Args:
        choice: `model.kernels`: "auto", "torch" or "native".

    Raises:
        UserError: `choice` is "native" and the native library is not available.
    """
    global _choice
    _choice = choice
    kernels, reason = _kernels(choice, device.type)
    if choice == "native" and reason:
        raise UserError(f"model.kernels is native, but {reason}; install what is missing, or use auto")
    return kernels.name + (f" ({reason})" if reason else "")


def head_kernels(device: torch.device) -> Kernels:
    """The chosen kernels for tensors on `device`."""
    return _kernels(_choice, device.type)[0]


@functools.cache
def _kernels(choice: str, device_type: str) -> tuple[Kernels, str]:
    """The kernels, and why they are not the native ones where `choice` allows these; else an empty string."""
    if choice == "torch":
        return TorchKernels(), ""
    try:
        return NativeKernels(device_type), ""
    except native.Unavailable as error:
        return TorchKernels(), str(error)


def _what(wanted: Collection[str]) -> int:
    more = _MORE if "entropy" in wanted or "mean_logit" in wanted else 0
    return more | (_SQUARES if "log_square" in wanted else 0)


def slices(tile: Tensor) -> Iterator[slice]:
    """Rows whose float32 values stay below 8 MiB on a CPU (near its caches) and 256 MiB elsewhere; none of an empty tile."""
    num_rows, num_columns = tile.shape
    if num_columns:
        length = max(1, (2**21 if tile.device.type == "cpu" else 2**26) // num_columns)
        yield from (slice(start, min(start + length, num_rows)) for start in range(0, num_rows, length))


def _held_targets(targets_N: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this rank's part of the vocabulary, and in which columns."""
    here = ((targets_N >= 0) & (targets_N < num_columns)).nonzero().squeeze(1)
    return here, targets_N[here]
