"""Model directories and adapters, opened and checked against the options, the layout and each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megadpo.checkpoint.companions import companions_of
from megadpo.checkpoint.digest import tensor_files
from megadpo.checkpoint.hf import directory_warning, hf_directory, read_hf_config
from megadpo.checkpoint.merged import MergedSource, UntiedSource, unties
from megadpo.checkpoint.no_directory import why_no_model
from megadpo.checkpoint.peft import adapter_files, base_of, is_adapter, open_adapter
from megadpo.checkpoint.reward_model import as_reward_model, refuse_reward_model
from megadpo.checkpoint.sharded import open_weights
from megadpo.config.schema import Config, copy_config
from megadpo.errors import UserError
from megadpo.model.adapters.initial import NewAdapter
from megadpo.model.adapters.spec import AdapterSpec, resolve
from megadpo.model.attention.backends import choose_backend
from megadpo.model.attention.base import AttentionNeeds
from megadpo.model.families import TensorSource, check_tensors, shape_of, untied
from megadpo.model.layers import choose_layers
from megadpo.model.linear_attention.kernels import choose_delta_rule
from megadpo.model.shape import ModelShape
from megadpo.model.small_ops.choice import choose_small_ops
from megadpo.objectives.specs import has_reward_head
from megadpo.parallel.layout import Layout
from megadpo.parallel.world import place_on_machine
from megadpo.platform.device import compute_device, resolve_dtype
from megadpo.training.inputs import model_digest
from megadpo.validation.adapters import check_adapter_options
from megadpo.validation.layout import check_layout
from megadpo.validation.memory import check_recompute_layers
from megadpo.validation.model import (
    check_experts,
    check_linear_attention,
    check_reference_adapter,
    check_same_routes,
    check_same_tokenizer,
    check_same_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelFiles:
    """A model directory, opened: its configuration, and where its tensors are read from.

    Attributes:
        huggingface: the directory with config.json and the tokenizer.
        config: the transformers config, for what is exported; all else reads `shape`.
        has_new_head: whether its scalar head is drawn anew.
        warning: what is odd about its files.
        merged: the directory of an adapter that is added as the tensors are read; None: there is none.
    """

    path: str
    huggingface: Path
    config: PretrainedConfig
    shape: ModelShape
    source: TensorSource
    has_new_head: bool = False
    warning: str | None = None
    merged: str | None = None

    @property
    def files(self) -> list[Path]:
        """All that decides what the model computes: config.json, the files of its tensors, those of what is merged."""
        own = [self.huggingface / "config.json", *tensor_files(Path(self.path))]
        return own if self.merged is None else own + adapter_files(self.merged)


@dataclass(frozen=True)
class AdapterFiles:
    """Adapters of the policy or of the reference.

    Attributes:
        source: what they begin with, and what is trained whole beside them.
        is_new: they have not learned anything.
    """

    spec: AdapterSpec
    source: TensorSource
    is_new: bool


@dataclass(frozen=True)
class Begun:
    """What adapters began with, where that is a part of the model (`adapter.init: pissa`, `olora`).

    Attributes:
        tensors: their A and B, float32, by the names of `adapter_shapes`.
        residual: the model without them.
    """

    tensors: Mapping[str, Tensor]
    residual: TensorSource


def open_models(config: Config, layout: Layout) -> tuple[ModelFiles, ModelFiles]:
    """Policy and reference (which may be the same files), checked against the layout, the options and each other."""
    policy = open_model(config.model.path, "model.path", config)
    companions_of(policy.huggingface)  # what must not be exported is said now, not after the last step
    reference = policy
    if config.reference.path not in (None, config.model.path):
        assert config.reference.path is not None
        reference = open_model(config.reference.path, "reference.path", config)
        check_same_vocabulary(reference.path, reference.shape, policy.shape)
        check_same_tokenizer(str(reference.huggingface), str(policy.huggingface))
        check_same_routes(config, reference.shape, policy.shape)
        check_layout(layout, reference.shape)
        check_modules(config, reference.shape)
    check_layout(layout, policy.shape, config.train.pairs_per_step)
    check_modules(config, policy.shape)
    check_linear_attention(config, policy.shape, reference.shape)
    check_recompute_layers(config.train, layout, policy.shape.num_layers)
    check_experts(config, policy.shape)
    return policy, reference


def open_model(path: str, setting: str, config: Config) -> ModelFiles:
    """Open a Hugging Face model directory or one of our checkpoints, and check that every tensor is there.

    Args:
        config: says which head the objective trains, and the seed of a new one.

    Raises:
        UserError: naming `setting`, the file or tensor, and what is wrong.
    """
    check_is_directory(path, setting)
    if is_adapter(path):
        return _merged(open_model(base_of(path), setting, config), path, setting, config)
    hf_config, directory = read_hf_config(path), hf_directory(path)
    source = open_weights(path, config.checkpoint.verify, *place_on_machine())
    shape = shape_of(hf_config)
    check_tensors(shape, source)
    if not has_reward_head(config.objective.loss_types):
        refuse_reward_model(hf_config, f"{setting}: {path}")
        return ModelFiles(path, directory, hf_config, shape, source, warning=directory_warning(path))
    model = as_reward_model(hf_config, source, directory, config.train.seed)
    shape, warning = shape_of(model.config), directory_warning(path)
    return ModelFiles(path, directory, model.config, shape, model.source, model.has_new_head, warning)


def check_is_directory(path: str, setting: str) -> None:
    """Refuse what is no directory, a file with what it is.

    Raises:
        UserError: naming `setting`.
    """
    if not Path(path).is_dir():
        what = why_no_model(path)
        raise UserError(
            f"{setting}: {path} is no directory: {what}"
            if what
            else f"{setting}: there is no directory {path}; give a local Hugging Face model directory, or an id of the Hub"
        )


def _merged(base: ModelFiles, path: str, setting: str, config: Config) -> ModelFiles:
    """The model that the adapter of a directory makes of its base."""
    adapter = open_adapter(path, base.shape, setting, verify=config.checkpoint.verify)
    adapter.check_base(base.path, model_digest(base), setting)
    adapter.check_copies(base.source, base.path, setting)
    if unties(adapter.spec, base.shape):
        config = untied(base.config)
        base = replace(base, config=config, shape=shape_of(config), source=UntiedSource(base.source))
    return replace(base, source=MergedSource(base.source, adapter.source, adapter.spec), merged=path, has_new_head=False)


def with_adapter_s_base(config: Config) -> Config:
    """A copy that names the base of an adapter in its place, where `model.path` is an adapter that is to be trained on.

    Raises:
        UserError: the adapter's base is not here, or the options say what the adapter says.
    """
    if config.adapter.kind == "none" or not Path(config.model.path).is_dir() or not is_adapter(config.model.path):
        return config
    path = config.model.path
    if config.adapter.path not in (None, path):
        raise UserError(
            f"adapter.path is {config.adapter.path}, but model.path {path} is an adapter itself; set model.path to its base "
            f"{base_of(path)}, or remove adapter.path"
        )
    config = copy_config(config)
    config.model.path, config.adapter.path = base_of(path), path
    if config.reference.path == path and config.reference.mode == "adapter":  # the adapter as it is, not the base
        config.reference.path, config.reference.adapter = None, config.reference.adapter or path
    check_adapter_options(config)
    return config


def trained_adapter(config: Config, policy: ModelFiles) -> AdapterFiles | None:
    """The adapters that `adapter` asks for; None where the whole model is trained."""
    options = config.adapter
    if options.kind == "none":
        return None
    if options.path is not None:
        adapter = open_adapter(options.path, policy.shape, "adapter.path", options.dropout, config.checkpoint.verify)
        adapter.check_base(policy.path, model_digest(policy), "adapter.path")
        adapter.check_copies(policy.source, policy.path, "adapter.path")
        return AdapterFiles(adapter.spec, adapter.source, is_new=False)
    spec = resolve(options, policy.shape)
    return AdapterFiles(spec, NewAdapter(spec, policy.shape, config.train.seed, policy.source), is_new=True)


def reference_adapter(config: Config, policy: ModelFiles, trained: AdapterFiles | None) -> AdapterFiles | None:
    """The adapter of `reference.adapter`, beside the one that is trained."""
    if config.reference.adapter is None or trained is None:
        return None
    adapter = open_adapter(config.reference.adapter, policy.shape, "reference.adapter", verify=config.checkpoint.verify)
    adapter.check_base(policy.path, model_digest(policy), "reference.adapter")
    adapter.check_copies(policy.source, policy.path, "reference.adapter")
    check_reference_adapter(adapter.spec, trained.spec)
    return AdapterFiles(adapter.spec, adapter.source, is_new=False)


def check_modules(config: Config, shape: ModelShape) -> None:
    """Refuse a kernel of attention, small operations, and layers, that cannot be used on this machine with this model.

    Raises:
        UserError: saying why.
    """
    dtype = resolve_dtype(config.model.dtype)
    choose_backend(config.model.attention, AttentionNeeds.of(shape, compute_device(), dtype))
    choose_small_ops(config.model.small_ops, compute_device())
    if shape.linear is not None:
        choose_delta_rule(config.model.linear_attention, compute_device(), dtype)
        if config.model.quantization != "none":
            raise UserError(
                f"model.quantization is {config.model.quantization}, but the model has layers with linear attention, which "
                "are not held in 4 bits; set it to none"
            )
    if shape.experts is not None and shape.experts.has_biases:
        _check_biased_experts(config)
    choose_layers(config.model, compute_device(), dtype, shape.only_local)


def _check_biased_experts(config: Config) -> None:
    if config.model.quantization != "none":
        raise UserError(
            f"model.quantization is {config.model.quantization}, but the experts have biases, and such are not held in "
            "4 bits; set it to none"
        )
