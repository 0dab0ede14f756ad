"""`megadpo convert import HF_DIR OUT tensor=N …`, `megadpo convert export CHECKPOINT OUT` and `megadpo convert merge ADAPTER
OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megadpo.commands.parsing import report_written
from megadpo.config.schema import Config
from megadpo.console.activity import activity
from megadpo.errors import UserError
from megadpo.validation.load import load_config

if TYPE_CHECKING:
    from megadpo.parallel.layout import Layout

HELP = "Hugging Face directory to checkpoint and back; an adapter and its base to one model"
DTYPES = ("fp32", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(title="directions", metavar="DIRECTION", required=True, dest="direction")
    into = directions.add_parser("import", help="Hugging Face or PEFT directory to a sharded checkpoint")
    into.add_argument("hf_dir", metavar="HF_DIR")
    into.add_argument("out", metavar="OUT")
    into.add_argument("layout", metavar="tensor=N pipeline=N pipeline_layout=N,N,…", nargs="*", help="how many shards")
    back = directions.add_parser(
        "export", help="a checkpoint to a Hugging Face directory, or of adapters to a PEFT directory"
    )
    back.add_argument("checkpoint", metavar="CHECKPOINT")
    back.add_argument("out", metavar="OUT")
    merge = directions.add_parser("merge", help="an adapter and its base to a Hugging Face directory")
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT directory, or a checkpoint of a run with adapters")
    merge.add_argument("out", metavar="OUT")
    merge.add_argument("--base", metavar="DIR", help="the model (default: the one that the adapter names)")
    merge.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: those of the base)")
    for reader in (back, merge):
        reader.add_argument("--no-verify", action="store_true", help="do not compare a checkpoint's bytes with its hashes")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.direction == "import":
        layout = _layout(arguments.layout)
        with activity("loading torch"):
            from megadpo.checkpoint.convert import import_hf
        import_hf(arguments.hf_dir, arguments.out, layout.tensor, layout.pipeline, layout.chunk_layers)
    elif arguments.direction == "merge":
        with activity("loading torch"):
            from megadpo.checkpoint.convert import merge_adapter
            from megadpo.platform.device import resolve_dtype
        dtype = None if arguments.dtype is None else resolve_dtype(arguments.dtype)
        merge_adapter(arguments.adapter, arguments.out, arguments.base, dtype, verify=not arguments.no_verify)
    else:
        with activity("loading torch"):
            from megadpo.checkpoint.convert import export_checkpoint
        export_checkpoint(arguments.checkpoint, arguments.out, verify=not arguments.no_verify)
    report_written(arguments.out)
    return 0


def _layout(overrides: Sequence[str]) -> Layout:
    """tensor=N, pipeline=N and pipeline_layout=N,N,…, checked as the options of the same name under `parallel`."""
    for override in overrides:
        if override.partition("=")[0] not in ("tensor", "pipeline", "pipeline_layout"):
            raise UserError(
                f"unknown layout {override!r}; convert import takes tensor=N, pipeline=N and pipeline_layout=N,N,…"
            )
    from megadpo.parallel.layout import choose_layout

    parallel = load_config(Config(), [f"parallel.{override}" for override in overrides]).parallel
    return choose_layout(parallel, parallel.tensor * parallel.pipeline)
