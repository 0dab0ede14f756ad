"""What a card, its node and its network do: the rates by which steps are reckoned, and where each of them comes from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from megadpo.errors import UserError


def _rate(default: float, source: str, text: str) -> Any:
    return field(default=default, metadata={"source": source, "help": text})


@dataclass(frozen=True)
class Rates:
    """What a card and its network do; the source of each says whether that was seen. The defaults are an H100's."""

    peak: float = _rate(989e12, "data sheet", "FLOP/s of dense bf16, which MFU is against")
    products: float = _rate(0.81, "measured", "share of the peak that products of many rows (tokens) reach")
    half_rows: float = _rate(200, "assumed", "rows of a product that reaches half of that: few are slow")
    attention: float = _rate(97e12, "measured", "FLOP/s of attention's kernels at these lengths; a backward is two forwards")
    memory: float = _rate(
        2.5e12, "measured", "bytes/s of norms, SwiGLU, rope, copies, sums and the optimizer, read and written"
    )
    rest: float = _rate(
        0.07, "measured", "kernels without a name here and gaps between kernels, as a share of the named ones"
    )
    launch: float = _rate(85e-6, "measured", "seconds of the host for a kernel, of which a layer's forward has 26")
    nvlink: float = _rate(330e9, "assumed", "bytes/s that a rank sends inside a node, of 450e9")
    network: float = _rate(40e9, "assumed", "bytes/s that a GPU's own 400 Gb/s adapter sends, of 50e9")
    host: float = _rate(48e9, "measured", "bytes/s between a card and its host's memory, each way, of 64e9")
    latency: float = _rate(20e-6, "assumed", "seconds of a collective for each doubling of its ranks, and of a message")
    hidden: float = _rate(0.8, "assumed", "share of the computing beside which an overlapped message can hide")
    expert_imbalance: float = _rate(1.2, "assumed", "tokens of the busiest rank's experts, over the mean")
    node: int = _rate(8, "data sheet", "GPUs of a node")
    gib: float = _rate(72.0, "assumed", "memory that may be planned for, of a card's 79 GiB")

    def product_rate(self, rows: float) -> float:
        """FLOP/s of products of so many rows."""
        return self.products * self.peak * rows / (rows + self.half_rows)

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s a rank sends in a ring over `size` ranks, each `stride` after the one before: the ranks of a node share
        its adapters' way out."""
        inside = max(1, min(size, self.node // stride))
        return self.nvlink if inside == size else min(self.nvlink, inside * self.network)

    def ring(self, num_bytes: float, stride: int, size: int) -> float:
        """Seconds of an all-gather or a reduce-scatter whose whole is `num_bytes`."""
        if size == 1:
            return 0.0
        return num_bytes * (size - 1) / size / self.bandwidth(stride, size) + self.latency * math.log2(size)

    def all_to_all(self, num_bytes: float, stride: int, size: int) -> float:
        """Seconds where each of `size` ranks has `num_bytes` and keeps its own part."""
        if size == 1:
            return 0.0
        inside = max(1, min(size, self.node // stride))
        within, across = (inside - 1) / size / self.nvlink, (size - inside) / size / self.network
        return num_bytes * (within + across) + self.latency * math.log2(size)


@dataclass(frozen=True)
class Card:
    """Figures of a card's data sheet.

    Attributes:
        peak: FLOP/s of dense bf16.
        bandwidth: bytes/s of its memory.
        gib: of its memory, as the driver shows it.
        node_bandwidth: bytes/s that it sends to others of its node.
    """

    peak: float
    bandwidth: float
    gib: float
    node_bandwidth: float


CARDS = {
    "H100": Card(989e12, 3.35e12, 79, 450e9),
    "H200": Card(989e12, 4.8e12, 140, 450e9),
    "H100-PCIe": Card(756e12, 2.0e12, 79, 64e9),
    "A100": Card(312e12, 2.04e12, 79, 300e9),
    "A100-40GB": Card(312e12, 1.56e12, 39, 300e9),
    "B200": Card(2250e12, 8.0e12, 178, 900e9),
    "L40S": Card(362e12, 0.864e12, 44, 32e9),
    "RTX-4090": Card(165e12, 1.01e12, 23.5, 32e9),
}
"""By name, without regard to case."""
USABLE = 72 / 79
"""Of a card's memory, what may be planned for: the rest is CUDA's own, and lost between blocks."""
CALIBRATED_ON = "H100"
"""Whose rates were measured (docs/many_gpus.md); of another card the same shares of its data sheet are assumed."""


def rates_of(name: str) -> Rates:
    """The rates of a card: the shares of its data sheet's figures that an H100 reached.

    Raises:
        UserError: there is no card of this name.
    """
    known = {one.lower(): one for one in CARDS}
    if name.lower() not in known:
        raise UserError(f"--card {name} is not known; use one of {', '.join(CARDS)}, or give --peak")
    card, seen, rates = CARDS[known[name.lower()]], CARDS[CALIBRATED_ON], Rates()
    return dataclasses.replace(
        rates,
        peak=card.peak,
        attention=rates.attention * card.peak / seen.peak,
        memory=rates.memory * card.bandwidth / seen.bandwidth,
        nvlink=rates.nvlink * card.node_bandwidth / seen.node_bandwidth,
        gib=rates.gib * card.gib / seen.gib,
    )
