"""What the ranks of test_megatron.py do: Megatron-core's own model and its own way to save and load it."""

from __future__ import annotations

import multiprocessing
import queue
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from megadpo.checkpoint.hf import open_hf, read_hf_config
from megadpo.model.families import shape_of, shard_parameters
from megadpo.model.families.fill import fill_shard
from megadpo.model.shape import ModelShape
from megadpo.parallel.layout import Layout
from megadpo.parallel.world import joined_world


@dataclass(frozen=True)
class Case:
    """A checkpoint in a layout; `is_stacked`: whether Megatron-core is asked for layers in one tensor."""

    model: Path
    directory: Path
    num_tensor: int = 1
    num_pipeline: int = 1
    is_stacked: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.is_stacked else {"non_homogeneous_layers": True}


def save_each(cases: list[Case]) -> None:
    """Megatron-core saves its model, filled with the weights of the Hugging Face one."""
    for case in cases:
        with _without_cuda(), _model(case) as (model, expected):
            held = _held(model)
            for name, values in expected.items():
                held[name].data.copy_(values)
            if dist.get_rank() == 0:
                case.directory.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save({"model": model.sharded_state_dict(metadata=case.options)}, str(case.directory))


def load_each(cases: list[Case]) -> list[list[str]]:
    """Megatron-core loads what is in the directory; the parameters that are not the Hugging Face model's, bit for bit."""
    found = []
    for case in cases:
        with _without_cuda(), _model(case) as (model, expected):
            wanted = {"model": model.sharded_state_dict(metadata=case.options)}
            model.load_state_dict(dist_checkpointing.load(wanted, str(case.directory))["model"])
            held = _held(model)
            assert held.keys() == expected.keys()
            wrong = [name for name in expected if not torch.equal(held[name], expected[name])]
            found.append(wrong)
    return found


def _held(model: GPTModel) -> dict[str, torch.Tensor]:
    """Parameters, and routers' biases, which are buffers of Megatron-core's."""
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".expert_bias")}
    return dict(model.named_parameters()) | biases


@contextmanager
def _model(case: Case) -> Any:
    layout = Layout(tensor=case.num_tensor, pipeline=case.num_pipeline, expert_tensor=case.num_tensor)
    shape = shape_of(read_hf_config(case.model))
    with joined_world(layout, seed=0):
        from megatron.core import parallel_state

        stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        layers = layout.layers_of_stage(shape.num_layers, stage)
        is_first, is_last = stage == 0, stage == layout.pipeline - 1
        shards = shard_parameters(
            shape,
            tensor_rank=rank,
            num_tensor=case.num_tensor,
            layers=layers,
            has_embedding=is_first,
            has_head=is_last,
        )
        dtype = open_hf(case.model).dtype("model.norm.weight")
        ends = [shard.shape[0] for shard in shards if shard.name.endswith(("word_embeddings.weight", "output_layer.weight"))]
        model = _megatron_model(shape, case, is_first, is_last, ends[0] * case.num_tensor, dtype)
        source, expected = open_hf(case.model), {}
        for shard in shards:
            values = torch.empty(shard.shape, dtype=dtype)
            fill_shard(shard, source, values)
            expected[_local(shard.name, layers.start)] = values
        yield model, expected


def _local(name: str, first_layer: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) - first_layer)
    return ".".join(parts)


def _megatron_model(shape: ModelShape, case: Case, is_first: bool, is_last: bool, rows: int, dtype: torch.dtype) -> GPTModel:
    num_experts = None if shape.experts is None else shape.experts.count
    has_bias = shape.experts is not None and shape.experts.routing.has_correction_bias
    config = TransformerConfig(
        **shape.megatron_options() | {"moe_layer_freq": 1},
        **({"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"} if has_bias else {}),
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.num_tensor,
        pipeline_model_parallel_size=case.num_pipeline,
        pipeline_dtype=dtype,
    )
    spec = get_gpt_layer_local_spec(num_experts, False, qk_layernorm=shape.qk_norm == "head", normalization="RMSNorm")
    return GPTModel(
        config,
        spec,
        vocab_size=rows,
        max_sequence_length=64,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
    ).to(dtype)


@contextmanager
def _without_cuda() -> Any:
    """Megatron-core waits for a device and counts failures on it wherever it saves, has tied weights on it, and writes from
    processes of its own, which a rank of these worlds may not start."""
    with (
        mock.patch.dict(multiprocessing.current_process()._config, {"daemon": False}),
        mock.patch.object(filesystem_async, "_results_queue", queue.Queue()),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(torch.cuda, "current_device", lambda: "cpu"),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
    ):
        yield
