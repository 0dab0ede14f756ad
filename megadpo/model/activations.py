"""What becomes of a stage's activations between its forward and its backward pass: kept, computed again, or moved away."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megadpo.config.schema import TrainConfig


@dataclass(frozen=True)
class Activations:
    """The options of `TrainConfig` that say so, under the same names; `Activations()` keeps everything.

    With `recompute` "auto" they are to be `settled` before anything else.
    """

    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    offload: str = "none"
    offload_dir: Path | None = None
    offload_window_mib: int = 256

    @classmethod
    def of(cls, train: TrainConfig) -> Activations:
        """As a checked configuration says."""
        return cls(
            train.recompute,
            train.recompute_method or "uniform",
            train.recompute_num_layers or 1,
            train.activation_offload,
            None if train.activation_offload_dir is None else Path(train.activation_offload_dir),
            train.activation_offload_window_mib,
        )

    def settled(self, small_is_cheap: bool) -> Activations:
        """With what "auto" comes to, where computing small operations again costs next to nothing and where it does not."""
        return self if self.recompute != "auto" else replace(self, recompute="small" if small_is_cheap else "none")

    def megatron_options(self) -> dict[str, Any]:
        """The fields of TransformerConfig that Megatron's recomputation reads."""
        assert self.recompute != "auto"
        if self.recompute in ("none", "small"):  # the latter is not Megatron's: recompute.py
            return {}
        if self.recompute == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return {
            "recompute_granularity": "full",
            "recompute_method": self.recompute_method,
            "recompute_num_layers": self.recompute_num_layers,
        }

    def __str__(self) -> str:
        recomputed = "kept" if self.recompute == "none" else f"recomputed ({self.recompute})"
        return recomputed if self.offload == "none" else f"{recomputed}, offloaded ({self.offload})"


KEEP = Activations()
"""For frozen models, whose forward saves nothing."""
