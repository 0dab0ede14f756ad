"""What the ranks do where optimizers are compared with torch's: steps of a small model, and torch's steps on the same
gradients, which rank 0 puts together under Hugging Face names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.config.schema import ParallelConfig, TrainConfig
from megadpo.data.store import GroupStore
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.helpers.models import random_groups
from tests.parity.worker import gathered, parts_of, whole_tensors

RATE, DECAY, CLIP = 2e-3, 0.1, 0.5


@dataclass(frozen=True)
class Case:
    """Options in a layout; zero_stage None: Megatron's engine."""

    layout: Layout
    train: dict[str, Any] = field(default_factory=dict)
    zero_stage: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> TrainConfig:
        return TrainConfig(**{"learning_rate": RATE, "weight_decay": DECAY, "clip_norm": CLIP, **self.train})

    def __str__(self) -> str:
        engine = "Megatron" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{engine}, {self.layout}, {self.train}"


@dataclass
class Outcome:
    """Weights before and after under Hugging Face names, whole, and what torch makes of them with the same gradients; and
    what the engine keeps, by kind."""

    before: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    torch_s: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)
    norms: list[tuple[float, float]] = field(default_factory=list)


def outcomes(model: Path, cases: Sequence[Case], num_steps: int = 50) -> list[Outcome]:
    """Every case's, on rank 0; [] elsewhere."""
    from megadpo.parallel.world import joined_world

    dist.init_process_group("gloo")
    results = []
    for case in cases:
        with joined_world(case.layout, seed=1):
            try:
                results.append(_outcome(model, case, num_steps))
            except BaseException as error:
                raise RuntimeError(str(case)) from error
    is_first = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    return results if is_first else []


def new_engine(model: Path, case: Case) -> Any:
    """The case's engine on the loaded model, frozen as its options say."""
    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.by_name import first_match
    from megadpo.model.families import shape_of
    from megadpo.model.freezing import freeze
    from megadpo.model.weights import load_weights

    shape, source, options = shape_of(read_hf_config(model)), open_hf(model), case.options
    parallel = ParallelConfig(overlap=False)
    if case.zero_stage is None:
        stage = build_stage(shape, case.layout, case.dtype)
        load_weights(stage, source)
    else:
        from megadpo.engine.deepspeed.engine import policy_stage

        parallel = ParallelConfig(engine="deepspeed", zero_stage=case.zero_stage)
        stage = policy_stage(shape, source, case.layout, case.dtype, Activations(), parallel)
    freeze(stage, lambda name: first_match(options.freeze, name) is not None)
    if case.zero_stage is None:
        return MegatronEngine(stage, options, parallel)
    from megadpo.engine.deepspeed.engine import ZeroEngine

    return ZeroEngine(stage, options, parallel)


def _outcome(model: Path, case: Case, num_steps: int) -> Outcome:
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
    from megadpo.parallel.context import local_micro_batches

    groups = random_groups(4, longest=8)
    packing = PackedDataset.of(
        GroupStore.of(groups),
        PackingOptions(
            tokens_per_micro_batch=200,
            num_data_parallel=case.layout.data,
            stream_multiple=case.layout.stream_multiple,
            hidden_size=64,
        ),
    )
    engine, outcome = new_engine(model, case), Outcome()
    engine.stage.train()

    def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        of_ranks = gathered(parts_of(engine.stage, tensors))
        return whole_tensors([part for of_rank in of_ranks for part in of_rank])

    outcome.before = whole(dict(engine.parameters()))
    oracle = Oracle(outcome.before, case) if dist.get_rank() == 0 else None
    for step in range(num_steps):
        engine.forward_backward(
            local_micro_batches(packing, np.arange(len(groups))),
            lambda number, sums_RS: torch.full((len(sums_RS), 1), 0.01, dtype=torch.float64),
        )
        engine.finish_gradients()
        gradients = whole(dict(engine.gradients()))
        rate = RATE * (1 - step / num_steps)
        norm = engine.step(rate)
        if oracle is not None:
            outcome.norms.append((norm, oracle.step(gradients, rate)))
    for kind, name, _ in engine.state():
        logical = {piece.logical_name for piece in engine.stage.held[name][1].pieces}
        outcome.kept.setdefault(kind, set()).update(logical)
    outcome.weights = whole({name: tensor for _, name, tensor in engine.state(["weights"])})
    if oracle is not None:
        outcome.torch_s = {name: parameter.detach() for name, parameter in oracle.parameters.items()}
    return outcome


def is_frozen(name: str, case: Case) -> bool:
    """By the plain patterns of these tests."""
    return any(part.removesuffix(".*") in name for part in case.train.get("freeze", []))


class Oracle:
    """Torch's (or its library's) optimizers on whole tensors, by Hugging Face names, in one process."""

    def __init__(self, weights: dict[str, Tensor], case: Case) -> None:
        self.parameters = {name: torch.nn.Parameter(values.clone()) for name, values in weights.items()}
        self.clip_norm = case.options.clip_norm
        train, groups, muon = case.train, [], []
        for name, parameter in self.parameters.items():
            if is_frozen(name, case):
                parameter.requires_grad_(False)
                continue
            decays = parameter.ndim > 1 or train.get("decay_norms_and_biases", False)
            rates = train.get("learning_rates", {})
            found = [rate for part, rate in rates.items() if part.removesuffix(".*") in name]
            group = {
                "params": [parameter],
                "lr": found[0] if found else RATE,
                "weight_decay": DECAY if decays else 0.0,
            }
            is_matrix = name.startswith("model.layers.") and parameter.ndim == 2
            (muon if train.get("optimizer") == "muon" and is_matrix else groups).append(group)
        self.optimizers = self._made(train, groups, muon)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def _made(self, train: dict[str, Any], groups: list[Any], muon: list[Any]) -> list[torch.optim.Optimizer]:
        match train.get("optimizer", "adamw"):
            case "sgd":
                return [torch.optim.SGD(groups, momentum=train.get("momentum", 0.9))]
            case "lion":
                from bitsandbytes.optim import Lion

                return [Lion(groups, betas=train.get("betas", (0.9, 0.999)), min_8bit_size=1 << 60)]
            case "muon":
                momentum = train.get("momentum", 0.95)
                of_layers = torch.optim.Muon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw")
                return [of_layers, torch.optim.AdamW(groups)]
        return [torch.optim.AdamW(groups)]

    def step(self, gradients: dict[str, Tensor], rate: float) -> float:
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        for name, parameter in trained.items():
            parameter.grad = gradients[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), self.clip_norm or math.inf)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate / RATE
            optimizer.step()
        return float(norm)
