"""All that can be known and refused before any process group is made: layout, model, data, steps, the output directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megadpo.checkpoint.hf import hf_directory, read_hf_config
from megadpo.checkpoint.reward_model import as_reward_model, refuse_reward_model
from megadpo.checkpoint.sharded import open_weights
from megadpo.config.schema import Config
from megadpo.data.batches.packed_dataset import Packing, prepare_packing
from megadpo.data.batches.sampler import Batches
from megadpo.data.rows.dataset import DataReport, prepare_groups
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.attention.backends import choose_backend
from megadpo.model.families import TensorSource, check_tensors, experts_of, transformer_config_kwargs
from megadpo.model.layers import FP8_STREAM_MULTIPLE, choose_layers
from megadpo.objectives.custom import load_custom
from megadpo.objectives.specs import has_reward_head, reading_of, scores_prompt
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.parallel.world import world_size
from megadpo.platform.device import compute_device, resolve_dtype
from megadpo.training.output_dir import check_resumable, claim_output_dir, make_output_dir
from megadpo.validation.data import check_mismatched_fit, check_steps_can_fill
from megadpo.validation.deepspeed import check_deepspeed_machine
from megadpo.validation.layout import check_layout
from megadpo.validation.memory import check_memory_machine, check_recompute_layers
from megadpo.validation.model import check_experts, check_same_vocabulary


@dataclass(frozen=True)
class ModelFiles:
    """A model directory, opened: its configuration, and where its tensors are read from.

    Attributes:
        huggingface: the directory with config.json and the tokenizer.
        has_new_head: whether its scalar head is drawn anew.
    """

    path: str
    huggingface: Path
    config: Any
    source: TensorSource
    has_new_head: bool = False


@dataclass(frozen=True)
class RunSetup:
    """A run that was checked and can start.

    Attributes:
        config: resolved.
        train: the training groups, ready to be packed.
        eval: the held-out groups, where there are any.
        reports: what became of the rows of "train" and "eval".
        batches: which training groups each step sees.
        num_steps: optimizer steps of the whole run.
        resume: the step directory to go on from, or None.
    """

    config: Config
    layout: Layout
    dtype: torch.dtype
    policy: ModelFiles
    reference: ModelFiles
    train: Packing
    eval: Packing | None
    reports: dict[str, DataReport]
    batches: Batches
    num_steps: int
    output_dir: Path
    resume: Path | None


def prepare(config: Config) -> RunSetup:
    """Check everything and make the data ready, before any process group exists.

    Raises:
        UserError: whatever cannot work.
    """
    config.require_for_training()
    config = config.resolved()
    _check_surroundings(config)
    layout = choose_layout(config.parallel, world_size())
    policy, reference = _open_models(config, layout)
    output_dir = Path(config.output_dir)
    resume = claim_output_dir(output_dir, config)
    reports: dict[str, DataReport] = {}
    train = _packing(config, config.data.train, policy, layout, reports, "train")
    held_out = None if config.data.eval is None else _packing(config, config.data.eval, policy, layout, reports, "eval")
    batches = _batches(config, train)
    num_steps = config.train.steps or batches.num_steps
    assert num_steps is not None
    if resume is not None:
        check_resumable(resume, train.groups.digest, num_steps)
    make_output_dir(output_dir)
    return RunSetup(
        config=config,
        layout=layout,
        dtype=resolve_dtype(config.model.dtype),
        policy=policy,
        reference=reference,
        train=train,
        eval=held_out,
        reports=reports,
        batches=batches,
        num_steps=num_steps,
        output_dir=output_dir,
        resume=resume,
    )


def _check_surroundings(config: Config) -> None:
    """What the options name outside of models and data is here: a loss function, packages, devices, directories."""
    if config.objective.module is not None:
        load_custom(config.objective.module)
    check_deepspeed_machine(config.parallel, resolve_dtype(config.model.dtype))
    check_memory_machine(config)


def _open_models(config: Config, layout: Layout) -> tuple[ModelFiles, ModelFiles]:
    """Policy and reference (which may be the same files), checked against the layout, the options and each other."""
    policy = open_model(config.model.path, "model.path", config)
    reference = policy
    if config.reference.path not in (None, config.model.path):
        assert config.reference.path is not None
        reference = open_model(config.reference.path, "reference.path", config)
        check_same_vocabulary(reference.path, reference.config, policy.config)
        check_layout(layout, reference.config)
        check_modules(config, reference.config)
    check_layout(layout, policy.config, config.train.pairs_per_step)
    check_modules(config, policy.config)
    check_recompute_layers(config.train, layout, policy.config.num_hidden_layers)
    check_experts(config, policy.config)
    return policy, reference


def open_model(path: str, setting: str, config: Config) -> ModelFiles:
    """Open a Hugging Face model directory or one of our checkpoints, and check that every tensor is there.

    Args:
        config: says which head the objective trains, and the seed of a new one.

    Raises:
        UserError: naming `setting`, the file or tensor, and what is wrong.
    """
    if not Path(path).is_dir():
        raise UserError(f"{setting}: there is no directory {path}; give a local Hugging Face model directory")
    hf_config, source, directory = read_hf_config(path), open_weights(path), hf_directory(path)
    check_tensors(hf_config, source)
    if not has_reward_head(config.objective.loss_types):
        refuse_reward_model(hf_config, f"{setting}: {path}")
        return ModelFiles(path, directory, hf_config, source)
    model = as_reward_model(hf_config, source, directory, config.train.seed)
    return ModelFiles(path, directory, model.config, model.source, model.has_new_head)


def check_modules(config: Config, hf_config: Any) -> None:
    """Refuse a kernel of attention, and layers, that cannot be used on this machine with this model.

    Raises:
        UserError: saying why.
    """
    dtype = resolve_dtype(config.model.dtype)
    choose_backend(config.model.attention, compute_device(), dtype, transformer_config_kwargs(hf_config)["kv_channels"])
    choose_layers(config.model, compute_device(), dtype, experts_of(hf_config) is not None)


def data_packing(
    config: Config,
    groups: GroupStore,
    layout: Layout,
    hf_config: Any,
    tokens_per_micro_batch: int,
    setting: str,
    split_pairs: bool = False,
) -> Packing:
    """`groups` measured for packing in this layout, for the model of `hf_config`."""
    return prepare_packing(
        groups,
        share_prompts=config.data.share_prompts,
        tokens_per_micro_batch=tokens_per_micro_batch,
        setting=setting,
        num_data_parallel=layout.data,
        multiple_of=layout.stream_multiple * (FP8_STREAM_MULTIPLE if config.model.fp8 else 1),
        hidden_size=hf_config.hidden_size,
        max_length=config.data.max_length,
        score_prompts=scores_prompt(config.objective.loss_types),
        micro_batches_multiple_of=layout.micro_batches_multiple_of,
        head_work=0.0 if has_reward_head(config.objective.loss_types) else head_work(hf_config),
        split_pairs=split_pairs,
    )


def head_work(hf_config: Any) -> float:
    """What a row of the head costs in tokens' worth of the layers: vocabulary x hidden over a token's parameters there."""
    num_heads, hidden = hf_config.num_attention_heads, hf_config.hidden_size
    head_dim = getattr(hf_config, "head_dim", None) or hidden // num_heads
    num_key_value_heads = getattr(hf_config, "num_key_value_heads", None) or num_heads
    attention = hidden * head_dim * (2 * num_heads + 2 * num_key_value_heads)
    experts, num_layers = experts_of(hf_config), hf_config.num_hidden_layers
    num_expert_layers = 0 if experts is None else len(experts.layers)
    columns = (num_layers - num_expert_layers) * hf_config.intermediate_size
    columns += 0 if experts is None else num_expert_layers * experts.per_token * experts.columns
    return hidden * hf_config.vocab_size / (num_layers * attention + 3 * hidden * columns)


def scoring_packing(config: Config, groups: GroupStore, layout: Layout, hf_config: Any) -> Packing:
    """`groups` measured for forward passes without a backward, in micro-batches that may be larger than training's."""
    own = config.reference.tokens_per_micro_batch
    setting = "reference.tokens_per_micro_batch" if own else "train.tokens_per_micro_batch"
    return data_packing(config, groups, layout, hf_config, own or config.train.tokens_per_micro_batch, setting)


