"""`megadpo plan CONFIG --devices N --memory 80GiB`: memory a rank and time a step of every way to run a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.planning import report
from megadpo.planning.hardware import CALIBRATED_ON, CARDS, USABLE, Rates, rates_of
from megadpo.planning.job import job_of
from megadpo.planning.search import Job, Search, search

UNITS = {"": 1, "B": 1, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def plan_devices(config: Config, held: Sequence[str], arguments: argparse.Namespace) -> int:
    """Print what fits, fastest first, and why the rest does not; 1 where nothing fits.

    Args:
        held: options that the command line names, which are not searched.

    Raises:
        UserError: no model's config.json, a card that is not known, figures that are none.
    """
    card = arguments.card or CALIBRATED_ON
    rates = _rates(card, arguments)
    memory_gib = _bytes(arguments.memory) / 2**30 if arguments.memory else rates.gib / USABLE
    usable_gib = memory_gib * USABLE
    top = 5 if arguments.top is None else arguments.top
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    job = job_of(config, arguments.devices, held, arguments.prompt_tokens, arguments.response_tokens)
    found = search(job, rates, usable_gib * 2**30, top)
    if arguments.json:
        print(json.dumps(report.as_json(job, found, rates, memory_gib, usable_gib)))
    else:
        name = next(known for known in CARDS if known.lower() == card.lower())
        _print(job, found, report.title(job, rates, name, memory_gib, usable_gib), usable_gib)
    return 0 if found.fits else 1


def _print(job: Job, found: Search, title: Sequence[str], usable_gib: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    for line in title:
        console.print(line, markup=False)
    if found.fits:
        rows = [report.row(each) for each in found.fits]
        shown = [number for number, name in enumerate(report.COLUMNS) if name not in report.SIZES or _varies(rows, number)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for number in shown:
            is_text = report.COLUMNS[number] in ("engine", "recompute", "bound by")
            table.add_column(report.COLUMNS[number], justify="left" if is_text else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*(cells[number] for number in shown))
        console.print()
        # A table is as wide as it has to be: a terminal wraps it, a file keeps it.
        Console(highlight=False, width=max(console.width, 160)).print(table)
        best = found.fits[0]
        console.print("\nThe fastest:", style="bold")
        console.print(report.bottleneck(best.step), markup=False)
        for line in report.memory_lines(best.step.memory, best.step.plan.layout.pipeline):
            console.print(line, markup=False)
        console.print("\n" + report.yaml_of(job, best.options), markup=False, end="")
    else:
        console.print(f"\nNothing fits on {job.num_devices:,} devices, of {found.num_tried:,} ways.", style="bold")
    if found.misfits:
        console.print("\nThese do not fit:", style="bold")
        for miss in found.misfits[:3]:
            console.print(report.misfit(miss, usable_gib), markup=False)
    if found.refused:
        console.print("\nRefused:", style="bold")
        for reason, count in found.refused.most_common(5):
            console.print(reason + (f" ({count:,} ways)" if count > 1 else ""), markup=False)


def _varies(rows: Sequence[Sequence[str]], number: int) -> bool:
    """Whether a column says anything but 1."""
    return any(cells[number] != "1" for cells in rows)


def _rates(card: str, arguments: argparse.Namespace) -> Rates:
    """The card's rates, with what the command line says in their place."""
    rates = rates_of(card)
    given: dict[str, Any] = {
        "peak": arguments.peak,
        "products": arguments.share_of_peak,
        "nvlink": arguments.intra_node,
        "network": arguments.inter_node,
        "node": arguments.devices_per_node,
    }
    for (name, value), option in zip(
        given.items(), ("peak", "share-of-peak", "intra-node", "inter-node", "devices-per-node"), strict=True
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option} must be greater than 0, got {value:g}")
        if name == "products" and value is not None and value > 1:
            raise UserError(f"--share-of-peak must be at most 1, got {value:g}")
    if arguments.peak is not None:
        rates = dataclasses.replace(rates, attention=rates.attention * arguments.peak / rates.peak)
    return dataclasses.replace(rates, **{name: value for name, value in given.items() if value is not None})


def _bytes(text: str) -> float:
    """ "80GiB", "80GB" or a number of bytes."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(found[2].upper()) if found else None
    try:
        size = float(found[1]) * unit if found and unit is not None else 0.0
    except ValueError:
        size = 0.0
    if not 2**20 <= size < 2**60:
        raise UserError(f"--memory {text!r} is no size of a device's memory; write it as 80GiB")
    return size
