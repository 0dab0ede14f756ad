"""Tasks of lm-evaluation-harness (EleutherAI) on the model as it was exported, by its Python interface."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megadpo.errors import UserError, reason
from megadpo.evaluation.request import Harness
from megadpo.platform.device import compute_device

OF_THE_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_harness(options: Harness) -> None:
    """Raises UserError where lm-evaluation-harness is not installed, or there is no directory of tasks."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness: lm-evaluation-harness is not installed here; pip install megadpo[harness]")
    if not options.tasks:
        raise UserError("--harness names no task; for example --harness arc_easy,hellaswag")
    if options.task_dir is not None and not Path(options.task_dir).is_dir():
        raise UserError(f"--harness-tasks: {options.task_dir} is no directory; give one with the YAML files of tasks")


def run_harness(directory: str, tokenizer: str, options: Harness, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """The figures of every task: name -> metric ("acc,none", "acc_stderr,none", …) -> number, or None of one that is not
    finite; in this process alone.

    Args:
        directory: a Hugging Face model directory.
        tokenizer: the directory of its tokenizer.

    Raises:
        UserError: no such task, or the harness cannot do one.
    """
    require_harness(options)
    with _alone():
        from lm_eval import simple_evaluate

        manager = _task_manager(options)
        try:
            results = simple_evaluate(
                model="hf",
                model_args={
                    "pretrained": directory,
                    "tokenizer": tokenizer,
                    "dtype": str(dtype).removeprefix("torch."),
                    "trust_remote_code": False,
                },
                tasks=list(options.tasks),
                task_manager=manager,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                batch_size=1,
                device=str(compute_device()),
                log_samples=False,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except UserError:
            raise
        except Exception as error:  # tasks load data, download, run code of their own
            raise UserError(f"--harness {','.join(options.tasks)}: lm-evaluation-harness fails: {reason(error)}") from error
    assert results is not None
    return {name: _numbers(figures) for name, figures in results["results"].items()}


def _task_manager(options: Harness) -> Any:
    """Of the user's own tasks alone where they are all that is asked for: the others take seconds to be looked through."""
    from lm_eval.tasks import TaskManager

    for include_defaults in [False, True] if options.task_dir is not None else [True]:
        manager = TaskManager(include_path=options.task_dir, include_defaults=include_defaults)
        unknown = [task for task in options.tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise UserError(
        f"--harness: lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` lists those that it has, "
        "--harness-tasks DIR adds your own"
    )


def _numbers(figures: dict[str, Any]) -> dict[str, float | None]:
    """Those figures that are numbers; of one that is infinite (the perplexity of what cannot be) or none at all, None."""
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextmanager
def _alone() -> Iterator[None]:
    """Within, the environment says nothing of other processes: the harness would wait for them."""
    before = {name: os.environ.pop(name) for name in OF_THE_WORLD if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
