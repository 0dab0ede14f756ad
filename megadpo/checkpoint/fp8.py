"""Weights in 8-bit floats with a scale for each block, as DeepSeek-V3 and Qwen3-FP8 have them: plain weights when read.

``X.weight`` is float8_e4m3 [rows, columns] and ``X.weight_scale_inv`` has a factor for each block of it
[ceil(rows / block), ceil(columns / block)]. What is read is their product in float32 (DeepSeek-V3, arXiv:2412.19437, 3.3;
transformers' FineGrainedFP8Config with ``dequantize=True``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megadpo.errors import UserError
from megadpo.model.families import TensorSource

SCALE = "_scale_inv"
FIELD = "quantization_config"
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "activation_scheme": ("dynamic", None),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
}
"""What else the field may say: anything else means other weights or other sums."""


def is_block_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json describes weights in FP8 with a scale for each block."""
    quantization = settings.get(FIELD)
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8" and bool(_block(quantization))


def check_block_fp8(settings: Mapping[str, Any]) -> None:
    """Refuse what is FP8, but not as here.

    Raises:
        UserError: naming the field and its value.
    """
    quantization = settings[FIELD]
    for field, values in _EXPECTED.items():
        if quantization.get(field) not in values:
            raise UserError(
                f"{FIELD}.{field} is {quantization[field]!r}; weights in FP8 are read with {values[0]!r} only: give the "
                "model in bf16"
            )


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    sizes = quantization.get("weight_block_size")
    if isinstance(sizes, list | tuple) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    return None


def without_quantization(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model that is read."""
    return {key: value for key, value in settings.items() if key != FIELD}


class Fp8Source:
    """The plain tensors of a directory with weights in FP8, as a TensorSource.

    `dtype` is the type that config.json names, bfloat16 where it names none; `read` gives float32, so that only who asks
    for less rounds.

    Args:
        stored: the tensors as they are in the files.
        settings: of config.json.

    Raises:
        UserError: a weight without its scales, or scales of another shape or type.
    """

    def __init__(self, stored: TensorSource, settings: Mapping[str, Any]) -> None:
        block = _block(settings[FIELD])
        assert block is not None
        self._stored, self._block, self._found = stored, block, frozenset(stored.names())
        self._dtype = _TYPES.get(settings.get("dtype") or settings.get("torch_dtype") or "", torch.bfloat16)
        self._quantised = {name for name in self._found if stored.dtype(name) is torch.float8_e4m3fn}
        for name in sorted(self._quantised):
            self._check_scales(name)

    def _check_scales(self, name: str) -> None:
        shape, scale = self._stored.shape(name), name + SCALE
        if scale not in self._found:
            raise UserError(f"the model's tensor {name} is in FP8, but its scales {scale} are missing; get the model again")
        if len(shape) != 2:
            raise UserError(f"the model's tensor {name} in FP8 has shape {list(shape)}; only matrices are read")
        expected = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=True))
        if self._stored.shape(scale) != expected:
            raise UserError(
                f"the model's tensor {scale} has shape {list(self._stored.shape(scale))}, but blocks of "
                f"{list(self._block)} (weight_block_size) ask for {list(expected)}"
            )
        dtype = self._stored.dtype(scale)
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"the model's tensor {scale} is {dtype}; scales are read in float32 and bfloat16")

    def names(self) -> Iterable[str]:
        scales = {name + SCALE for name in self._quantised}
        return [name for name in self._stored.names() if name not in scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._quantised else self._stored.dtype(name)

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        values = self._stored.read(name, dim, start, length)
        if name not in self._quantised:
            return values
        scales = self._stored.read(name + SCALE, 0, 0, self._stored.shape(name + SCALE)[0]).float()
        first = [start if axis == dim else 0 for axis in (0, 1)]
        rows, columns = (torch.arange(first[axis], first[axis] + values.shape[axis]) // self._block[axis] for axis in (0, 1))
        out = torch.empty(values.shape, dtype=torch.float32)
        of_columns = scales[:, columns]
        for number in range(int(rows[0]), int(rows[-1]) + 1):  # a row of blocks at a time: no second matrix in float32
            low, high = max(number * self._block[0] - first[0], 0), min((number + 1) * self._block[0] - first[0], len(rows))
            torch.mul(values[low:high].float(), of_columns[number], out=out[low:high])
        return out

    def release(self) -> None:
        self._stored.release()
