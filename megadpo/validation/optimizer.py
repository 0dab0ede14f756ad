"""Options of the optimizer and of the learning rate that contradict each other, or the names of what is trained."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError
from megadpo.model.by_name import check_expressions, check_matches, first_match

if TYPE_CHECKING:
    from collections.abc import Iterable

    from megadpo.config.schema import Config, TrainConfig

READ_BY = {
    "momentum": ("sgd", "muon"),
    "betas": ("adamw", "adamw_8bit", "lion", "muon"),
    "eps": ("adamw", "adamw_8bit", "muon"),
}
"""Options of `train` -> the optimizers that read them."""

NOT_WITH_DEEPSPEED = {
    "adamw_8bit": "whose flat groups join parameters that are to have blocks of their own",
    "muon": "which keeps flat parts of parameters, where Muon needs whole matrices",
}
"""Optimizers that are built for Megatron's engine only, and why."""

KEY, FREEZE = "train.learning_rates", "train.freeze"


def check_optimizer_options(config: Config) -> None:
    """Refuse options of the optimizer that nothing reads, that contradict each other, or that are no patterns.

    Raises:
        UserError: in one sentence.
    """
    train = config.train
    for name, readers in READ_BY.items():
        if train.optimizer not in readers and getattr(train, name) != getattr(type(train)(), name):
            value = _shown(getattr(train, name))
            raise UserError(
                f"train.{name} is {value}, but train.optimizer is {train.optimizer}, which does not read it; remove it, or "
                f"use {' or '.join(readers)}"
            )
    if train.momentum is not None and not 0 <= train.momentum < 1:
        raise UserError(f"train.momentum must be in [0, 1), got {train.momentum!r}")
    if train.optimizer != "adamw":
        for name, value, default in (
            ("train.moments_dtype", train.moments_dtype, "fp32"),
            ("parallel.offload", config.parallel.offload, "none"),
        ):
            if value != default:
                raise UserError(
                    f"{name} is {value}, but train.optimizer is {train.optimizer}, and only adamw's moments are kept like "
                    f"that; leave it at {default}, or use adamw"
                )
    if config.parallel.engine == "deepspeed" and train.optimizer in NOT_WITH_DEEPSPEED:
        why = NOT_WITH_DEEPSPEED[train.optimizer]
        raise UserError(
            f"train.optimizer is {train.optimizer}, but parallel.engine is deepspeed, {why}; use engine megatron, or adamw, "
            "sgd or lion"
        )
    if train.decay_norms_and_biases and train.weight_decay == 0:
        raise UserError("train.decay_norms_and_biases is true, but train.weight_decay is 0; set that too or remove it")
    _check_rates(train)
    check_expressions(KEY, train.learning_rates)
    check_expressions(FREEZE, train.freeze)


def check_optimizer_machine(config: Config) -> None:
    """The library that has the optimizer is installed and works on this machine's device.

    Raises:
        UserError: in one sentence.
    """
    if config.train.optimizer == "muon":
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"train.optimizer is muon, which torch has from 2.9 on, and torch {torch.__version__} is installed; install "
                "a newer one, or use adamw"
            )
    if config.train.optimizer == "adamw_8bit":
        _check_eight_bits()


def _check_eight_bits() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer is adamw_8bit, but the package bitsandbytes is not installed; install it (pip install "
            "bitsandbytes; constraints.txt has the tested version) or use adamw, with train.moments_dtype bf16"
        )
    import torch

    from megadpo.platform.device import compute_device

    try:
        from bitsandbytes.optim import AdamW8bit

        tried = torch.nn.Parameter(torch.zeros(4096, device=compute_device()))
        tried.grad = torch.ones_like(tried)
        AdamW8bit([tried], lr=1.0).step()
        assert bool((tried < 0).all()), "a step changed nothing"
    except Exception as error:  # a native library that does not load, or has no kernels for this device
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"train.optimizer is adamw_8bit, but bitsandbytes does not take such a step on {compute_device().type} here "
            f"({reason}); install a version for this machine or use adamw, with train.moments_dtype bf16"
        ) from error


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_rates(train: TrainConfig) -> None:
    for pattern, rate in train.learning_rates.items():
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(
                f"{KEY}: {pattern!r} has the rate {rate!r}, which is not above 0; what is not to be trained is named in "
                "train.freeze"
            )
    if train.learning_rates and train.learning_rate == 0:
        raise UserError(
            f"train.learning_rate is 0, to which the schedule and {KEY} are in proportion; set it above 0, and name what is "
            "not to be trained in train.freeze"
        )


OF_SCHEDULES = {
    "schedule_cycles": "cosine_with_restarts",
    "schedule_power": "polynomial",
    "decay_ratio": "wsd",
    "decay_shape": "wsd",
}
"""Options of `train` that one schedule reads."""


