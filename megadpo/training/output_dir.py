"""The output directory of a run: whose it is, and where a run goes on."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megadpo.checkpoint.sharded import is_checkpoint
from megadpo.checkpoint.staging import clean_up, followed, remove
from megadpo.config import yaml_core
from megadpo.config.schema import Config
from megadpo.errors import UserError
from megadpo.files import make_writable_directory, replacing
from megadpo.secrets.redact import HIDDEN, redacted
from megadpo.training import run_lock
from megadpo.training.resume import came_of, newest_that_opens

IDENTITY: dict[str, tuple[str, ...]] = {
    "model": ("path", "dtype"),
    "adapter": (
        *("kind", "rank", "alpha", "dropout", "use_rslora", "use_dora", "target_modules", "layers_to_transform"),
        *("modules_to_save", "init", "path"),
    ),
    "reference": ("mode", "path", "adapter", "sync_every", "mixup_alpha", "router_replay"),
    "data": ("train", "shuffle", "max_length", "truncation", "chat_template", "columns", "step_tokens_multiple_of"),
    "objective": (),
    "train": (
        "pairs_per_step",
        "learning_rate",
        "min_learning_rate",
        *("learning_rates", "momentum", "decay_norms_and_biases", "neftune_alpha"),
        *("warmup_steps", "warmup_ratio"),
        *("schedule", "schedule_cycles", "schedule_power", "decay_ratio", "decay_shape"),
        "weight_decay",
        "betas",
        "eps",
        "clip_norm",
        *("router_aux_coef", "router_bias_update_rate"),
        "seed",
    ),
}
"""Options that make a run what it is (an empty tuple: the whole section). All others may change on resuming: how the
work is spread over processes does not change the numbers, when to evaluate or save is free, and a run may be made longer."""
INPUTS = {
    *(("model", "path"), ("reference", "path"), ("adapter", "path"), ("reference", "adapter")),
    *(("data", "train"), ("data", "chat_template")),
}
"""Those that only say where something is that a checkpoint has a digest of: with `checkpoint.changed_inputs: accept` they
may change, too."""


@contextlib.contextmanager
def owned_output_dir(directory: Path, is_owner: bool) -> Iterator[run_lock.Lock | None]:
    """Within, no other run uses `directory`. Rank 0 owns it for all.

    Raises:
        UserError: another run does, or it is no place for a run.
    """
    if not is_owner:
        yield None
        return
    _refuse_foreign(directory)
    with run_lock.owning(directory) as lock:
        yield lock


def claim_output_dir(directory: Path, config: Config) -> None:
    """Check that `directory` is free or belongs to this very run.

    Raises:
        UserError: it holds a different run, or the checkpoint asked for does not exist.
    """
    _refuse_foreign(directory)
    if (directory / "config.yaml").is_file():
        _refuse_other_run(directory / "config.yaml", config)
    _check_links(directory)
    chosen = config.checkpoint.resume
    if chosen in ("auto", "never") or is_checkpoint(chosen) or came_of(directory / "checkpoints", Path(chosen)):
        return
    other = newest_that_opens([directory.absolute() / "checkpoints", Path(chosen).absolute().parent])
    named = f"the newest one is {other}" if other else "give auto, never or a step directory"
    raise UserError(f"checkpoint.resume: {chosen} is not a checkpoint directory; {named}")


HALF_WRITTEN = re.compile(
    r"(config\.yaml|(trackers|run)\.json|report\.html|(metrics|spikes)(\.\d+)?\.jsonl)\.\d+\.tmp|\.?run\.lock.*"
)
"""Files that a process leaves where it is killed over them, and the lock."""


def _refuse_foreign(directory: Path) -> None:
    """Raises UserError where `directory` is a file, or holds something else than a run."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output_dir: {directory} is a file; choose a directory")
    if (directory / "config.yaml").is_file() or not directory.is_dir():
        return
    if any(not HALF_WRITTEN.fullmatch(path.name) for path in directory.iterdir()):
        raise UserError(f"output_dir: {directory} exists and is not a megadpo run; choose an empty or new directory")


def _check_links(directory: Path) -> None:
    """Refuses links in the place of what the run will write, where they lead to nothing or to what cannot be replaced."""
    for path in (directory / "hf", directory / "checkpoints"):
        if path.is_symlink() and not os.access(followed(path).parent, os.W_OK | os.X_OK):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, beside which nothing can be written; remove the link, or choose "
                "another output_dir"
            )


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what an earlier process of this run has left half written or half removed; the owner calls it.

    Returns:
        What was removed.
    """
    removed = clean_up(directory / "hf")
    names = {path.name[:13] for path in (directory / "checkpoints").glob("step_*")}
    for path in [directory / "checkpoints" / name for name in sorted(names) if name[5:].isdecimal()]:
        removed += clean_up(path)
        if path.is_dir() and not is_checkpoint(path):  # of versions that removed files before the name
            remove(path)
            removed.append(path)
    for path in directory.iterdir():
        if path.suffix == ".tmp" and HALF_WRITTEN.fullmatch(path.name):
            path.unlink()
            removed.append(path)
    return removed


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
    ours, defaults = yaml.safe_load(yaml_core.dump(config.resolved().to_dict())), Config().to_dict()
    for section, names in IDENTITY.items():
        for name in names or ours[section]:
            before, is_input = _value(earlier, section, name, defaults[section][name]), (section, name) in INPUTS
            if _is_same(before, ours[section][name]) or (is_input and config.checkpoint.changed_inputs == "accept"):
                continue
            was, now = redacted(before), redacted(ours[section][name])
            hint = "; or, where it may be another, set checkpoint.changed_inputs to accept" if is_input else ""
            raise UserError(
                f"output_dir: {written.parent} holds a different run ({section}.{name} was {was!r}, now {now!r}); "
                f"choose another directory or remove this one{hint}"
            )


def _is_same(written: Any, ours: Any) -> bool:
    """Whether an option is what an earlier process of the run has written, by whatever version and in whatever environment:
    for what is hidden there, or would be today, anything may stand."""
    return bool(written == ours) or _fits(redacted(written), ours)


def _fits(written: Any, ours: Any) -> bool:
    if isinstance(written, str) and isinstance(ours, str) and HIDDEN in written:
        return re.fullmatch(".*".join(map(re.escape, written.split(HIDDEN))), ours, re.DOTALL) is not None
    if isinstance(written, dict) and isinstance(ours, dict):
        return written.keys() == ours.keys() and all(_fits(item, ours[key]) for key, item in written.items())
    if isinstance(written, list) and isinstance(ours, list):
        return len(written) == len(ours) and all(map(_fits, written, ours))
    return bool(written == ours)


def _value(config: Any, section: str, name: str, default: Any) -> Any:
    """An option of a written configuration, which may be of a version that did not have it."""
    try:
        return config[section][name] if name in config.get(section, {}) else default
    except (AttributeError, TypeError):
        return None
