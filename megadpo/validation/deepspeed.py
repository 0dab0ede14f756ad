"""The DeepSpeed configuration of a run: ours, joined with a user's own JSON file where the two do not contradict.

This module does not import deepspeed: options are checked before it is known to be installed.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.files import make_directory

if TYPE_CHECKING:
    import torch

OURS: dict[str, str] = {
    "train_batch_size": "train.pairs_per_step says how much a step sees",
    "train_micro_batch_size_per_gpu": "train.tokens_per_micro_batch says how much goes through at once",
    "gradient_accumulation_steps": "megadpo packs micro-batches itself, as train.tokens_per_micro_batch says",
    "gradient_clipping": "train.clip_norm sets it, over tensor, pipeline and data",
    "optimizer": "train.learning_rate, betas, eps and weight_decay set AdamW",
    "scheduler": "train.schedule, warmup_steps and min_learning_rate set the learning rate",
    "bf16": "model.dtype sets it",
    "bfloat16": "model.dtype sets it",
    "fp16": "model.dtype is fp32 or bf16",
    "amp": "model.dtype is fp32 or bf16",
    "torch_autocast": "model.dtype is fp32 or bf16",
    "data_types": "gradients are always added up in fp32",
    "prescale_gradients": "gradients are summed with exact weights, never averaged",
    "gradient_predivide_factor": "gradients are summed with exact weights, never averaged",
    "gradient_allreduce_op": "gradients are summed with exact weights, never averaged",
    "communication_data_type": "gradients are always added up in fp32",
    "zero_allow_untested_optimizer": "megadpo chooses the optimizer",
    "zero_force_ds_cpu_optimizer": "megadpo chooses the optimizer",
    "tensor_parallel": "parallel.tensor sets it",
    "sequence_parallel_size": "parallel.tensor and parallel.sequence set it",
    "data_parallel_size": "it follows from the number of processes",
    "pipeline": "parallel.pipeline sets it",
    "activation_checkpointing": "train.recompute sets it",
    "hybrid_engine": "there is no generation here",
    "compression_training": "it would change the model",
    "curriculum_learning": "it would change the data order",
    "data_efficiency": "it would change the data order",
    "progressive_layer_drop": "it would change the model",
    "sparse_gradients": "Megatron's embeddings have dense gradients",
    "checkpoint": "checkpoints are megadpo's own",
    "compile": "it is not tested under Megatron's schedules",
}
"""Keys of DeepSpeed's that options of ours decide, and which."""

OURS_IN_ZERO: dict[str, str] = {
    "stage": "parallel.zero_stage sets it",
    "offload_optimizer": "parallel.offload sets it",
    "offload_param": "parallel.offload sets it",
    "cpu_offload": "parallel.offload sets it",
    "cpu_offload_params": "parallel.offload sets it",
    "round_robin_gradients": "checkpoints rely on the plain order of parameters",
    "zero_hpz_partition_size": "the partitions of checkpoints and references span all data-parallel ranks",
    "zero_quantized_weights": "log-probs would not be exact",
    "zero_quantized_nontrainable_weights": "reference log-probs would not be exact",
    "zero_quantized_gradients": "gradients would not be exact",
    "mics_shard_size": "the partitions of checkpoints and references span all data-parallel ranks",
    "zenflow": "it updates with stale gradients",
    "compute_grad_norm": "train.clip_norm needs the norm, and megadpo computes it",
    "ignore_unused_parameters": "every parameter is used",
    "stage3_gather_16bit_weights_on_model_save": "megadpo exports the model itself",
    "leaf_module": "megadpo's modules have no leaves of that kind",
}
"""The same, of keys inside ``zero_optimization``."""

DEFAULTS_IN_ZERO: dict[str, Any] = {"overlap_comm": False, "reduce_scatter": True, "contiguous_gradients": True}
FIXED_IN_ZERO: dict[str, Any] = {"reduce_scatter": True, "contiguous_gradients": True}
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
LARGEST_BUCKET = 200_000_000
"""Elements; DeepSpeed takes buckets of this size from the start, so a small model gets a twentieth of its parameters."""


def read_user_config(path: str) -> dict[str, Any]:
    """A user's DeepSpeed JSON.

    Raises:
        UserError: missing, not JSON, or contradicting an option of ours.
    """
    name = f"parallel.deepspeed_config: {path}"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{name} must hold a JSON object, not {type(config).__name__}")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{name}: zero_optimization must be an object, got {zero!r}; parallel.zero_stage sets the stage")
    for key, reason in [*_set(config, OURS), *_set(zero, OURS_IN_ZERO, "zero_optimization.")]:
        raise UserError(f"{name} sets {key}, but {reason}; remove it from the file")
    for key, value in FIXED_IN_ZERO.items():
        if zero.get(key, value) != value:
            raise UserError(f"{name} sets zero_optimization.{key} to {zero[key]!r}, but only {value!r} is exact; remove it")
    return config


