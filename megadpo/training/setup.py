"""All that can be known and refused before any process group is made: layout, model, data, steps, the output directory."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from megadpo.checkpoint.companions import Companions
from megadpo.checkpoint.peft import peft_config
from megadpo.checkpoint.sharded import companions_with_tensors
from megadpo.config.schema import Config
from megadpo.config.sources import eval_label, eval_sets, is_held_out
from megadpo.console.activity import activity
from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions
from megadpo.data.batches.sampler import StepSampler
from megadpo.data.rows.dataset import DataReport, look_at, prepare_groups, tokenise_job
from megadpo.data.rows.stream import GroupStream, StreamOptions, check_streamable
from megadpo.data.rows.templates import read_template
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.model.adapters.spec import adapter_shapes, fused_tensors
from megadpo.model.by_name import first_match
from megadpo.model.families import TensorSource, is_correction_bias, logical_shapes
from megadpo.model.layers import FP8_STREAM_MULTIPLE
from megadpo.model.shape import ModelShape, head_work
from megadpo.objectives.custom import load_custom
from megadpo.objectives.objective import Loss, Objective
from megadpo.objectives.specs import has_reward_head, reading_of, scores_prompt
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.parallel.world import world_size
from megadpo.platform.device import resolve_dtype
from megadpo.training.hub import require_hub, with_fetched
from megadpo.training.inputs import digests
from megadpo.training.models import (
    AdapterFiles,
    Begun,
    ModelFiles,
    open_models,
    reference_adapter,
    trained_adapter,
    with_adapter_s_base,
)
from megadpo.training.output_dir import claim_output_dir, make_output_dir
from megadpo.training.resume import Origin, Search, began_with, find_checkpoint
from megadpo.training.stop import slurm_end
from megadpo.validation.data import check_mismatched_fit, check_shared_prompts, check_steps_can_fill
from megadpo.validation.deepspeed import check_deepspeed_machine
from megadpo.validation.logging import check_logging
from megadpo.validation.memory import check_gradient_dtype, check_memory_machine
from megadpo.validation.model import check_adapters
from megadpo.validation.optimizer import check_frozen_stages, check_optimizer_machine, check_optimizer_names
from megadpo.validation.quantization import check_quantization_machine


@dataclass(frozen=True)
class RunSetup:
    """A run that was checked and can start.

    Attributes:
        config: resolved.
        companions: config.json and tokenizer of the policy, for checkpoints and export.
        train: the training groups, ready to be packed; of a stream, as many of its first as a step has.
        eval: the held-out sets by name; one without a name is "".
        reports: what became of the rows of "train", and of each held-out set under its `eval_label`.
        sampler: which training groups each step sees; None of a stream.
        num_steps: optimizer steps of the whole run.
        search: what makes a checkpoint one to go on from.
        origin: the checkpoint to go on from, if there is one.
        begun: what an adapter began with that is a part of the policy, once `decomposition.begin_with_parts` has made it.
        adapter: what is trained in place of the policy's own parameters; None: those are.
        reference_adapter: what the reference has in place of it, with `reference.adapter`.
        stream: how training groups are made as the run goes on, with `data.streaming`.
        own_objective: the loss `custom` where it is a function that was given in Python.
    """

    config: Config
    layout: Layout
    dtype: torch.dtype
    policy: ModelFiles
    reference: ModelFiles
    companions: Companions
    train: PackedDataset
    eval: dict[str, PackedDataset]
    reports: dict[str, DataReport]
    sampler: StepSampler | None
    num_steps: int
    output_dir: Path
    search: Search
    origin: Origin
    begun: Begun | None = None
    adapter: AdapterFiles | None = None
    reference_adapter: AdapterFiles | None = None
    stream: StreamOptions | None = None
    own_objective: Loss | None = None

    @property
    def frozen(self) -> TensorSource:
        """What the policy's own parameters are read from: its files, without what an adapter has begun with."""
        return self.policy.source if self.begun is None else self.begun.residual

    @property
    def resume(self) -> Path | None:
        """The step directory to go on from, or None."""
        return self.origin.checkpoint

    @property
    def resumes_own(self) -> bool:
        """Whether the run goes on from a checkpoint of its own directory."""
        root = (self.output_dir / "checkpoints").resolve()
        return self.resume is not None and self.resume.resolve().parent == root

    @property
    def resumed_from(self) -> str | None:
        """The step directory outside of this run's own way that it once began with, or None."""
        option = self.config.checkpoint.resume
        if self.resume is None or option not in ("auto", "never"):
            return None if self.resume is None else str(Path(option).resolve())
        return began_with(self.resume)

    @cached_property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that is trained."""
        frozen, shapes = self.config.train.freeze, self.search.shapes
        names = (name for name in shapes if first_match(frozen, name) is None and not is_correction_bias(name))
        return {name: shapes[name] for name in names}

    @cached_property
    def objective(self) -> Objective:
        """What is trained for, from `config.objective`."""
        return Objective.of(self.config.objective, self.own_objective)


def prepare(config: Config, own_objective: Loss | None = None) -> RunSetup:
    """Check everything and make the data ready, before any process group exists.

    Args:
        own_objective: as in `RunSetup`.

    Raises:
        UserError: whatever cannot work.
    """
    config.require_for_training()
    require_hub(config)
    config = with_adapter_s_base(with_fetched(config)).resolved()
    _check_surroundings(config, own_objective)
    layout = choose_layout(config.parallel, world_size())
    with activity("opening the model"):
        policy, reference = open_models(config, layout)
    adapter = trained_adapter(config, policy)
    if adapter is not None:
        check_adapters(config, policy.shape, layout, adapter.spec)
    output_dir = Path(config.output_dir)
    claim_output_dir(output_dir, config)
    with activity("looking at the data"):
        look_at_data(config)
    reports: dict[str, DataReport] = {}
    stream, sampler = stream_options(config, policy) if config.data.streaming else None, None
    if stream is None:
        train = packed_data(config, config.data.train, policy, layout, reports, "train")
        sampler = step_sampler(config, train)
    else:
        train = head_of_stream(config, stream, policy, layout)
        reports["train"] = DataReport(kind=stream.job.reading.kind)
    held_out = {
        name: packed_data(config, sources, policy, layout, reports, eval_label(name))
        for name, sources in eval_sets(config.data.eval).items()
    }
    num_steps = config.train.steps or (None if sampler is None else sampler.num_steps)
    assert num_steps is not None
    check_logging(config.logging, world_size(), num_steps)
    with activity("hashing the inputs"):
        inputs = digests(config, policy, reference, train.groups.digest if stream is None else stream)
    if adapter is None:
        search = Search.of(config, logical_shapes(policy.shape), inputs, num_steps)
    else:
        settings = peft_config(adapter.spec, policy.shape, str(Path(policy.path).resolve()))
        search = Search.of(config, adapter_shapes(policy.shape, adapter.spec), inputs, num_steps, settings)
    fused = fused_tensors(policy.shape, None if adapter is None else adapter.spec)
    check_optimizer_names(config, search.shapes, fused)
    if config.parallel.engine == "deepspeed":
        check_frozen_stages(config.train, search.shapes, layout.layers_of_chunks(policy.shape.num_layers))
    with activity("looking for a checkpoint"):
        origin = Origin(None) if config.checkpoint.resume == "never" else find_checkpoint(search)
    make_output_dir(output_dir)
    return RunSetup(
        config=config,
        layout=layout,
        dtype=resolve_dtype(config.model.dtype),
        policy=policy,
        reference=reference,
        companions=companions_with_tensors(policy.path, read_template(config.data.chat_template)),
        train=train,
        eval=held_out,
        reports=reports,
        sampler=sampler,
        num_steps=num_steps,
        output_dir=output_dir,
        search=search,
        origin=origin,
        adapter=adapter,
        reference_adapter=reference_adapter(config, policy, adapter),
        stream=stream,
        own_objective=own_objective,
    )


def _check_surroundings(config: Config, own_objective: Loss | None) -> None:
    """What the options name outside of models and data is here: a loss function, packages, devices, directories."""
    if config.objective.module is not None and own_objective is None:
        load_custom(config.objective.module)
    check_deepspeed_machine(config.parallel, resolve_dtype(config.model.dtype))
    check_memory_machine(config)
    check_quantization_machine(config)
    check_optimizer_machine(config)
    check_gradient_dtype(config.parallel, resolve_dtype(config.model.dtype) is torch.bfloat16)
    if config.checkpoint.before_deadline == "slurm":
        slurm_end(os.environ)


def data_packing(
    config: Config,
    groups: GroupStore,
    layout: Layout,
    shape: ModelShape,
    tokens_per_micro_batch: int,
    setting: str,
    split_pairs: bool = False,
) -> PackedDataset:
    """`groups`, whose tokens and work are counted here, to be packed in this layout for a model of this shape.

    Raises:
        UserError: prompts that this model cannot share.
    """
    if config.data.share_prompts:
        check_shared_prompts(groups, shape)
    return PackedDataset.of(
        groups,
        PackingOptions(
            share_prompts=config.data.share_prompts,
            tokens_per_micro_batch=tokens_per_micro_batch,
            setting=setting,
            num_data_parallel=layout.data,
            stream_multiple=layout.stream_multiple * (FP8_STREAM_MULTIPLE if config.model.fp8 else 1),
            hidden_size=shape.hidden_size,
            max_length=config.data.max_length,
            score_prompts=scores_prompt(config.objective.loss_types),
            micro_batches_multiple_of=layout.micro_batches_multiple_of,
            head_work=0.0 if has_reward_head(config.objective.loss_types) else head_work(shape),
            split_pairs=split_pairs,
        ),
    )


def scoring_packing(config: Config, groups: GroupStore, layout: Layout, shape: ModelShape) -> PackedDataset:
    """`groups` measured for forward passes without a backward, in micro-batches that may be larger than training's."""
    own = config.reference.tokens_per_micro_batch
    setting = "reference.tokens_per_micro_batch" if own else "train.tokens_per_micro_batch"
    return data_packing(config, groups, layout, shape, own or config.train.tokens_per_micro_batch, setting)


