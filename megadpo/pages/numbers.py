"""Numbers as people read them, and the places and words of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | int) -> str:
    """A number in at most four significant digits, whole ones in full: 12,345; 0.6931; 5e-07."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [count * step for count in range(first, last + 1)]


def log_ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Powers of ten from `low` to `high` (both positive), or 1, 2 and 5 times these where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    inside = [value for value in found if low <= value <= high]
    return inside[:: max(1, math.ceil(len(inside) / at_most))]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The words of an axis's ticks, all with as many decimals as their distance needs; 20k for 20,000."""
    largest = max((abs(value) for value in values), default=0.0)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if largest >= 10 * size or (largest >= size and unit != "k"):
            return [f"{_plain(value / size)}{unit}" if value else "0" for value in values]
    if 0 < largest < 1e-3:
        return [_scientific(value) for value in values]
    return [_plain(value) for value in values]


def _plain(value: float) -> str:
    return f"{round(value, 10):.6g}"


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
