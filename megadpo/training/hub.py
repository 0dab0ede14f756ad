"""What a run takes from the Hugging Face Hub, and whether it may give to it."""

from __future__ import annotations

from megadpo.config.schema import Config, copy_config
from megadpo.console.heartbeat import write_line
from megadpo.errors import UserError
from megadpo.parallel.world import rank
from megadpo.platform.hub import check_push, fetched, means_hub

FETCHED = (("model", "path"), ("reference", "path"), ("adapter", "path"), ("reference", "adapter"))
"""Options that may name a model or an adapter on the Hub."""


def with_fetched(config: Config) -> Config:
    """A copy in which every model of the Hub is the directory that it was fetched to.

    Raises:
        UserError: one cannot be had, or `model.revision` names a version of a directory.
    """
    if config.model.revision is not None and not means_hub(config.model.path):
        raise UserError(
            f"model.revision {config.model.revision} is of a model on the Hub, and model.path {config.model.path} is none; "
            "remove model.revision"
        )
    config = copy_config(config)
    whole = config.model.path
    for section, name in FETCHED:
        options = getattr(config, section)
        path = getattr(options, name)
        if path:
            revision = config.model.revision if path == whole else None
            setattr(options, name, fetched(path, f"{section}.{name}", revision))
    config.model.revision = None  # the directory is of that version
    return config


def require_hub(config: Config) -> None:
    """Before a run that is to be pushed: that it can be, now. On rank 0.

    Raises:
        UserError: it cannot.
    """
    if config.hub.push is not None and rank() == 0:
        write_line(f"the model will be pushed to {config.hub.push}, by {check_push(config.hub.push, config.hub.private)}")
