"""`megadpo eval --model DIR --data FILE …` or `megadpo eval RUN`: how good a model's preferences and its answers are."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadpo.commands.parsing import add_nproc, report_written
from megadpo.config.schema import Config
from megadpo.console.activity import activity
from megadpo.errors import UserError
from megadpo.launch.launchers import Request as Launch
from megadpo.launch.launchers import start_processes

if TYPE_CHECKING:
    from megadpo.evaluation.request import Generation, Harness, Request

HELP = "judge a model: reward accuracy by subset, calibration, answers beside the reference's, lm-eval tasks"

OPTION = re.compile(rf"({'|'.join(field.name for field in dataclasses.fields(Config))})\.\w+=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = "a run's directory or its YAML file, whose hf/, reference and data.eval are taken; key.sub=value replaces options"
    parser.add_argument("override", metavar="RUN key.sub=value", nargs="*", help=run)
    parser.add_argument("--model", metavar="DIR", help="model, PEFT or checkpoint directory")
    parser.add_argument("--reference", metavar="DIR", help="what it is compared with; none (default: an adapter's base)")
    data = "pairs, each file a subset or with a column `subset`, as RewardBench has it"
    parser.add_argument("--data", metavar="[NAME=]FILE", nargs="+", action="extend", default=[], help=data)
    parser.add_argument("--subset-column", metavar="NAME", help="the column that names a row's subset (default: subset)")
    parser.add_argument("--beta", type=float, metavar="B", help="of implicit rewards (default: the run's, or 0.1)")
    kinds = "log_ratio, mean_log_ratio, log_prob, mean_log_prob or reward (default: what suits the model)"
    parser.add_argument("--score", metavar="KIND", help=kinds)
    chat = "prompts of text are messages to the chat template (default: auto, in RewardBench's subsets)"
    parser.add_argument("--chat", choices=("auto", "yes", "no"), default="auto", help=chat)
    parser.add_argument("--generate", metavar="FILE|N", help="answer a file's prompts, or N of the data")
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling (default: 0, greedy)")
    parser.add_argument("--top-p", type=float, metavar="P", help="of sampling (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling (default: 42)")
    parser.add_argument("--generator", choices=("transformers", "vllm"), help="who generates (default: transformers)")
    parser.add_argument("--harness", metavar="TASK,…", help="tasks of lm-evaluation-harness")
    parser.add_argument("--harness-tasks", metavar="DIR", help="YAML files of tasks of your own")
    parser.add_argument("--harness-limit", type=int, metavar="N", help="documents a task")
    parser.add_argument("--harness-fewshot", type=int, metavar="N", help="examples before a question")
    harness_chat = "questions are messages to the model's chat template"
    parser.add_argument("--harness-chat", action="store_true", default=None, help=harness_chat)
    parser.add_argument("--out", metavar="DIR", help="write eval.json and pairs.jsonl (default: eval/ beside a run's hf/)")
    parser.add_argument("--json", action="store_true", help="eval.json on stdout in place of tables")
    add_nproc(parser)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    runs, overrides, data = _sorted(arguments)
    status = start_processes(Launch(nproc=arguments.nproc), argv)
    if status is not None:
        return status
    with activity("loading torch"):
        from megadpo.evaluation.evaluate import run_evaluation
        from megadpo.parallel.world import rank

    request = _request(arguments, runs, overrides, data)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, too
        report = run_evaluation(request)
    if rank() > 0:
        return 0
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        from megadpo.evaluation.tables import console, tables

        console().print(tables(report))
    if request.out is not None:
        report_written(request.out / "eval.json")
    return 0


def _sorted(arguments: argparse.Namespace) -> tuple[str | None, list[str], list[str]]:
    """The run, the overrides and the data, wherever these stand on the command line.

    Raises:
        UserError: there is no model, or more than one run.
    """
    data = [word for word in arguments.data if not OPTION.match(word)]
    overrides = [word for word in [*arguments.override, *arguments.data] if OPTION.match(word)]
    runs = [word for word in arguments.override if not OPTION.match(word)]
    if len(runs) > 1:
        raise UserError(f"eval takes one run, got {' and '.join(runs)}; data is given as --data FILE")
    if not runs and arguments.model is None:
        raise UserError(
            "eval needs a model: megadpo eval --model DIR --data FILE, or megadpo eval RUN; see megadpo eval --help"
        )
    return (runs[0] if runs else None), overrides, data


def _request(arguments: argparse.Namespace, run: str | None, overrides: list[str], words: list[str]) -> Request:
    """What the command line asks for; raises UserError where it contradicts itself."""
    from megadpo.evaluation.request import NO_REFERENCE, SETTINGS, Request, default_reference, open_run
    from megadpo.evaluation.subsets import named_data
    from megadpo.platform.hub import fetched
    from megadpo.validation.load import load_config

    data, out = tuple(named_data(words)), arguments.out
    given = "" if arguments.model is None else fetched(arguments.model, "--model")
    remarks: tuple[str, ...] = ()
    beta = [] if arguments.beta is None else [f"objective.beta={arguments.beta!r}"]
    if run is None:
        model, config = given, load_config(Config(), [*SETTINGS, *overrides, *beta])
        reference = default_reference(model)
        home = Path(model).parent if Path(model).name == "hf" and (Path(model).parent / "config.yaml").is_file() else None
    else:
        found = open_run(run, [*overrides, *beta])
        model, config, reference, remarks = given or found.model, found.config, found.reference, found.remarks
        data = data or found.data
        home = found.path if arguments.model is None else None
        if not Path(model).is_dir():
            raise UserError(
                f"{model} is not there: the run has not ended; give a checkpoint of it: --model {found.path}/checkpoints/…"
            )
        if not data and arguments.generate is None and arguments.harness is None:
            raise UserError(f"the run {found.path} has no data.eval; give held-out pairs with --data FILE")
    if arguments.reference is not None:
        reference = None if arguments.reference == NO_REFERENCE else arguments.reference
    if reference is not None:
        reference = fetched(reference, "--reference")
    return Request(
        model=model,
        reference=reference,
        config=config,
        data=data,
        score=arguments.score,
        subset_column=arguments.subset_column,
        chat=arguments.chat,
        out=Path(out) if out else home and home / "eval",
        run=None if run is None else str(found.path),
        generation=_generation(arguments),
        harness=_harness(arguments),
        remarks=remarks,
    )


def _generation(arguments: argparse.Namespace) -> Generation | None:
    names = ("temperature", "top_p", "max_new_tokens", "seed", "generator")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.generate is None:
        _refuse(options, "--generate N")
        return None
    from megadpo.evaluation.request import Generation

    given = arguments.generate
    return Generation(int(given) if re.fullmatch(r"-?\d+", given) else given, **options)


def _harness(arguments: argparse.Namespace) -> Harness | None:
    names = ("harness_tasks", "harness_limit", "harness_fewshot", "harness_chat")
    if arguments.harness is None:
        _refuse([name for name in names if getattr(arguments, name) is not None], "--harness TASK")
        return None
    from megadpo.evaluation.request import Harness

    tasks = tuple(task.strip() for task in arguments.harness.split(",") if task.strip())
    chat = bool(arguments.harness_chat)
    return Harness(tasks, arguments.harness_tasks, arguments.harness_limit, arguments.harness_fewshot, chat)


def _refuse(options: Iterable[str], needed: str) -> None:
    for option in options:
        raise UserError(f"--{option.replace('_', '-')} has no effect without {needed}; add that or leave it out")
