"""The output directory of a run: whose it is, and where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megadpo.checkpoint.sharded import is_checkpoint
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.files import make_writable_directory, replacing
from megadpo.training.resume import came_of, newest_that_opens

IDENTITY: dict[str, tuple[str, ...]] = {
    "model": ("path", "dtype"),
    "reference": ("mode", "path", "sync_every", "mixup_alpha"),
    "data": ("train", "shuffle", "max_length", "truncation", "chat_template", "columns", "step_tokens_multiple_of"),
    "objective": (),
    "train": (
        "pairs_per_step",
        "learning_rate",
        "min_learning_rate",
        "warmup_steps",
        "schedule",
        "weight_decay",
        "betas",
        "eps",
        "clip_norm",
        "seed",
    ),
}
"""Options that make a run what it is (an empty tuple: the whole section). All others may change on resuming: how the
work is spread over processes does not change the numbers, when to evaluate or save is free, and a run may be made longer."""


def claim_output_dir(directory: Path, config: Config) -> None:
    """Check that `directory` is free or belongs to this very run.

    Raises:
        UserError: it holds a different run, or the checkpoint asked for does not exist.
    """
    written = directory / "config.yaml"
    if written.is_file():
        _refuse_other_run(written, config)
    elif directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"output_dir: {directory} exists and is not a megadpo run; choose an empty or new directory")
    elif directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {directory} is a file; choose a directory")
    chosen = config.checkpoint.resume
    if chosen in ("auto", "never") or is_checkpoint(chosen) or came_of(directory / "checkpoints", Path(chosen)):
        return
    other = newest_that_opens([directory.absolute() / "checkpoints", Path(chosen).absolute().parent])
    named = f"the newest one is {other}" if other else "give auto, never or a step directory"
    raise UserError(f"checkpoint.resume: {chosen} is not a checkpoint directory; {named}")


def make_output_dir(directory: Path) -> None:
    """Make the directory, once everything else about the run is known to be right.

    Raises:
        UserError: it cannot be made or written.
    """
    make_writable_directory(directory, "output_dir")


def write_config(directory: Path, config: Config) -> None:
    """Write the resolved configuration as `config.yaml`, whole or not at all."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "config.yaml") as partial:
            partial.write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir: {directory} cannot be written: {error.strerror}") from error


def _refuse_other_run(written: Path, config: Config) -> None:
    try:
        earlier = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"output_dir: {written} cannot be read ({error}); choose another directory") from error
    ours = yaml.safe_load(config.to_yaml())
    for section, names in IDENTITY.items():
        for name in names or ours[section]:
            before = _value(earlier, section, name)
            if before != ours[section][name]:
                raise UserError(
                    f"output_dir: {written.parent} holds a different run ({section}.{name} was {before!r}, now "
                    f"{ours[section][name]!r}); choose another directory or remove this one"
                )


def _value(config: Any, section: str, name: str) -> Any:
    try:
        return config[section][name]
    except (KeyError, TypeError):
        return None
