"""What checkpoints and Hugging Face directories hold, and two of them compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from megadpo.checkpoint.sharded import open_weights


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of a checkpoint or a Hugging Face directory."""
    source = open_weights(path)
    return {name: source.read(name, 0, 0, source.shape(name)[0]) for name in source.names()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def load_reward_model(directory: Path) -> Any:
    """The classifier, refusing a directory that holds more or less than it."""
    model, report = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    assert model.config.num_labels == 1
    return model
