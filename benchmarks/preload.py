"""Imported once by the fork servers of benchmarks: what a rank imports; nothing here computes, and no thread is started."""

import importlib

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, Qwen3Config  # noqa: F401

from megadpo.platform.megatron_cpu import prepare_megatron

prepare_megatron()

# With what building a model and an optimizer imports.
for name in (
    "torch._dynamo",
    "megatron.core.optimizer",
    "megadpo.training.trainer",
    "megadpo.training.setup",
    "megadpo.engine.megatron",
    "megadpo.model.build",
):
    importlib.import_module(name)
