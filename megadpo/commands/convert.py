"""`megadpo convert import | export | merge | verify | inspect | doctor`: from one format to another, and looked at."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.checkpoint.no_directory import why_no_model
from megadpo.commands.parsing import report_written
from megadpo.config.schema import Config
from megadpo.console.activity import activity
from megadpo.errors import UserError
from megadpo.platform.allocator import give_back_freed_blocks
from megadpo.validation.load import load_config

if TYPE_CHECKING:
    import torch

    from megadpo.parallel.layout import Layout

HELP = "models from one format to another: Hugging Face, checkpoints, adapters, Megatron-core"
DTYPES = ("fp32", "bf16")
FORMATS = ("hf", "torch_dist")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(title="directions", metavar="DIRECTION", required=True, dest="direction")
    into = directions.add_parser("import", help="Hugging Face, PEFT or Megatron-core directory to a sharded checkpoint")
    into.add_argument("hf_dir", metavar="HF_DIR")
    into.add_argument("out", metavar="OUT")
    into.add_argument("layout", metavar="tensor=N pipeline=N pipeline_layout=N,N,…", nargs="*", help="how many shards")
    into.add_argument("--resize-vocabulary", type=int, metavar="N", help="give embedding and head N rows")
    into.add_argument("--config", metavar="DIR", help="config.json and tokenizer of a checkpoint of Megatron-core")
    back = directions.add_parser("export", help="a checkpoint to a Hugging Face, PEFT or Megatron-core directory")
    back.add_argument("checkpoint", metavar="CHECKPOINT")
    back.add_argument("out", metavar="OUT")
    back.add_argument("--format", choices=FORMATS, default="hf", help="torch_dist: Megatron-core's (default: hf)")
    merge = directions.add_parser("merge", help="an adapter and its base to a Hugging Face directory")
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT directory, or a checkpoint of a run with adapters")
    merge.add_argument("out", metavar="OUT")
    merge.add_argument("--base", metavar="DIR", help="the model (default: the one that the adapter names)")
    for writer in (into, back, merge):
        writer.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: as they are)")
    for parted in (into, back):
        parted.add_argument("--processes", type=int, default=1, metavar="N", help="convert N parts at once (1)")
    for reader in (back, merge):
        reader.add_argument("--no-verify", action="store_true", help="do not compare a checkpoint's bytes with its hashes")
    verify = directions.add_parser("verify", help="compare two models: tensors, and log-probs of sample text")
    verify.add_argument("one", metavar="ONE", help="a Hugging Face directory or a checkpoint")
    verify.add_argument("other", metavar="OTHER", help="another one")
    verify.add_argument("--text", type=Path, metavar="FILE", help="sample text, a line each")
    inspect = directions.add_parser("inspect", help="what a directory is, and its tensors")
    inspect.add_argument("directory", metavar="DIR")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    doctor = directions.add_parser("doctor", help="whether a Hugging Face directory would be trained, and what is missing")
    doctor.add_argument("directory", metavar="DIR")
    for looker in (verify, inspect, doctor):
        looker.add_argument("--json", action="store_true", help="print one JSON object in place of text")


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    give_back_freed_blocks()
    return {
        "import": _import,
        "export": _export,
        "merge": _merge,
        "verify": _verify,
        "inspect": _inspect,
        "doctor": _doctor,
    }[arguments.direction](arguments)


def _import(arguments: argparse.Namespace) -> int:
    layout = _layout(arguments.layout)
    _check_positive("--processes", arguments.processes)
    with activity("loading torch"):
        from megadpo.checkpoint.importing import ImportOptions, import_model
    options = ImportOptions(
        layout.tensor,
        layout.pipeline,
        layout.chunk_layers,
        dtype=_dtype(arguments),
        num_rows=arguments.resize_vocabulary,
        num_processes=arguments.processes,
        config=arguments.config,
    )
    notes = import_model(arguments.hf_dir, arguments.out, options)
    report_written(arguments.out)
    _say(*notes)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _check_positive("--processes", arguments.processes)
    if arguments.format != "hf" and arguments.processes > 1:
        raise UserError("--processes is for --format hf; Megatron-core's format is written by one process")
    with activity("loading torch"):
        from megadpo.checkpoint.convert import export_checkpoint, export_megatron
    source, out, verify = arguments.checkpoint, arguments.out, not arguments.no_verify
    if arguments.format == "hf":
        export_checkpoint(source, out, verify, _dtype(arguments), arguments.processes)
        report_written(out)
    else:
        flags = export_megatron(source, out, _dtype(arguments), verify)
        report_written(out)
        _say(flags)
    return 0


def _say(*sentences: str) -> None:
    for sentence in sentences:
        print(f"megadpo: {sentence}", file=sys.stderr)


def _merge(arguments: argparse.Namespace) -> int:
    with activity("loading torch"):
        from megadpo.checkpoint.convert import merge_adapter
    merge_adapter(arguments.adapter, arguments.out, arguments.base, _dtype(arguments), verify=not arguments.no_verify)
    report_written(arguments.out)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    texts = None
    if arguments.text is not None:
        try:
            texts = [line for line in arguments.text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--text: {arguments.text} cannot be read: {error}") from error
        if not texts:
            raise UserError(f"--text: {arguments.text} has no text")
    for directory in (arguments.one, arguments.other):
        _check_is_there(directory)
    with activity("loading torch"), contextlib.redirect_stdout(sys.stderr):  # what libraries say
        from megadpo.evaluation.verify import verify
    with contextlib.redirect_stdout(sys.stderr):
        verdict = verify(arguments.one, arguments.other, texts)
    if arguments.json:
        print(json.dumps({"same": verdict.is_same, **asdict(verdict)}))
    else:
        print("\n".join(verdict.lines()))
    return int(not verdict.is_same)


def _inspect(arguments: argparse.Namespace) -> int:
    _check_is_there(arguments.directory)
    with activity("loading torch"):
        from megadpo.checkpoint.describe import describe, lines
    facts, tensors = describe(arguments.directory)
    if arguments.json:
        named = {name: {"shape": list(shape), "dtype": str(dtype)} for name, (shape, dtype) in tensors.items()}
        print(json.dumps(facts | ({"each": named} if arguments.tensors else {})))
    else:
        print("\n".join(lines(facts, tensors if arguments.tensors else None)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    _check_is_there(arguments.directory)
    from megadpo.doctor.check import has_failed

    with activity("loading torch"), contextlib.redirect_stdout(sys.stderr):
        from megadpo.doctor.directory import check_directory_of_model
        from megadpo.doctor.terminal import show

        checks = list(check_directory_of_model(arguments.directory))
    if arguments.json:
        print(json.dumps({"ok": not has_failed(checks), "checks": [asdict(check) for check in checks]}))
    else:
        show(checks, sys.stdout)
    return int(has_failed(checks))


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    from megadpo.platform.device import resolve_dtype

    return None if arguments.dtype is None else resolve_dtype(arguments.dtype)


def _check_is_there(directory: str) -> None:
    """Refuse what is no directory, with what it is, before anything is loaded."""
    if not Path(directory).is_dir():
        what = why_no_model(directory)
        raise UserError(f"{directory} is no directory{f': {what}' if what else ''}")


def _check_positive(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{option} must be at least 1, got {value}")


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
