"""megadpo: preference training of large language models with Megatron-core, from one CPU to many GPUs.

    import megadpo
    result = megadpo.train({"model": {"path": "my-model"}, "data": {"train": "pairs.jsonl"}, "output_dir": "run"})

Importing this package imports neither torch nor transformers and changes nothing in them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.secrets.redact import redact_exception
from megadpo.validation.load import load_config

if TYPE_CHECKING:
    from megadpo.training.run import Callbacks, Result

__version__ = "0.1.0"
__all__ = ["Callbacks", "Config", "Result", "UserError", "__version__", "load_config", "train"]


def train(
    config: Config | Mapping[str, Any] | str | Path,
    callbacks: Callbacks | None = None,
    overrides: Sequence[str] = (),
    *,
    objective: Callable[[Any, Any], Any] | None = None,
    train: Any = None,
    eval: Any = None,
) -> Result:
    """Trains as ``megadpo train`` does, in this process alone or as one rank of torchrun's.

    Args:
        config: a Config, a nested dict or the path of a YAML file; `data.train` and `data.eval` may be rows, too.
        callbacks: functions called on rank 0: before the first step, after steps, evaluations and saves, and for metrics of
            one's own. Of those after steps and evaluations one that returns False ends the run.
        overrides: ``key.sub=value`` texts applied on top.
        objective: the function of `objective.loss_type: custom`, as `objective.module` names one: given `Pairs` and
            `Normalisers`, it gives one loss a pair.
        train: in place of `data.train`: rows as a list of dicts, a pandas.DataFrame, or a Dataset, DatasetDict (its train
            split) or IterableDataset (with `data.streaming`) of `datasets`; or a path. The same on every rank.
        eval: in place of `data.eval`, of the same kinds (of a DatasetDict with a train split its validation or test split),
            or several sets by name: a dict of these, or a DatasetDict without a train split.

    Returns:
        The last metrics, the path of the exported Hugging Face directory, and with `eval.best_metric` whose it is.

    Raises:
        UserError: anything in the configuration, the model or the data that the caller can put right.
        SystemExit: the run was sent SIGTERM, SIGUSR1 or SIGINT, or its deadline is near: its state is saved. The status is
            75, of SIGINT 130. A second SIGINT, and one before the first step, raise KeyboardInterrupt.
    """
    from megadpo.objectives.custom import words_of
    from megadpo.training.trainer import run_training

    if objective is not None and not callable(objective):
        raise UserError(f"objective is a {type(objective).__name__}, not a function of pairs and normalisers")
    given = {name: value for name, value in (("train", train), ("eval", eval)) if value is not None}
    loaded = load_config(config, overrides, given, None if objective is None else words_of(objective))
    loaded.require_for_training()
    try:
        return run_training(loaded, callbacks, objective)
    except Exception as error:
        redact_exception(error)  # a traceback shows it
        raise


def __getattr__(name: str) -> Any:
    """`megadpo.Callbacks` and `megadpo.Result`, which need torch, when they are asked for."""
    if name in ("Callbacks", "Result"):
        return getattr(importlib.import_module("megadpo.training.run"), name)
    raise AttributeError(f"module 'megadpo' has no attribute {name!r}")