class ModelOfTokens(Protocol):
    """What token ids are held to of a model: `ModelFiles` has it, and so has one whose tensors are not here."""

    @property
    def huggingface(self) -> Path:
        """The directory with the tokenizer."""
        ...

    @property
    def shape(self) -> ModelShape:
        """Of the model that reads them."""
        ...


def check_token_ids(groups: GroupStore, model: ModelOfTokens) -> None:
    """Refuse groups with token ids that the model has no row for.

    Raises:
        UserError: the tokenizer does not belong to the model.
    """
    if groups.max_token_id() >= model.shape.vocab_size:
        raise UserError(
            f"the tokenizer in {model.huggingface} makes token id {groups.max_token_id()} but the model's vocabulary has "
            f"{model.shape.vocab_size} rows; use the tokenizer that belongs to the model"
        )


def look_at_data(config: Config) -> None:
    """Sources that cannot be read are said before any of them is tokenised."""
    look_at(config.data, config.data.train, reading_of(config.objective), held_out=False)
    for sources in eval_sets(config.data.eval).values():
        look_at(config.data, sources, reading_of(config.objective), held_out=True)


def packed_data(
    config: Config,
    sources: Any,
    model: ModelOfTokens,
    layout: Layout,
    reports: dict[str, DataReport],
    which: str,
    made: tuple[GroupStore, DataReport] | None = None,
) -> PackedDataset:
    """The groups of `sources`, tokenised or from the cache, checked, and ready to be packed.

    What became of the rows goes into `reports` under the name `which`.

    Args:
        made: as of `prepare_groups`.
    """
    reading, held_out = reading_of(config.objective), is_held_out(which)
    prepared = prepare_groups(config.data, sources, str(model.huggingface), reading, held_out, made)
    groups = prepared.groups
    if held_out and config.eval.pairs is not None:
        groups = groups.first(config.eval.pairs)
    reports[which] = prepared.report
    return checked_packing(config, groups, model, layout)


