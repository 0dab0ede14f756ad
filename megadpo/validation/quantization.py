"""Frozen weights in 4 bits: options that contradict them, and whether the library that makes them works here."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.config.schema import Config

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Of bitsandbytes."""


def check_quantization_options(config: Config) -> None:
    """Refuse options of quantisation that would have no effect, are out of range, or that frozen weights in 4 bits cannot
    honour.

    Raises:
        UserError: in one sentence.
    """
    model, parallel = config.model, config.parallel
    if model.quantization == "none":
        for name in ("quantization_block_size", "double_quantization"):
            if getattr(model, name) != getattr(type(model)(), name):
                raise UserError(
                    f"model.{name} has no effect with model.quantization none; set that to nf4, or remove {name}"
                )
        return
    if model.quantization_block_size not in BLOCK_SIZES:
        sizes = ", ".join(str(size) for size in BLOCK_SIZES)
        raise UserError(f"model.quantization_block_size is {model.quantization_block_size}; choose one of: {sizes}")
    if config.adapter.merge:
        raise UserError(
            f"adapter.merge is true, but 4-bit weights (model.quantization {model.quantization}) take no adapter in: set "
            "it to false, and after the run add the adapter to the model as it was: megadpo convert merge OUTPUT_DIR/hf DIR"
        )
    if parallel.engine == "deepspeed" and parallel.zero_stage == 3:
        raise UserError(
            f"parallel.zero_stage is 3, which cuts parameters over the replicas, and weights in 4 bits (model.quantization "
            f"{model.quantization}) are none; use stage 0, 1 or 2, or parallel.engine megatron"
        )


def check_quantization_machine(config: Config) -> None:
    """The library is installed and quantises on this machine's device.

    Raises:
        UserError: in one sentence.
    """
    kind = config.model.quantization
    if kind == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization is {kind}, but the package bitsandbytes is not installed; install it (pip install "
            "bitsandbytes; constraints.txt has the tested version) or set model.quantization to none"
        )
    import torch

    from megadpo.platform.device import compute_device

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(
            *quantize_4bit(torch.ones(64, 2, device=compute_device()), quant_type=kind, compress_statistics=True)
        )
    except Exception as error:  # a native library that does not load, or has no kernels for this device
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"model.quantization is {kind}, but bitsandbytes does not quantise on {compute_device().type} here ({reason}); "
            "install a version for this machine or set model.quantization to none"
        ) from error
