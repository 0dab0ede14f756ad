"""Options of a reference that moves towards the policy."""

from __future__ import annotations

from megadpo.config.schema import Config
from megadpo.errors import UserError


def check_moving_reference(config: Config) -> None:
    """Refuse options of `reference` that contradict each other.

    Raises:
        UserError: naming the option.
    """
    reference = config.reference
    if not 0 < reference.mixup_alpha <= 1:
        raise UserError(f"reference.mixup_alpha must be in (0, 1], got {reference.mixup_alpha!r}")
    if reference.sync_every is None and reference.mixup_alpha != type(reference)().mixup_alpha:
        raise UserError("reference.mixup_alpha has no effect without reference.sync_every; set that too or remove it")
    if reference.sync_every is not None and reference.mode == "none":
        raise UserError(
            "reference.sync_every moves a resident reference, but reference.mode is none; "
            "set it to resident or remove sync_every"
        )
