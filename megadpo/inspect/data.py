"""A configuration's data as the trainer will get it: the groups of its own set-up, and what was seen of every row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megadpo.checkpoint.hf import hf_directory, read_hf_config
from megadpo.checkpoint.peft import base_of, is_adapter
from megadpo.config.schema import Config
from megadpo.config.sources import eval_label, eval_sets, is_held_out
from megadpo.data.batches.packed_dataset import PackedDataset
from megadpo.data.rows.dataset import look_through, tokenise_job
from megadpo.data.rows.report import DataReport
from megadpo.data.rows.templates import read_template
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.inspect.rows import RowLook, look
from megadpo.model.families import shape_of
from megadpo.model.shape import ModelShape
from megadpo.objectives.specs import reading_of
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.training.hub import with_fetched
from megadpo.training.models import check_is_directory, with_adapter_s_base
from megadpo.training.setup import look_at_data, packed_data, step_sampler

MOST_STEPS = 64
"""Steps that are packed, to see how full micro-batches become."""
MOST_PROCESSES_TRIED = 64

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Model:
    """A model's directory with the tokenizer, and its shape: its tensors need not be here."""

    huggingface: Path
    shape: ModelShape


@dataclass(frozen=True)
class Side:
    """The rows of `data.train` or of a set of `data.eval`.

    Attributes:
        name: "train", "eval", or "eval NAME" where sets have names.
        looks: of every row, in order.
        groups: what was kept, as the trainer gets it.
        packing: the same, ready for micro-batches; None where the trainer would refuse it.
        refused: the sentence with which it would.
    """

    name: str
    report: DataReport
    looks: Sequence[RowLook]
    groups: GroupStore
    packing: PackedDataset | None
    refused: str | None = None

    def location(self, group_id: int) -> str:
        """Where the row of a group stands."""
        return self.looks[int(self.groups.rows[group_id])].location

    def tokens(self) -> dict[str, IntArray]:
        """Tokens of prompts, and of the answers by what they are, as the trainer gets them.

        Of pairs "chosen" and "rejected", of labelled answers "desirable" and "undesirable", of lists "best" and "others",
        of examples "answer". A group's first prompt stands for all.
        """
        groups = self.groups
        lengths_S, first_G = groups.segment_lengths(), np.asarray(groups.columns.group_segments_G)[:-1]
        names, role_R = answer_roles(self)
        num_prompts_G = np.asarray(groups.columns.num_prompts_G, np.int64)
        num_responses_G = np.diff(groups.response_offsets_G)
        within_R = np.arange(groups.num_responses) - np.repeat(groups.response_offsets_G[:-1], num_responses_G)
        answers_R = lengths_S[np.repeat(first_G + num_prompts_G, num_responses_G) + within_R]
        return {"prompt": lengths_S[first_G], **{name: answers_R[role_R == place] for place, name in enumerate(names)}}


@dataclass(frozen=True)
class Packed:
    """How full the micro-batches of a run's first steps are.

    Attributes:
        num_steps: that were packed, of `num_all_steps`.
        fill: tokens over the room of all micro-batches.
        per_step: micro-batches of a step, over all replicas, on average.
        pairs_per_micro_batch: on average.
    """

    num_steps: int
    num_all_steps: int
    fill: float
    per_step: float
    pairs_per_micro_batch: float


@dataclass(frozen=True)
class Inspected:
    """What was read of a configuration's data.

    Attributes:
        config: resolved.
        sides: the training rows, then the held-out ones, where there are any.
        packed: None where training would be refused.
        template: which chat template renders conversations, in words.
    """

    config: Config
    model: Model
    layout: Layout
    tokenizer: Any
    template: str
    sides: Sequence[Side]
    packed: Packed | None


def read_data(config: Config) -> Inspected:
    """Read, tokenise and pack the data of a configuration as a run of it would; nothing is started.

    Raises:
        UserError: the model's directory, a file or a row cannot be read at all. What the trainer refuses later is in
            `Side.refused`.
    """
    for name, value in (("model.path", config.model.path), ("data.train", config.data.train)):
        if value is None or value == "":
            raise UserError(f"{name} is required: set it in the configuration or as {name}=… on the command line")
    if config.data.streaming:
        raise UserError("data.streaming is true, and inspect reads all rows; give a part of them, and data.streaming=false")
    config = with_adapter_s_base(with_fetched(config)).resolved()
    model, layout = open_shape(config), smallest_layout(config)
    look_at_data(config)
    sides = [_side(config, value, label, model, layout) for label, value in sources_by_label(config).items()]
    return Inspected(
        config=config,
        model=model,
        layout=layout,
        tokenizer=load_tokenizer(str(model.huggingface), read_template(config.data.chat_template)),
        template=template_words(config, model.huggingface),
        sides=sides,
        packed=packed_steps(config, sides[0]),
    )


