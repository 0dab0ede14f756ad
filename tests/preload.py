"""Imported once by the fork server of tests.worlds; nothing here computes."""

import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mistral import modeling_mistral  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

from megadpo.platform.megatron_cpu import prepare_megatron

prepare_megatron()
