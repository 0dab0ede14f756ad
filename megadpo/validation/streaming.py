"""What `data.streaming` cannot do, and what only it can read: refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.config.given import is_iterable_dataset
from megadpo.config.sources import eval_sets
from megadpo.errors import UserError
from megadpo.objectives.specs import measures_kl

if TYPE_CHECKING:
    from megadpo.config.schema import Config


def check_streaming(config: Config) -> None:
    """Refuse options that need to know all training rows, and datasets that can only be streamed where they are not.

    Raises:
        UserError: naming the option.
    """
    data, train = config.data, config.train
    _check_iterable_datasets(config)
    if not data.streaming:
        if data.streaming_buffer != type(data)().streaming_buffer:
            raise UserError("data.streaming_buffer has no effect without data.streaming; set that to true or remove it")
        return
    if not data.shuffle and data.streaming_buffer != type(data)().streaming_buffer:
        raise UserError("data.streaming_buffer has no effect with data.shuffle false, which keeps the order; remove it")
    if train.steps is None:
        asked = f"train.epochs is {train.epochs:g}, but " if train.epochs is not None else ""
        raise UserError(
            f"{asked}data.streaming is true, and how long a stream's epoch is is not known before its end; set train.steps"
            + (" in its place" if asked else "")
        )
    if data.step_tokens_multiple_of is not None:
        raise UserError(
            "data.step_tokens_multiple_of exchanges pairs between steps whose lengths are known, but data.streaming is "
            "true; remove one of them"
        )
    longest, capacity = data.max_length, train.tokens_per_micro_batch
    if measures_kl(config.objective.loss_types) and (longest is None or longest > capacity):
        raise UserError(
            f"data.max_length is {'null' if longest is None else longest}, but kto with data.streaming puts a prompt before "
            f"any row's answer, of lengths that are not known; set it to train.tokens_per_micro_batch ({capacity}) or less"
        )


def _check_iterable_datasets(config: Config) -> None:
    held_out = [one for value in eval_sets(config.data.eval).values() for one in _sources(value)]
    if any(map(is_iterable_dataset, held_out)):
        raise UserError(
            "data.eval is a datasets.IterableDataset, but held-out rows are scored whole each time; give a Dataset, such as "
            "Dataset.from_list(list(dataset.take(1000)))"
        )
    if not config.data.streaming and any(map(is_iterable_dataset, _sources(config.data.train))):
        raise UserError(
            "data.train is a datasets.IterableDataset, which is read as the run goes on; set data.streaming to true and "
            "train.steps to a number"
        )


def _sources(value: Any) -> list[Any]:
    """The objects that a value of `data.train` or `data.eval` names."""
    entries = value if isinstance(value, list) else [value]
    return [entry.get("path") if type(entry) is dict else entry for entry in entries]
