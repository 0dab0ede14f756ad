"""Scores every pair under the model and its reference, one after the other, in the layout that is asked for."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import numpy as np
import torch

from megadpo.checkpoint.hf import hf_directory
from megadpo.config.schema import Config, ObjectiveConfig, copy_config
from megadpo.data.store import GroupStore
from megadpo.errors import UserError
from megadpo.evaluation.request import is_reward_model
from megadpo.evaluation.scores import Floats, Measured
from megadpo.model.heads.kernels import choose_kernels
from megadpo.parallel.layout import Layout, choose_layout
from megadpo.parallel.world import world_size
from megadpo.platform.device import compute_device, resolve_dtype
from megadpo.training.models import ModelFiles, check_modules, open_model
from megadpo.training.non_finite import require_finite_logps
from megadpo.training.reference import frozen_stage
from megadpo.training.score import response_logps
from megadpo.training.setup import scoring_packing
from megadpo.validation.layout import check_layout
from megadpo.validation.model import check_linear_attention, check_same_tokenizer, check_same_vocabulary


@dataclass(frozen=True)
class Models:
    """The model and its reference, opened.

    Attributes:
        config: as it scores, with an objective that has the model's head.
        reference: None: there is none.
        has_reward_head: whether the model gives rewards, not log-probs.
        tokenizer: the directory of the tokenizer and template that the model was trained with.
    """

    config: Config
    layout: Layout
    policy: ModelFiles
    reference: ModelFiles | None
    has_reward_head: bool
    tokenizer: str


def open_models(model: str, reference: str | None, config: Config) -> Models:
    """Open both, checked against the layout and each other.

    Raises:
        UserError: a model is not there, damaged, or has another head or tokens than the other.
    """
    is_reward = is_reward_model(model)
    if is_reward and reference is not None:
        raise UserError("--reference is for language models, and the model is a reward model; leave it out")
    config = copy_config(config)
    config.objective = ObjectiveConfig(loss_type="reward" if is_reward else "sigmoid", ld_alpha=config.objective.ld_alpha)
    layout = choose_layout(config.parallel, world_size())
    policy = open_model(model, "--model", config)
    found = None if reference is None else open_model(reference, "--reference", config)
    for files in [policy] if found is None else [policy, found]:
        check_layout(layout, files.shape)
        check_modules(config, files.shape)
    check_linear_attention(config, policy.shape, None if found is None else found.shape)
    if found is not None:
        check_same_vocabulary(found.path, found.shape, policy.shape)
        check_same_tokenizer(str(found.huggingface), str(policy.huggingface))
    return Models(config, layout, policy, found, is_reward, tokenizer_directory(policy))


def tokenizer_directory(model: ModelFiles) -> str:
    """Where the model's tokenizer is: an adapter's directory may have its own, with the template it was trained with."""
    if model.merged is not None and any(hf_directory(model.merged).glob("tokenizer*")):
        return str(hf_directory(model.merged))
    return str(model.huggingface)


def measure(models: Models, groups: GroupStore) -> Measured:
    """What the models give for pairs; collective, inside of a joined world."""
    tokens_P2 = num_scored_tokens(groups).reshape(-1, 2)
    values_P2 = response_values(models, models.policy, "--model", groups).reshape(-1, 2)
    if models.has_reward_head:
        return Measured(tokens_P2, rewards_P2=values_P2)
    measured = Measured(tokens_P2, logps_P2=values_P2)
    if models.reference is None:
        return measured
    reference_P2 = response_values(models, models.reference, "--reference", groups).reshape(-1, 2)
    return replace(measured, reference_logps_P2=reference_P2)


def response_values(models: Models, files: ModelFiles, setting: str, groups: GroupStore) -> Floats:
    """[R]: the log-prob, or the reward, of every response, on every rank; collective. The model is freed again.

    Raises:
        UserError: one is not finite.
    """
    config = models.config
    choose_kernels(config.model.kernels, compute_device())
    statistic = "reward" if models.has_reward_head else "logps"
    packing = scoring_packing(config, groups, models.layout, files.shape)
    stage = frozen_stage(files.shape, models.layout, resolve_dtype(config.model.dtype), files.source, config.model)
    values_R = np.zeros(groups.num_responses)
    for group_ids, lot in response_logps(stage, packing, config.objective.ld_alpha, statistic):
        first, end = groups.response_offsets_G[[group_ids.start, group_ids.stop]]
        require_finite_logps(groups, range(first, end), lot, setting, "rewards" if models.has_reward_head else "log-probs")
        values_R[first:end] = lot
    del stage
    gc.collect()  # modules refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return values_R


def num_scored_tokens(groups: GroupStore) -> Floats:
    """[R]: tokens of each response that are scored: all but the first of one without a prompt."""
    counts = [len(r) - (not len(group.prompt_of(place))) for group in groups for place, r in enumerate(group.responses)]
    return np.array(counts, np.float64)
