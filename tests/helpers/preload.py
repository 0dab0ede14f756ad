"""Imported once by the fork server of tests.helpers.worlds; nothing here computes, and no thread is started."""

import contextlib
import gc
import importlib

import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mistral import modeling_mistral  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

from megadpo.platform.megatron_cpu import prepare_megatron

prepare_megatron()

# What every rank of a run imports, one by one.
for name in (
    "megadpo.training.trainer",
    "megadpo.training.step",
    "megadpo.training.setup",
    "megadpo.training.logprobs",
    "megadpo.evaluation.evaluate",
    "megadpo.engine.megatron",
    "megadpo.model.build",
):
    importlib.import_module(name)
with contextlib.suppress(ImportError):
    for name in ("megadpo.engine.deepspeed.engine", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)

# Hundreds of thousands of objects that stay: no collection looks at them again, in the server or in what is forked from it.
gc.collect()
gc.freeze()
