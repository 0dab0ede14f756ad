"""What a rank does where optimizers are compared: steps with drawn gradients, the same whatever a device computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megadpo.config.schema import ParallelConfig, TrainConfig
from megadpo.parallel.layout import Layout


def stepped(
    model: Path, offload: str, dtype: torch.dtype, num_steps: int = 4, resumed_at: int | None = None
) -> dict[str, Tensor]:
    """By "kind name", weights and moments in fp32 and, as kind "model", the weights that the model computes with.

    Args:
        resumed_at: after so many steps, what there is goes to a new engine, as from a checkpoint.
    """
    from megadpo.checkpoint.hf import open_hf, read_hf_config
    from megadpo.engine.megatron import MegatronEngine
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.model.weights import load_weights
    from megadpo.parallel.world import joined_world

    def new_engine() -> MegatronEngine:
        stage = build_stage(shape_of(read_hf_config(model)), Layout(), dtype)
        load_weights(stage, open_hf(model))
        train = TrainConfig(clip_norm=1.0, weight_decay=0.1)
        return MegatronEngine(stage, train, ParallelConfig(overlap=False, offload=offload))

    with joined_world(Layout(), seed=1):
        engine = new_engine()
        for number in range(num_steps):
            if number == resumed_at:
                state = {(kind, name): tensor.clone() for kind, name, tensor in engine.state()}
                engine = new_engine()
                engine.load_state(lambda kind, name, state=state: state[kind, name], number)  # type: ignore[misc]
            generator = torch.Generator().manual_seed(number)
            for parameter, _ in engine.stage.parameters.values():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.main_grad.copy_(drawn)  # type: ignore[attr-defined]
            engine.finish_gradients()
            engine.step(1e-3)
        found = {f"{kind} {name}": tensor.cpu().clone() for kind, name, tensor in engine.state()}
        return found | {f"model {name}": tensor.float().cpu().clone() for name, tensor in engine.parameters()}