def checked_packing(config: Config, groups: GroupStore, model: ModelOfTokens, layout: Layout) -> PackedDataset:
    """`groups`, ready to be packed for training.

    Raises:
        UserError: one of them fits neither the model nor a micro-batch.
    """
    check_token_ids(groups, model)
    check_mismatched_fit(config, groups)
    return data_packing(
        config,
        groups,
        layout,
        model.shape,
        config.train.tokens_per_micro_batch,
        "train.tokens_per_micro_batch",
        config.schedule.split_pairs,
    )


def step_sampler(config: Config, train: PackedDataset) -> StepSampler:
    """Which training groups each step sees."""
    sampler = StepSampler(
        train.groups.sources,
        train.groups.source_weights,
        config.train.pairs_per_step,
        config.train.seed,
        shuffle=config.data.shuffle,
        epochs=config.train.epochs,
        lengths_G=train.num_tokens_G,
        tokens_multiple_of=config.data.step_tokens_multiple_of,
    )
    check_steps_can_fill(config, train.num_tokens_G, sampler.samples_per_epoch)
    return sampler


def stream_options(config: Config, model: ModelOfTokens) -> StreamOptions:
    """How the rows of `data.train` become a stream of groups.

    Raises:
        UserError: they cannot be streamed.
    """
    sources, job = tokenise_job(config.data, config.data.train, str(model.huggingface), reading_of(config.objective))
    check_streamable(sources)
    return StreamOptions(sources, job, config.data.streaming_buffer if config.data.shuffle else 1, config.train.seed)


def head_of_stream(config: Config, stream: StreamOptions, model: ModelOfTokens, layout: Layout) -> PackedDataset:
    """As many groups as a step has, of the first rows in their order: what is wrong with these is said before training.

    Raises:
        UserError: a row, or all of them.
    """
    groups = GroupStream(replace(stream, buffer_size=1)).next_groups(config.train.pairs_per_step)
    return checked_packing(config, groups, model, layout)
