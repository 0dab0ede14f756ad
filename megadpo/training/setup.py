"""All that can be known and refused before any process group is made: layout, model, data, steps, the output directory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megadpo.checkpoint.hf import hf_directory, read_hf_config
from megadpo.checkpoint.reward_model import as_reward_model, refuse_reward_model
from megadpo.checkpoint.sharded import open_checkpoint, open_weights
from megadpo.config.schema import Config
from megadpo.data.batches.packed_dataset import Packing, prepare_packing
from megadpo.data.batches.sampler import Batches
from megadpo.data.rows.dataset import DataReport, prepare_groups
from megadpo.data.rows.report import counted
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.attention.backends import choose_backend
from megadpo.model.families import TensorSource, check_tensors, experts_of, transformer_config_kwargs
from megadpo.model.layers import FP8_STREAM_MULTIPLE, choose_layers
from megadpo.objectives.custom import load_custom
from megadpo.objectives.objective import Objective
from megadpo.objectives.specs import has_reward_head, measures_kl, reading_of, scores_prompt
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.parallel.world import world_size
from megadpo.platform.device import compute_device, resolve_dtype
from megadpo.training.output_dir import claim_output_dir, make_output_dir
from megadpo.validation import memory as memory_options
from megadpo.validation.deepspeed import check_machine
from megadpo.validation.layout import check_layout


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
class Plan:
    """A run that was checked and can start.

    Attributes:
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

    @cached_property
    def objective(self) -> Objective:
        """What is trained for, from `config.objective`."""
        return Objective.of(self.config.objective)


def prepare(config: Config) -> Plan:
    """Check everything and make the data ready, before any process group exists.

    Raises:
        UserError: whatever cannot work.
    """
    config.require_for_training()
    config = config.resolved()
    if config.objective.module is not None:
        load_custom(config.objective.module)
    check_machine(config.parallel, resolve_dtype(config.model.dtype))
    memory_options.check_machine(config)
    layout = choose_layout(config.parallel, world_size())
    policy = open_model(config.model.path, "model.path", config)
    reference = policy
    if config.reference.path not in (None, config.model.path):
        assert config.reference.path is not None
        reference = open_model(config.reference.path, "reference.path", config)
        _check_same_vocabulary(policy, reference)
        check_layout(layout, reference.config)
        check_modules(config, reference.config)
    check_layout(layout, policy.config, config.train.pairs_per_step)
    check_modules(config, policy.config)
    memory_options.check_layers(config.train, layout, policy.config.num_hidden_layers)
    if config.train.router_aux_coef and experts_of(policy.config) is None:
        raise UserError(
            f"train.router_aux_coef is {config.train.router_aux_coef!r}, but {policy.path} has no experts; remove it"
        )
    if config.parallel.engine != "megatron" and experts_of(policy.config) is not None:
        raise UserError(
            f"parallel.engine is {config.parallel.engine}, but {config.model.path} has experts, which are built for engine "
            "megatron only; use that"
        )
    output_dir = Path(config.output_dir)
    resume = claim_output_dir(output_dir, config)
    reports: dict[str, DataReport] = {}
    train = _packing(config, config.data.train, policy, layout, reports, "train")
    held_out = None if config.data.eval is None else _packing(config, config.data.eval, policy, layout, reports, "eval")
    batches = Batches(
        train.groups.sources,
        train.groups.source_weights,
        config.train.pairs_per_step,
        config.train.seed,
        config.data.shuffle,
        config.train.epochs,
        train.num_tokens_G,
        config.data.step_tokens_multiple_of,
    )
    _check_steps_can_fill(config, train, batches.samples_per_epoch)
    num_steps = config.train.steps or batches.num_steps
    assert num_steps is not None
    if resume is not None:
        _check_resume(resume, train.groups, num_steps)
    make_output_dir(output_dir)
    return Plan(
        config,
        layout,
        resolve_dtype(config.model.dtype),
        policy,
        reference,
        train,
        held_out,
        reports,
        batches,
        num_steps,
        output_dir,
        resume,
    )


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
    if measures_kl(config.objective.loss_types):
        _check_mismatched_fit(config, groups)
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


def _check_steps_can_fill(config: Config, train: Packing, samples_per_epoch: int) -> None:
    """Refuse a multiple that no step reaches, and a data set that is no two steps long: nothing could be exchanged."""
    multiple, size = config.data.step_tokens_multiple_of, config.train.pairs_per_step
    if multiple is None:
        return
    mean = float(train.num_tokens_G.mean()) * size
    if mean < multiple:
        raise UserError(
            f"data.step_tokens_multiple_of is {multiple}, but a step of {size} pairs has {mean:.0f} tokens on average; "
            "lower it to at most that, raise train.pairs_per_step, or remove it"
        )
    if samples_per_epoch < 2 * size:
        raise UserError(
            f"data.step_tokens_multiple_of exchanges pairs between the steps of an epoch, but an epoch of "
            f"{samples_per_epoch} pairs has no two steps of {size}; remove it or lower train.pairs_per_step"
        )


def _check_mismatched_fit(config: Config, groups: GroupStore) -> None:
    """KTO puts any prompt before any answer: what that can come to must fit, so that its KL never depends on packing."""
    longest = groups.longest_mismatch()
    if config.data.max_length is not None:
        longest = min(longest, config.data.max_length)
    if longest > config.train.tokens_per_micro_batch:
        raise UserError(
            f"train.tokens_per_micro_batch is {config.train.tokens_per_micro_batch}, but kto may put a prompt before "
            f"another row's answer, {longest} tokens together; raise it or lower data.max_length"
        )


def _check_resume(checkpoint: Path, groups: GroupStore, num_steps: int) -> None:
    """Refuse a checkpoint that this run cannot go on from."""
    opened = open_checkpoint(checkpoint)
    step, digest = opened.state.get("step"), opened.state.get("data_digest")
    if not isinstance(step, int) or digest is None or "exp_avg" not in opened.kinds:
        raise UserError(f"{checkpoint} holds no training state to resume from; it is a converted model")
    if digest != groups.digest:
        raise UserError(
            f"{checkpoint} was made with other training pairs than data.train gives now; resume with the same data, "
            "tokenizer and truncation, or set checkpoint.resume to never in a new output_dir"
        )
    if step > num_steps:
        planned = counted(num_steps, "step")
        raise UserError(f"{checkpoint} is at step {step}, beyond the {planned} of this run; raise train.steps")


def _check_same_vocabulary(policy: ModelFiles, reference: ModelFiles) -> None:
    if policy.config.vocab_size != reference.config.vocab_size:
        raise UserError(
            f"reference.path: {reference.path} has {reference.config.vocab_size} vocabulary rows and the policy "
            f"{policy.config.vocab_size}; both must read the same tokens"
        )