def _set(config: dict[str, Any], keys: dict[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    return ((prefix + key, reason) for key, reason in keys.items() if config.get(key) not in (None, "auto"))


def check_deepspeed_options(config: Any) -> None:
    """Refuse `parallel` options that DeepSpeed cannot honour or that contradict each other or its JSON file.

    Raises:
        UserError: in one sentence.
    """
    parallel = config.parallel
    if parallel.engine != "deepspeed":
        _refuse_without_engine(parallel)
        return
    if parallel.zero_stage not in range(4):
        raise UserError(f"parallel.zero_stage must be 0, 1, 2 or 3, got {parallel.zero_stage}")
    if parallel.zero_stage == 0 and parallel.offload != "none":
        raise UserError(
            f"parallel.offload is {parallel.offload}, but ZeRO stage 0 shards nothing that could be moved; "
            "set parallel.zero_stage to 1, 2 or 3"
        )
    if parallel.offload == "nvme" and parallel.zero_stage != 3:
        raise UserError(
            f"parallel.offload nvme needs ZeRO stage 3; set parallel.zero_stage to 3 (it is {parallel.zero_stage})"
        )
    if (parallel.offload == "nvme") != (parallel.offload_dir is not None):
        raise UserError(
            f"parallel.offload_dir is {parallel.offload_dir or 'null'} with parallel.offload {parallel.offload}; "
            "nvme needs a directory, and nothing else reads one: set the one or leave out the other"
        )
    if parallel.offload == "nvme" and config.reference.sync_every is not None:
        raise UserError(
            "reference.sync_every moves the reference in memory, but parallel.offload nvme keeps it in files; "
            "use parallel.offload cpu or remove sync_every"
        )
    if parallel.deepspeed_config is not None:
        read_user_config(parallel.deepspeed_config)


def _refuse_without_engine(parallel: Any) -> None:
    for name, default in (("zero_stage", 1), ("offload", "none"), ("offload_dir", None), ("deepspeed_config", None)):
        if getattr(parallel, name) not in (default, "cpu"):  # offload cpu is Megatron's too
            raise UserError(
                f"parallel.{name} is {getattr(parallel, name)!r}, which Megatron's engine does not have; "
                "set parallel.engine to deepspeed or remove it"
            )


def check_deepspeed_machine(parallel: Any, dtype: torch.dtype) -> None:
    """DeepSpeed is installed here, trains in `dtype`, and the directory to offload to can be written.

    Raises:
        UserError: in one sentence.
    """
    if parallel.engine != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.engine is deepspeed, but the package deepspeed is not installed; "
            "install it (pip install deepspeed; constraints.txt has the tested version) or set parallel.engine to megatron"
        )
    if parallel.zero_stage == 0 and str(dtype) == "torch.bfloat16":
        raise UserError(
            "parallel.zero_stage is 0, where DeepSpeed keeps no fp32 master weights, but model.dtype is bf16; "
            "set zero_stage to 1 or more, or dtype to fp32"
        )
    if parallel.offload_dir is not None:
        directory = Path(parallel.offload_dir)
        make_directory(directory, "parallel.offload_dir")
        _try_direct_write(directory)


def _try_direct_write(directory: Path) -> None:
    """Raises UserError where a file cannot be written past the system's cache, as DeepSpeed does it (Linux)."""
    probe = directory / f".megadpo-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600))
    except OSError as error:
        problem = f"parallel.offload_dir: {directory} cannot be written"
        if error.errno == errno.EINVAL:
            problem += " without the system's cache (O_DIRECT), as on tmpfs"
        raise UserError(f"{problem}: {error.strerror}; choose a directory on a local NVMe disk") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def engine_config(parallel: Any, dtype: torch.dtype, num_elements: int, ds_cpu_adam: bool) -> dict[str, Any]:
    """What DeepSpeed is given.

    Args:
        parallel: the `parallel` section of a checked Config.
        num_elements: of all parameters of this rank's stage: buckets are no larger.
        ds_cpu_adam: whether the optimizer is DeepSpeedCPUAdam.
    """
    import torch  # not above: options are read without it

    config = read_user_config(parallel.deepspeed_config) if parallel.deepspeed_config is not None else {}
    bucket = 2 * min(LARGEST_BUCKET // 2, num_elements // 40 + 1)
    zero = {**DEFAULTS_IN_ZERO, **dict.fromkeys(BUCKETS, bucket), **config.get("zero_optimization", {})}
    zero["stage"] = parallel.zero_stage
    if parallel.offload != "none":
        place = {"device": parallel.offload, "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = dict(place)
        if parallel.zero_stage == 3:
            zero["offload_param"] = dict(place)
    return {
        **config,
        "zero_optimization": zero,
        # One micro-batch as far as DeepSpeed knows: it would divide by the number of them, once a pipeline stage.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Stage 3 does not know this one: see deepspeed_runtime.
        "gradient_allreduce_op": "mean" if parallel.zero_stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": ds_cpu_adam,
    }


def swap_to_directory(config: dict[str, Any], directory: str, largest_part: int, part: int) -> int:
    """Completes a configuration with offload to NVMe; the bytes that DeepSpeed's buffers will take at most.

    Args:
        directory: one for each model, as DeepSpeed empties it.
        largest_part: elements of the largest parameter that are this rank's: what a buffer has to hold.
        part: elements of all parameters that are this rank's.
    """
    zero = config["zero_optimization"]
    zero["offload_optimizer"]["nvme_path"] = directory
    # None of what is worth a file stays in memory: by default a thousand million parameters would.
    zero["offload_param"] |= {"nvme_path": directory, "buffer_size": largest_part, "max_in_cpu": 0}
    # Five buffers of a parameter, four of a sub-group's fp32 weights, gradients and moments: DeepSpeed's defaults.
    return 4 * (5 * largest_part + 4 * min(part, zero.get("sub_group_size", 10**9)))
