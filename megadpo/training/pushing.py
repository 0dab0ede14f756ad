"""What was trained goes to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path

from megadpo.checkpoint.peft_settings import CONFIG_NAME
from megadpo.console.heartbeat import write_line
from megadpo.errors import UserError
from megadpo.parallel.world import rank
from megadpo.platform.hub import id_of_snapshot, push
from megadpo.training.model_card import base_name
from megadpo.training.setup import RunSetup


def pushed(setup: RunSetup, directory: Path) -> str | None:
    """Push what was exported, where that is asked for, on rank 0: its address; None where nothing was pushed.

    A failure is told and ends nothing: the files are here.
    """
    hub = setup.config.hub
    if hub.push is None or rank() != 0:
        return None
    try:
        message = f"Trained with megadpo ({setup.output_dir.absolute().name})"
        address = push(directory, hub.push, hub.private, hub.revision, message, _for_others(setup, directory))
    except UserError as error:
        write_line(
            f"warning: {error}; it is complete here: the same command pushes again, or `hf upload {hub.push} {directory}`"
        )
        return None
    write_line(f"pushed to {address}{f', branch {hub.revision}' if hub.revision else ''}")
    return address


def _for_others(setup: RunSetup, directory: Path) -> dict[str, bytes]:
    """An adapter's settings with its base as others know it, in place of a directory of this machine."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return {}
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path") or ""
    settings["base_model_name_or_path"] = base_name(setup)
    settings["revision"] = Path(base).name if id_of_snapshot(base) else settings.get("revision")
    return {CONFIG_NAME: (json.dumps(settings, indent=2) + "\n").encode()}
