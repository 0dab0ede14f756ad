"""What is refused of the options of `hub`, whatever the machine: names that the Hub would not take."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.platform.hub import is_id

if TYPE_CHECKING:
    from megadpo.config.schema import Config

BRANCH = re.compile(r"(?![./-])[\w./-]{1,200}(?<![./])")


def check_hub_options(config: Config) -> None:
    """Raises UserError for the first option that cannot be honoured."""
    hub = config.hub
    if hub.push is not None and not is_id(hub.push):
        raise UserError(f"hub.push: {hub.push!r} is no repository's name; give OWNER/NAME, of letters, digits and . _ -")
    if hub.push is None:
        for name in ("private", "revision"):
            if getattr(hub, name) != getattr(type(hub)(), name):
                raise UserError(f"hub.{name} has no effect without hub.push; set that to OWNER/NAME, or remove it")
    for setting, branch in (("hub.revision", hub.revision), ("model.revision", config.model.revision)):
        if branch is not None and (not BRANCH.fullmatch(branch) or ".." in branch or "//" in branch):
            raise UserError(f"{setting}: {branch!r} is no name of a branch, as main or my-branch; give one")
