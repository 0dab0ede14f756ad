"""How large a tile of logits may be: those of so many scored positions as are projected at once."""

from __future__ import annotations

TILE_ROWS = 1 << 14
"""Scored positions projected at once where the vocabulary is so small that `tile_bytes` would allow more."""

CPU_TILE_BYTES = 240 << 20
"""Memory of a tile on a CPU: every row that is not in the last tile costs a product again in the backward pass."""

CUDA_TILE_SHARE = 48
"""On CUDA a tile takes at most one part in so many of the device's memory."""
