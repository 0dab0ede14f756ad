"""`megadpo eval`: from a request to all figures of a model, as one object of plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megadpo.config.schema import copy_config
from megadpo.console.activity import activity
from megadpo.data.rows.dataset import Prepared, prepare_groups
from megadpo.data.rows.templates import read_template
from megadpo.data.rows.tokenise import load_tokenizer
from megadpo.errors import UserError
from megadpo.evaluation import reward_bench
from megadpo.evaluation.answers import side_by_side
from megadpo.evaluation.figures import Report, figures_of, finite, lines_of, remarks_of
from megadpo.evaluation.generate import exported, prompts_of_data, prompts_of_file, require_generator
from megadpo.evaluation.harness import require_harness, run_harness
from megadpo.evaluation.measure import Models, measure, open_models
from megadpo.evaluation.request import Request, check_score
from megadpo.evaluation.subsets import COLUMN, REWARD_BENCH_COLUMNS, LabelledRows, first_of_each, read_subsets, sources_of
from megadpo.files import make_writable_directory, replacing
from megadpo.parallel.world import joined_world, rank, world_size
from megadpo.platform.device import resolve_dtype
from megadpo.training.console import log
from megadpo.training.setup import check_token_ids


def run_evaluation(request: Request) -> Report:
    """All figures, on every rank; rank 0 writes them to `request.out`: eval.json, and pairs.jsonl with a line a pair.

    Raises:
        UserError: whatever cannot work, before anything is computed where that can be known.
    """
    models = open_models(request.model, request.reference, request.config)
    _check(request, models)
    template = read_template(request.config.data.chat_template)
    tokenizer = load_tokenizer(models.tokenizer, template)
    rows, prepared = _pairs(request, models, tokenizer) if request.data else (None, None)
    if prepared is not None:
        check_token_ids(prepared.groups, models.policy)
        for line in (prepared.report.sentence(), *prepared.report.remarks()):
            log(f"data: {line}")
    prompts = _prompts(request, prepared, tokenizer)
    if request.out is not None and rank() == 0:
        make_writable_directory(request.out, "--out")
    report, lines = _about(request, models), []
    with joined_world(models.layout, request.config.train.seed):
        if rows is not None and prepared is not None:
            groups = prepared.groups
            measured = measure(models, groups)
            subsets = [rows.subsets[row] for row in groups.rows]
            report |= figures_of(request, models, measured, subsets) | {"rows": prepared.report.to_dict()}
            report["empty_subsets"] = sorted(set(rows.subsets) - set(subsets))
            lines = finite(lines_of(groups, subsets, measured, report["score"], request.config))
        if request.generation is not None:
            with activity(f"generating answers to {len(prompts):,} prompts"):
                report |= side_by_side(models, prompts, request.generation, tokenizer)
    report = finite(report)
    report["remarks"] = [*request.remarks, *remarks_of(report)]
    if rank() == 0:
        _write(request.out, report, lines)
    if request.harness is not None and rank() == 0:
        dtype = resolve_dtype(models.config.model.dtype)
        with exported(request.model, dtype, request.config.checkpoint.verify) as directory:
            seed = request.config.train.seed
            report["harness"] = run_harness(directory, models.tokenizer, request.harness, dtype, seed)
        _write(request.out, report, lines)  # again: what was computed before is not lost where a task fails
    return report


def _check(request: Request, models: Models) -> None:
    """What of the request cannot go together; the packages it needs."""
    check_score(request.score, models.has_reward_head, request.reference)
    if models.has_reward_head:
        for option, given in (("--generate", request.generation), ("--harness", request.harness)):
            if given is not None:
                raise UserError(f"{option}: {request.model} is a reward model, which writes nothing; leave {option} out")
    if request.generation is not None:
        request.generation.check()
        require_generator(request.generation)
        if request.generation.generator == "vllm" and world_size() > 1:
            raise UserError("--generator vllm takes all devices by itself; leave --nproc out")
        if isinstance(request.generation.prompts, int) and not request.data:
            raise UserError(f"--generate {request.generation.prompts} takes prompts of --data, and there is none; add it")
    if request.harness is not None:
        require_harness(request.harness)
        if request.harness.apply_chat_template and not getattr(load_tokenizer(models.tokenizer), "chat_template", None):
            raise UserError(
                f"--harness-chat: the tokenizer in {models.tokenizer} has no chat template; leave the option out"
            )
    if not request.data and request.generation is None and request.harness is None:
        raise UserError(
            "there is nothing to evaluate on: give pairs with --data FILE, or --generate FILE, or --harness TASKS"
        )


def _about(request: Request, models: Models) -> Report:
    options = request.config.objective
    return {
        "model": request.model,
        "reference": request.reference,
        "run": request.run,
        "data": [{"name": one.name, "path": str(one.value)} for one in request.data],
        "dtype": str(resolve_dtype(models.config.model.dtype)).removeprefix("torch."),
        "layout": str(models.layout),
        "beta": None if models.has_reward_head else options.beta,
    }


def _pairs(request: Request, models: Models, tokenizer: Any) -> tuple[LabelledRows, Prepared]:
    """The pairs, tokenised as for training, and the subset of every row."""
    options, column = request.config.data, request.subset_column
    rows = read_subsets(request.data, options.columns, column)
    as_messages = _conversations(request, rows, bool(getattr(tokenizer, "chat_template", None)))
    data = copy_config(request.config).data
    unread = [column or COLUMN, *(REWARD_BENCH_COLUMNS if any(map(reward_bench.is_known, rows.subsets)) else ())]
    data.columns, data.ignore_columns = {}, [*options.ignore_columns, *unread]
    sources = sources_of(request.data, options.columns, as_messages)
    prepared = prepare_groups(data, sources, models.tokenizer, held_out=True)
    if request.config.eval.pairs is not None:
        sets = [one.name for one in request.data]
        prepared = Prepared(first_of_each(prepared.groups, sets, request.config.eval.pairs), prepared.report)
    return rows, prepared


def _conversations(request: Request, rows: LabelledRows, has_template: bool) -> list[bool]:
    """Of every source, whether its prompts of text are messages."""
    if request.chat == "yes" and not has_template:
        raise UserError("--chat yes: the tokenizer has no chat template; set data.chat_template to a jinja file")
    is_wanted = request.chat == "yes" or (
        request.chat == "auto" and has_template and any(map(reward_bench.is_known, rows.subsets))
    )
    if is_wanted and any(rows.has_text_prompts) and request.chat == "auto":
        log("data: RewardBench's subsets: prompts are messages to the chat template, as there (--chat no: plain text)")
    return [is_wanted and is_text for is_text in rows.has_text_prompts]


def _prompts(request: Request, prepared: Prepared | None, tokenizer: Any) -> list[list[int]]:
    options = request.generation
    if options is None:
        return []
    if isinstance(options.prompts, str):
        return prompts_of_file(options.prompts, tokenizer, request.chat == "yes")
    assert prepared is not None
    return prompts_of_data(prepared.groups, options.prompts)


def _write(out: Path | None, report: Report, lines: list[Report]) -> None:
    if out is None:
        return
    texts = {"eval.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
    if lines:
        texts["pairs.jsonl"] = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    try:
        for name, text in texts.items():
            with replacing(out / name) as partial:
                partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
