"""TransformerEngine's layers: the same parameters under the same names, and refused in time where they cannot be had.

Without TransformerEngine, modules with its names and its built-in norm stand in for it here; tests/gpu has the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megadpo.config.schema import ModelConfig
from megadpo.errors import UserError
from megadpo.model import layers
from megadpo.model.families import shape_of, shard_parameters
from megadpo.model.layers import FUSED_NAMES, Layers, choose_layers, local_name
from megadpo.parallel.layout import Layout
from megadpo.validation.load import load_config
from tests.helpers import oracle
from tests.helpers.families import config_of
from tests.helpers.models import random_groups, save_model
from tests.helpers.worlds import run_world
from tests.parity.worker import Case, Outcome, outcomes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
THEIRS = ModelConfig(layers="transformer_engine")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_names_with_norms_built_into_linear_layers_are_those_of_local_layers(family):
    parts = {"tensor_rank": 0, "num_tensor": 1, "layers": range(2, 4), "has_embedding": True, "has_head": True}
    local = [shard.name for shard in shard_parameters(shape_of(config_of(family)), **parts)]
    fused = {plain: built_in for built_in, plain in FUSED_NAMES.items()}

    def as_built_in(name: str) -> str:
        before, layer, after = name.partition(".".join(name.split(".")[:3]) + ".")
        return before + layer + fused.get(after, after)

    names = [as_built_in(name) for name in local]
    assert "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in names
    assert [local_name(name) for name in names] == local
    assert [local_name(name) for name in local] == local


def stood_in_for(*arguments: Any) -> list[Outcome] | None:
    """`outcomes` with modules that are built and named like TransformerEngine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp

    from megadpo.model import build, layer_specs
    from megadpo.model.norm import RMSNorm, _RMSNorm

    class LayerNormColumnParallelLinear(ColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, **settings: Any) -> None:
            super().__init__(input_size, output_size, **settings)
            self.layer_norm_weight = RMSNorm(self.config, input_size).weight

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(_RMSNorm.apply(x, self.layer_norm_weight, self.config.layernorm_epsilon))

    def spec(qk_layernorm: bool) -> Any:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
        layer.submodules.self_attention.submodules.linear_qkv = LayerNormColumnParallelLinear
        layer.submodules.mlp.submodules.linear_fc1 = LayerNormColumnParallelLinear
        return layer

    layer_specs.get_gpt_layer_with_transformer_engine_spec = spec
    build.choose_layers = lambda options, *where: Layers(options.layers)
    return outcomes(*arguments)


def test_a_model_with_built_in_norms_loads_trains_and_is_put_together_like_one_with_local_layers(tmp_path):
    size = {"num_hidden_layers": 2, "tokenizer": False}
    policy, reference = (save_model(tmp_path / str(seed), "qwen3", seed=seed, **size) for seed in (0, 1))
    layout = Layout(tensor=2, sequence=True)
    cases = [Case(layout), Case(layout, model=THEIRS)]
    local, fused = run_world(2, stood_in_for, policy, reference, random_groups(5, seed=3), cases, 2)[0]
    assert oracle.worst_relative_error(fused.gradients, local.gradients)[0] <= 1e-6
    assert oracle.worst_relative_error(fused.weights, local.weights)[0] <= 1e-6
    assert fused.losses == pytest.approx(local.losses, rel=1e-6)


def test_layers_that_cannot_be_had_are_refused_in_a_sentence(monkeypatch):
    assert choose_layers(ModelConfig(), CPU, torch.float32, only_local="experts") == Layers()

    def refused(
        model: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, only_local: str | None = None
    ) -> str:
        with pytest.raises(UserError) as caught:
            choose_layers(model, device, dtype, only_local)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(THEIRS, CPU).startswith("model.layers is transformer_engine, but that needs a CUDA device")
    monkeypatch.setattr(layers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert "but TransformerEngine is not installed; set it to local" in refused(THEIRS, GPU)
    monkeypatch.setattr(layers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    assert choose_layers(THEIRS, GPU, torch.float32, only_local=None) == Layers("transformer_engine")
    assert "but the model has experts" in refused(THEIRS, GPU, only_local="experts")
    in_fp8 = ModelConfig(layers="transformer_engine", fp8=True)
    assert "that goes with bf16 and this run computes in float32" in refused(in_fp8, GPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    assert "that needs compute capability 8.9 and A100 has less" in refused(in_fp8, GPU)


def test_fp8_needs_transformer_engine_s_layers():
    with pytest.raises(UserError, match=r"^model\.fp8 is true, but model\.layers is local; only transformer_engine"):
        load_config({}, ["model.fp8=true"])