def check_token_ids(groups: GroupStore, model: ModelFiles) -> None:
    """Refuse groups with token ids that the model has no row for.

    Raises:
        UserError: the tokenizer does not belong to the model.
    """
    if groups.max_token_id() >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {model.huggingface} makes token id {groups.max_token_id()} but the model's vocabulary has "
            f"{model.config.vocab_size} rows; use the tokenizer that belongs to the model"
        )


def _packing(
    config: Config, sources: Any, model: ModelFiles, layout: Layout, reports: dict[str, DataReport], which: str
) -> Packing:
    prepared = prepare_groups(config.data, sources, str(model.huggingface), reading_of(config.objective))
    check_token_ids(prepared.groups, model)
    groups = prepared.groups
    if which == "eval" and config.eval.pairs is not None:
        groups = groups.first(config.eval.pairs)
    check_mismatched_fit(config, groups)
    reports[which] = prepared.report
    return data_packing(
        config,
        groups,
        layout,
        model.config,
        config.train.tokens_per_micro_batch,
        "train.tokens_per_micro_batch",
        config.schedule.split_pairs,
    )


def _batches(config: Config, train: Packing) -> Batches:
    """Which training groups each step sees."""
    batches = Batches(
        train.groups.sources,
        train.groups.source_weights,
        config.train.pairs_per_step,
        config.train.seed,
        shuffle=config.data.shuffle,
        epochs=config.train.epochs,
        lengths_G=train.num_tokens_G,
        tokens_multiple_of=config.data.step_tokens_multiple_of,
    )
    check_steps_can_fill(config, train.num_tokens_G, batches.samples_per_epoch)
    return batches
