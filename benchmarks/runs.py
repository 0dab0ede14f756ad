"""Runs of the real trainer for the benchmarks: its set-up for preference rows, and one on other pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.material import BODY, TINY_BODY, made_up_file, preference_file, save_llama, save_tokenizer
from megadpo.data.batches.sampler import StepSampler
from megadpo.data.groups import Group
from megadpo.data.store import GroupStore
from megadpo.training.setup import RunSetup, data_packing, prepare
from megadpo.validation.load import load_config


def prepared_setup(
    directory: Path,
    vocab_size: int,
    tiny: bool,
    num_pairs: int,
    capacity: int,
    max_length: int | None = None,
    adapter: dict[str, Any] | None = None,
    reference: str = "auto",
) -> tuple[RunSetup, dict[str, Any]]:
    """The trainer's set-up on the preference rows with a fresh model and tokenizer in `directory`, and what the model is.

    `adapter`: that section of the configuration; `reference`: its `reference.mode`.
    """
    directory.mkdir(exist_ok=True)
    rows, _ = preference_file(directory)
    tokenizer = save_tokenizer(directory / "model", rows, vocab_size)
    num_body = save_llama(directory / "model", len(tokenizer), TINY_BODY if tiny else BODY)
    about = {"body_parameters": num_body, "vocabulary": len(tokenizer), "dtype": "fp32"}
    config = _config(directory, rows, num_pairs, capacity, max_length) | {"adapter": adapter or {}}
    config |= {"reference": {"mode": reference}}
    return prepare(load_config(config)), about


def synthetic_config(
    directory: Path, vocab_size: int, body: dict[str, int], num_pairs: int, parallel: dict[str, int]
) -> dict[str, Any]:
    """A configuration with a fresh Llama of this size in `directory`, for runs on groups of random tokens (`setup_on`)."""
    rows = made_up_file(directory, 20)
    save_tokenizer(directory / "model", rows, 300)
    save_llama(directory / "model", vocab_size, body)
    return _config(directory, rows, num_pairs, 4096, None) | {"parallel": parallel}


def _config(directory: Path, rows: Path, num_pairs: int, capacity: int, max_length: int | None) -> dict[str, Any]:
    return {
        "model": {"path": str(directory / "model"), "dtype": "fp32"},
        "data": {"train": str(rows), "max_length": max_length, "num_workers": 1, "cache_dir": str(directory / "cache")},
        "train": {"steps": 1000, "pairs_per_step": num_pairs, "tokens_per_micro_batch": capacity},
        "output_dir": str(directory / "run"),
    }


def setup_on(setup: RunSetup, groups: Sequence[Group]) -> RunSetup:
    """The same set-up on other pairs, which its steps see in their order."""
    store, train = GroupStore.of(groups), setup.config.train
    packing = data_packing(setup.config, store, setup.layout, setup.policy.shape, train.tokens_per_micro_batch, "--capacity")
    sampler = StepSampler(store.sources, store.source_weights, train.pairs_per_step, train.seed, False, None)
    return dataclasses.replace(setup, train=packing, sampler=sampler)
