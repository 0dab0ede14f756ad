"""Llama 1, 2, 3 and 3.x."""

from __future__ import annotations

from megadpo.model.families.common import Family, no_windows

LLAMA = Family("llama", ("LlamaForCausalLM",), "LlamaForSequenceClassification", no_windows)