def sources_by_label(config: Config) -> dict[str, Any]:
    """The sources of each of the configuration's sets of rows, by the name of its `Side`."""
    held_out = {eval_label(name): value for name, value in eval_sets(config.data.eval).items()}
    return {"train": config.data.train} | held_out


def open_shape(config: Config) -> Model:
    """The shape of the model at `model.path`, which may be an adapter of it; its tensors are not looked for."""
    path = config.model.path
    check_is_directory(path, "model.path")
    path = base_of(path) if is_adapter(path) else path
    return Model(hf_directory(path), shape_of(read_hf_config(path)))


def smallest_layout(config: Config) -> Layout:
    """The layout on the fewest processes that the options allow: how many a run has is not known here."""
    parallel = config.parallel
    one_replica = parallel.tensor * parallel.pipeline * parallel.context
    for count in itertools.count(1):
        try:
            return choose_layout(parallel, one_replica * count)
        except UserError:
            if count >= MOST_PROCESSES_TRIED or parallel.expert * parallel.expert_tensor == 1:
                raise
    raise AssertionError("count has no end")


def _side(config: Config, sources: Any, name: str, model: Model, layout: Layout) -> Side:
    found, job = tokenise_job(config.data, sources, str(model.huggingface), reading_of(config.objective), is_held_out(name))
    groups, report, seen = look_through(found, job, config.data.num_workers, look)
    side = Side(name, report, [row for part in seen for row in part], groups, None)
    try:
        report.check([source.name for source in found])
        reports: dict[str, DataReport] = {}
        packing = packed_data(config, sources, model, layout, reports, name, (groups, report))
    except UserError as error:
        return replace(side, refused=str(error))
    assert packing.groups.digest == groups.first(len(packing.groups)).digest, "the cache holds what was made just now"
    return replace(side, report=reports[name], groups=packing.groups, packing=packing)


def packed_steps(config: Config, train: Side) -> Packed | None:
    """The first steps of a run, packed."""
    packing = train.packing
    if packing is None:
        return None
    try:
        sampler = step_sampler(config, packing)
    except UserError:
        return None
    num_all_steps = config.train.steps or sampler.num_steps or 1
    num_steps = min(num_all_steps, MOST_STEPS)
    num_tokens, num_groups, num_bins = 0, 0, 0
    for step in range(num_steps):
        group_ids = sampler.group_ids(step)
        num_tokens += int(packing.num_tokens_G[group_ids].sum())
        num_groups += len(group_ids)
        num_bins += sum(map(len, packing.bins(group_ids)))
    room = num_bins * packing.options.tokens_per_micro_batch
    return Packed(num_steps, num_all_steps, num_tokens / room, num_bins / num_steps, num_groups / num_bins)


def answer_roles(side: Side) -> tuple[list[str], IntArray]:
    """What the answers of a kind of rows are, and int64 [R]: which of these each response is."""
    groups, kind = side.groups, side.report.kind
    starts, num_responses_G = groups.response_offsets_G[:-1], np.diff(groups.response_offsets_G)
    if kind == "labels":
        return ["desirable", "undesirable"], np.where(np.asarray(groups.row_values["label"]) > 0.5, 0, 1)
    within_R = np.arange(groups.num_responses) - np.repeat(starts, num_responses_G)
    if kind == "examples":
        return ["answer"], np.zeros_like(within_R)
    return (["chosen", "rejected"] if kind == "pairs" else ["best", "others"]), np.minimum(within_R, 1)


def template_words(config: Config, directory: Path) -> str:
    """Which chat template renders conversations."""
    value = config.data.chat_template
    if value is not None:
        is_file = read_template(value) != value
        return f"data.chat_template: {value}" if is_file else "data.chat_template, given as text"
    has_own = load_tokenizer(str(directory)).chat_template
    return f"the tokenizer's own, in {directory}" if has_own else "none: the tokenizer has no chat template"
