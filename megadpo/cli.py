"""The command line: a table of commands, no logic.

megadpo inspect run.yaml --html inspect.html
megadpo plan run.yaml --devices 8 --memory 80GiB
megadpo train run.yaml train.learning_rate=5e-7 --nproc 2
megadpo report runs/first runs/second
megadpo eval --model runs/first/hf --data pairs.jsonl
megadpo logprobs --model DIR --data pairs.jsonl --out logprobs.jsonl
megadpo convert import HF_DIR OUT tensor=2 pipeline=2
megadpo convert export CHECKPOINT OUT
megadpo convert merge ADAPTER OUT
megadpo doctor run.yaml --nproc 2
megadpo completion bash
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from megadpo import __version__
from megadpo.commands import completion, convert, doctor, evaluate, inspect, logprobs, plan, report, train
from megadpo.commands.parsing import Parser
from megadpo.console.activity import begin
from megadpo.console.heartbeat import speaking
from megadpo.launch.foreign import adopt_deepspeed_arguments, adopt_slurm_environment
from megadpo.launch.mpi import adopt_mpi_environment
from megadpo.launch.signals import EXIT_FAILED, EXIT_INTERRUPTED
from megadpo.launch.worker import has_hung_threads, leave_now, run_as_one


class Command(Protocol):
    """What the file of a command has."""

    HELP: str
    """One line in the list of commands."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Says what the command takes."""

    def run(self, arguments: argparse.Namespace, argv: Sequence[str]) -> int:
        """Runs it; its exit status. `argv` is the whole command line after ``megadpo``.

        Raises:
            UserError: anything the user can put right.
        """


COMMANDS: dict[str, Command] = {"inspect": inspect, "plan": plan, "train": train, "report": report, "eval": evaluate}
COMMANDS |= {"logprobs": logprobs, "convert": convert, "doctor": doctor, "completion": completion}


def console() -> NoReturn:
    """The entry point of ``megadpo`` and ``python -m megadpo``: exits with main's status."""
    # Threads of OpenMP that spin while they wait take the processor from those that they wait for, where it is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with speaking():
        status = run_as_one(lambda: main(sys.argv[1:]))
    if status in (EXIT_FAILED, EXIT_INTERRUPTED) or has_hung_threads():
        leave_now(status)  # a thread that still writes a checkpoint is not waited for
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit status. Raises UserError for anything the user can put right."""
    argv = adopt_deepspeed_arguments(argv, os.environ)
    # mpirun reaches other machines through srun, whose variables are then those of mpirun's own helpers.
    adopt_mpi_environment(os.environ)
    adopt_slurm_environment(os.environ)
    arguments = parser().parse_args(argv)
    begin(f"{arguments.command} is at work")
    return COMMANDS[arguments.command].run(arguments, argv)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `arguments.command` is the name of the command."""
    parser = Parser(prog="megadpo", description="Preference training of language models with Megatron-core.")
    parser.add_argument("--version", action="version", version=f"megadpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    commands.choices["completion"].set_defaults(whole=parser)  # whose words it writes down
    return parser
