"""The command line: a table of commands, no logic.

megadpo train run.yaml train.learning_rate=5e-7 --nproc 2
megadpo logprobs --model DIR --data pairs.jsonl --out logprobs.jsonl
megadpo convert import HF_DIR OUT tensor=2 pipeline=2
megadpo convert export CHECKPOINT OUT
megadpo plan run.yaml --layouts 4 8
megadpo plan run.yaml --schedule schedule.svg
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megadpo import __version__
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.launch import launchers
from megadpo.launch import supervisor as launch
from megadpo.launch.mpi import adopt_mpi_environment
from megadpo.validation.load import load_config

if TYPE_CHECKING:
    from megadpo.parallel.layout import Layout

LOGPROBS_DEFAULTS = ("reference.mode=precomputed",)
"""`megadpo logprobs` is the precomputed reference on its own, so its options (larger micro-batches) apply."""
LATER = ("inspect", "doctor", "eval", "report")


def console() -> NoReturn:
    """The entry point of ``megadpo`` and ``python -m megadpo``: exits with main's status."""
    sys.exit(launch.run_as_one(lambda: main(sys.argv[1:])))


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit status. Raises UserError for anything the user can put right."""
    argv = launch.adopt_deepspeed_arguments(argv, os.environ)
    # mpirun reaches other machines through srun, whose variables are then those of mpirun's own helpers.
    adopt_mpi_environment(os.environ)
    launch.adopt_slurm_environment(os.environ)
    if argv and argv[0] in LATER:
        raise UserError(f"the command {argv[0]!r} is not available in this version of megadpo; see megadpo --help")
    arguments = _parser().parse_args(argv)
    status: int = arguments.command(arguments, argv)
    return status


def train(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config = load_config(arguments.config, arguments.override)
    config.require_for_training()
    request = launchers.Request(**{name: getattr(arguments, name) for name in launchers.Request.__dataclass_fields__})
    if request.names() and not _is_worker(request):
        machines = launchers.machines(request)
        worker = ["train", arguments.config, *arguments.override]
        if request.launcher not in (None, "megadpo"):
            launchers.become(request.launcher, machines, worker)
        if machines.nproc * machines.node.count > 1:
            return _start_workers(machines.nproc, worker, machines.node)
    from megadpo.training.trainer import run_training

    run_training(config)
    return 0


def logprobs(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    config = load_config(Config(), [*LOGPROBS_DEFAULTS, *arguments.override])
    request = launchers.Request(nproc=arguments.nproc)
    if request.names() and not _is_worker(request) and launchers.machines(request).nproc > 1:
        return _start_workers(arguments.nproc, argv)
    from megadpo.training.logprobs import run_logprobs

    _wrote(run_logprobs(arguments.model, arguments.data, arguments.out, config))
    return 0


def convert_import(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    layout = _layout(arguments.layout)
    from megadpo.checkpoint.convert import import_hf

    import_hf(arguments.hf_dir, arguments.out, layout.tensor, layout.pipeline, layout.chunk_layers)
    _wrote(arguments.out)
    return 0


def convert_export(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    from megadpo.checkpoint.convert import export_checkpoint

    export_checkpoint(arguments.checkpoint, arguments.out)
    _wrote(arguments.out)
    return 0


def plan(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    if arguments.micro_batches is not None and arguments.schedule is None:
        raise UserError("--micro-batches has no effect without --schedule; give both")
    if arguments.schedule is not None:
        return _plan_schedule(arguments)
    if arguments.layouts is None:
        raise UserError(
            "plan lists layouts or draws a schedule: --layouts or --schedule is missing; for example "
            "megadpo plan run.yaml --layouts 4 8"
        )
    overrides = [text for text in arguments.layouts if "=" in text]
    counts = [text for text in arguments.layouts if "=" not in text]
    if arguments.config is None:  # `plan --layouts 4 CONFIG`: --layouts has taken it
        arguments.config = next((text for text in counts if not text.isdecimal()), None)
        if arguments.config is None:
            raise UserError("plan needs the configuration file CONFIG; for example megadpo plan run.yaml --layouts 4 8")
        counts.remove(arguments.config)
    if wrong := next((text for text in counts if not text.isdecimal()), None):
        raise UserError(f"--layouts takes numbers of processes, got {wrong!r}; for example --layouts 4 8")
    config = load_config(arguments.config, [*arguments.override, *overrides])
    from megadpo.commands.plan_layouts import run_plan

    print(run_plan(config, [int(text) for text in counts]), end="")
    return 0


def _plan_schedule(arguments: argparse.Namespace) -> int:
    if arguments.layouts is not None:
        raise UserError("plan takes --layouts or --schedule, not both")
    path, overrides = arguments.schedule, arguments.override
    if "=" in path:  # an override that stands where the file would
        path, overrides = "schedule.svg", [*overrides, path]
    config = load_config(arguments.config, overrides)
    from megadpo.commands.plan_schedule import run_schedule_plan

    print(run_schedule_plan(config, path, arguments.micro_batches), end="")
    return 0


def _wrote(path: Path | str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"megadpo: wrote {path}", file=sys.stderr)


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


def _is_worker(request: launchers.Request) -> bool:
    """True in a process that torchrun, srun, … has started, whose options may repeat how many there are.

    Raises:
        UserError: they ask for something else.
    """
    if not launch.is_distributed(os.environ):
        return False
    world_size, names = os.environ["WORLD_SIZE"], request.names()
    repeats = {"--nproc", "--nnodes", "--node-rank", "--master"}.issuperset(names)
    if not repeats or world_size != str((request.nproc or 1) * (request.nnodes or 1)):
        given = " and ".join(f"{name} {getattr(request, name[2:].replace('-', '_'))}" for name in names)
        raise UserError(
            f"{given} is given, but this process is already one of {world_size} (started by torchrun, srun, …); "
            f"leave {' and '.join(names)} out"
        )
    return True


def _start_workers(nproc: int, argv: Sequence[str], node: launch.Node | None = None) -> int:
    return launch.start_workers(nproc, [sys.executable, "-m", "megadpo", *argv], node)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megadpo", description="Preference training of language models with Megatron-core.")
    parser.add_argument("--version", action="version", version=f"megadpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = commands.add_parser("train", help="train on pairs, lists, labelled answers or examples as a YAML file says")
    command.add_argument("config", metavar="CONFIG", help="YAML file; every key: docs/configuration.md")
    _add_common(command)
    command.add_argument("--launcher", choices=launchers.LAUNCHERS, help="who starts the processes (default: megadpo)")
    command.add_argument("--nnodes", type=int, metavar="N", help="machines, each with --nproc processes")
    command.add_argument("--node-rank", type=int, metavar="R", help="which of them this one is, from 0")
    command.add_argument("--master", metavar="HOST[:PORT]", help="machine 0, as the others reach it (port 29500)")
    command.add_argument("--port", type=int, metavar="PORT", help="where the processes meet on machine 0")
    command.add_argument("--hostfile", type=Path, metavar="FILE", help="the machines, a line `HOST slots=N` each")
    command.set_defaults(command=train)

    command = commands.add_parser("logprobs", help="write the log-probs of chosen and rejected, a line a pair")
    command.add_argument("--model", required=True, metavar="DIR", help="Hugging Face model directory")
    command.add_argument("--data", required=True, metavar="FILE", help="preference pairs")
    command.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    _add_common(command)
    command.set_defaults(command=logprobs)

    command = commands.add_parser("plan", help="list layouts, or draw the pipeline's schedule; starts nothing")
    command.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file; every key: docs/configuration.md")
    command.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")
    command.add_argument(
        "--layouts", metavar="N", nargs="*", help="list every layout for numbers of processes; none: 1, 2, 4 and 8"
    )
    command.add_argument(
        "--schedule", metavar="FILE", nargs="?", const="schedule.svg", help="draw the pipeline's schedule (schedule.svg)"
    )
    command.add_argument("--micro-batches", metavar="N", type=int, help="of a step, for --schedule; four for each stage")
    command.set_defaults(command=plan)

    conversions = commands.add_parser("convert", help="Hugging Face directory to checkpoint and back").add_subparsers(
        title="directions", metavar="DIRECTION", required=True
    )
    command = conversions.add_parser("import", help="Hugging Face directory to a sharded checkpoint")
    command.add_argument("hf_dir", metavar="HF_DIR")
    command.add_argument("out", metavar="OUT")
    command.add_argument("layout", metavar="tensor=N pipeline=N pipeline_layout=N,N,…", nargs="*", help="how many shards")
    command.set_defaults(command=convert_import)
    command = conversions.add_parser("export", help="a checkpoint to a Hugging Face directory")
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("out", metavar="OUT")
    command.set_defaults(command=convert_export)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("override", metavar="key.sub=value", nargs="*", help="options that replace those of the file")
    command.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine")


class _Parser(argparse.ArgumentParser):
    """argparse with errors in the form of every other error of megadpo, and options allowed between positionals."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        # `train CONFIG --nproc 2 key=value`: plain argparse has closed the list of overrides when it meets --nproc.
        namespace, unknown = super().parse_known_args(args, namespace)
        if hasattr(namespace, "override"):
            late = [argument for argument in unknown if "=" in argument and not argument.startswith("-")]
            namespace.override = [*namespace.override, *late]
            unknown = [argument for argument in unknown if argument not in late]
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if dashed := re.search(r"unrecognized arguments: .*?--([\w.]+\.\w+)(=\S*)?", message):
            message += f": an option of the configuration is written {dashed[1]}{dashed[2] or '=VALUE'}, without dashes"
        raise UserError(f"{message.replace(', key.sub=value', '')}; see {self.prog} --help")
