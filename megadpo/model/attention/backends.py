"""Which backend computes attention: chosen once for a run, by device, dtype and what is installed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megadpo.errors import UserError

if TYPE_CHECKING:
    from megadpo.model.attention.base import AttentionBackend, AttentionNeeds

# Without torch, which the backends' files import: the configuration reads the names.

BACKENDS = ("cpu_flash", "flash_attn", "transformer_engine", "varlen", "flex", "buckets", "sdpa")
"""The values of `model.attention` besides "auto", which are the names of files of this folder, in the order in which "auto"
looks for one that can be used; the last one always can, so that what stands before it needs a `why_not` that refuses some
machine, dtype or model: else "auto" never comes to those behind it."""


def backend_named(name: str) -> AttentionBackend:
    """The backend of one of BACKENDS."""
    backend: AttentionBackend = importlib.import_module(f"megadpo.model.attention.{name}").BACKEND
    assert backend.name == name
    return backend


def choose_backend(requested: str, needs: AttentionNeeds) -> AttentionBackend:
    """The backend that `model.attention` asks for, or for "auto" the first that can be used.

    Raises:
        UserError: the one that was asked for cannot be used.
    """
    if requested == "auto":
        return next(backend for backend in map(backend_named, BACKENDS) if backend.why_not(needs) is None)
    backend = backend_named(requested)
    reason = backend.why_not(needs)
    if reason is not None:
        raise UserError(f"model.attention is {requested}, but {reason}; set it to auto")
    return backend


def slow_on(device_type: str, name: str) -> str | None:
    """A warning where a GPU is left without a kernel for sequences; None: there is nothing to say."""
    ways = {
        "sdpa": "segment by segment (sdpa), by which a step took about 20 times as long on an H100 as with",
        "buckets": "in padded batches (buckets), which are slower than",
    }
    if device_type != "cuda" or name not in ways:
        return None
    return (
        f"warning: attention is computed {ways[name]} a kernel for sequences; install flash-attn, or torch 2.10 or "
        "later with Triton, and leave model.attention at auto"
    )
