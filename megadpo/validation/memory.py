"""Options that save memory (recomputation, offload, bf16 moments): refused where they contradict each other, the machine or
the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.files import make_writable_directory

if TYPE_CHECKING:
    from megadpo.config.schema import Config, ParallelConfig, TrainConfig
    from megadpo.parallel.layout import Layout


def check_memory_options(config: Config) -> None:
    """Refuse options of recomputation and offload that contradict each other or would have no effect.

    Raises:
        UserError: in one sentence.
    """
    _check_engine(config)
    train = config.train
    for name, is_set in (
        ("recompute_method", train.recompute_method != "uniform"),
        ("recompute_num_layers", train.recompute_num_layers is not None),
    ):
        if is_set and train.recompute != "full":
            raise UserError(
                f"train.{name} is {getattr(train, name)}, which has no effect with train.recompute {train.recompute}; "
                "set that to full or remove it"
            )
    if train.recompute_method == "block" and train.recompute_num_layers is None:
        raise UserError("train.recompute_method is block; say in train.recompute_num_layers how many layers are recomputed")
    if (train.activation_offload == "disk") != (train.activation_offload_dir is not None):
        raise UserError(
            f"train.activation_offload_dir is {train.activation_offload_dir!r} with train.activation_offload "
            f"{train.activation_offload}; disk needs a directory, and nothing else reads one"
        )
    if (
        train.activation_offload == "none"
        and train.activation_offload_window_mib != type(train)().activation_offload_window_mib
    ):
        raise UserError(
            "train.activation_offload_window_mib has no effect with train.activation_offload none; set that too or remove it"
        )
    if train.activation_offload != "none" and config.parallel.engine == "deepspeed" and config.parallel.zero_stage == 3:
        raise UserError(
            f"train.activation_offload is {train.activation_offload}, but ZeRO stage 3 frees and gathers parameters behind "
            "what is kept for the backward pass; use another stage or remove it"
        )


def _check_engine(config: Config) -> None:
    """Options of Megatron's engine are not given to another one."""
    parallel, moments = config.parallel, config.train.moments_dtype
    if parallel.engine != "megatron":
        if parallel.overlap is not None:
            raise UserError(
                f"parallel.overlap is {str(parallel.overlap).lower()}, but parallel.engine is {parallel.engine}; "
                "set zero_optimization.overlap_comm in a parallel.deepspeed_config instead"
            )
        if parallel.gradient_accumulation_fusion is not None:
            fusion = str(parallel.gradient_accumulation_fusion).lower()
            raise UserError(
                f"parallel.gradient_accumulation_fusion is {fusion}, but parallel.engine is {parallel.engine}, which "
                "keeps no sum that a product could add to; use engine megatron or remove it"
            )
        if parallel.gradient_dtype != "fp32":
            raise UserError(
                f"parallel.gradient_dtype is {parallel.gradient_dtype}, but parallel.engine is {parallel.engine}, which has "
                "settings of its own for that; set communication_data_type in a parallel.deepspeed_config instead"
            )
        if moments != "fp32":
            raise UserError(
                f"train.moments_dtype is {moments}, but parallel.engine is {parallel.engine}, whose optimizer keeps them in "
                "fp32; use engine megatron or leave it at fp32"
            )
    if config.schedule.zero_bubble and parallel.gradient_accumulation_fusion is False:
        raise UserError(
            "parallel.gradient_accumulation_fusion is false, but schedule.zero_bubble is true, which needs weight gradients "
            "that products add up; remove it or set it to true"
        )
    if moments != "fp32" and parallel.offload != "none":
        raise UserError(
            f"train.moments_dtype is {moments}, but parallel.offload is {parallel.offload}, where moments are kept and "
            "updated in fp32; use one of the two"
        )


def check_memory_machine(config: Config) -> None:
    """Refuse offload that this machine has no device or directory for.

    Raises:
        UserError: in one sentence.
    """
    import torch  # not above: options are read without it

    train = config.train
    if train.activation_offload == "cpu" and not torch.cuda.is_available():
        raise UserError(
            "train.activation_offload is cpu, but there is no CUDA device here and activations are in host memory already; "
            "use disk or none"
        )
    if config.parallel.engine == "megatron" and config.parallel.offload == "cpu" and not torch.cuda.is_available():
        raise UserError(
            "parallel.offload is cpu, but there is no CUDA device here and the optimizer's state is in host memory already; "
            "use none"
        )
    if train.activation_offload_dir is not None:
        make_writable_directory(Path(train.activation_offload_dir), "train.activation_offload_dir")


def check_gradient_dtype(parallel: ParallelConfig, is_bf16: bool) -> None:
    """`parallel.gradient_dtype` fits the dtype that the model is computed in.

    Raises:
        UserError: in one sentence.
    """
    if parallel.gradient_dtype == "bf16" and not is_bf16:
        raise UserError(
            "parallel.gradient_dtype is bf16, but the model is computed in fp32, and so are its gradients; set model.dtype "
            "to bf16 or remove it"
        )


def check_recompute_layers(train: TrainConfig, layout: Layout, num_layers: int) -> None:
    """`train.recompute_num_layers` fits the chunks of the model.

    Raises:
        UserError: in one sentence.
    """
    given = train.recompute_num_layers
    if given is None:
        return
    sizes = [len(layers) for layers in layout.layers_of_chunks(num_layers)]
    if train.recompute_method == "block" and given > max(sizes):
        raise UserError(
            f"train.recompute_num_layers is {given}, but no pipeline stage (or chunk of one) has more than {max(sizes)} "
            "layers; lower it, or use recompute_method uniform"
        )
    if train.recompute_method == "uniform" and (uneven := [size for size in sizes if size % given]):
        raise UserError(
            f"train.recompute_num_layers is {given}, which does not divide the {uneven[0]} layers of a pipeline stage (or "
            "chunk of one); choose a divisor, or recompute_method block"
        )