def check_schedule(train: TrainConfig) -> None:
    """Refuse options of the learning rate that contradict each other, or that nothing reads.

    Raises:
        UserError: in one sentence.
    """
    for name, schedule in OF_SCHEDULES.items():
        if train.schedule != schedule and getattr(train, name) != getattr(type(train)(), name):
            raise UserError(
                f"train.{name} is read by train.schedule {schedule}, but that is {train.schedule}; change one of them"
            )
    if train.schedule == "constant" and train.min_learning_rate > 0:
        raise UserError(
            "train.min_learning_rate has no effect with train.schedule constant; remove it or choose cosine or linear"
        )
    if train.steps is not None and train.warmup_steps > train.steps:
        raise UserError(f"train.warmup_steps ({train.warmup_steps}) is more than train.steps ({train.steps})")
    if train.warmup_ratio is not None and train.warmup_steps:
        raise UserError(
            f"train.warmup_steps ({train.warmup_steps}) and train.warmup_ratio ({train.warmup_ratio:g}) are both given; "
            "set the one to 0 or the other to null"
        )
    if train.warmup_ratio is not None and not 0 <= train.warmup_ratio <= 1:
        raise UserError(
            f"train.warmup_ratio must be in [0, 1], got {train.warmup_ratio!r}; it is a share of the run's steps"
        )
    if train.decay_ratio > 1:
        raise UserError(f"train.decay_ratio is a share of the run's steps, in (0, 1], got {train.decay_ratio!r}")
    if train.schedule == "wsd" and (train.warmup_ratio or 0) + train.decay_ratio > 1:
        raise UserError(
            f"train.warmup_ratio ({train.warmup_ratio:g}) and train.decay_ratio ({train.decay_ratio:g}) are more than the "
            "whole run; lower one of them"
        )


def check_optimizer_names(config: Config, shapes: Mapping[str, Any], fused: Iterable[tuple[str, ...]]) -> None:
    """The patterns of `train.freeze` and `train.learning_rates` fit what is trained.

    Args:
        shapes: what is trained, by Hugging Face name.
        fused: Hugging Face tensors that are one parameter.

    Raises:
        UserError: a pattern that matches nothing, nothing is left to train, or a difference within a parameter of
            DeepSpeed's.
    """
    from megadpo.model.families import is_correction_bias  # it imports torch, without which `megadpo doctor` still reports

    train, names = config.train, [name for name in shapes if not is_correction_bias(name)]
    check_matches(FREEZE, train.freeze, list(shapes))
    trained = [name for name in names if first_match(train.freeze, name) is None]
    if not trained:
        raise UserError(f"{FREEZE} names all that is trained; leave something out of it")
    check_matches(KEY, list(train.learning_rates), trained)
    if config.parallel.engine == "deepspeed":
        for together in fused:
            _check_alike(train, together)


def check_frozen_stages(train: TrainConfig, names: Iterable[str], layers_of_stages: Sequence[Sequence[int]]) -> None:
    """Under DeepSpeed, something is trained on each stage: its optimizer takes no empty list.

    Args:
        names: what is trained, by Hugging Face name, `train.freeze` left out of account.
        layers_of_stages: numbers of each stage's layers.

    Raises:
        UserError: a stage is wholly frozen.
    """
    last = len(layers_of_stages) - 1
    stage_of_layer = {layer: stage for stage, layers in enumerate(layers_of_stages) for layer in layers}
    trained = set()
    for name in (name for name in names if first_match(train.freeze, name) is None):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        trained.add(stage_of_layer[int(layer[1])] if layer else 0 if name.startswith("model.embed_tokens") else last)
    frozen = [stage for stage in range(last + 1) if stage not in trained]
    if frozen:
        raise UserError(
            f"{FREEZE} leaves nothing to train on stage {frozen[0]} of the pipeline, where parallel.engine deepspeed has "
            "no optimizer; use megatron or fewer stages, or leave something of it out"
        )


def _check_alike(train: TrainConfig, together: tuple[str, ...]) -> None:
    for option, patterns in ((FREEZE, train.freeze), (KEY, list(train.learning_rates))):
        chosen = {name: first_match(patterns, name) for name in together}
        values = {name: train.learning_rates.get(found or "", found) for name, found in chosen.items()}
        first, *others = (name for name in together)
        for other in others:
            if (option == FREEZE and (chosen[first] is None) != (chosen[other] is None)) or (
                option == KEY and values[first] != values[other]
            ):
                raise UserError(
                    f"{option} treats {first} and {other} differently, but they are one parameter, and to parallel.engine "
                    "deepspeed a parameter is one; treat them alike, or use engine megatron"
                )
