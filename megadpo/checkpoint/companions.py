"""What goes with the weights into checkpoints and exports: tokenizer, templates, generation config, licence; no code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.checkpoint.fp8 import without_quantization
from megadpo.checkpoint.hf import hf_directory, read_json
from megadpo.checkpoint.integrity import FileRecord, record_of
from megadpo.checkpoint.passthrough import Passthrough
from megadpo.checkpoint.staging import writing
from megadpo.errors import UserError

PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that make a model directory usable besides weights and config.json."""
_DATA = re.compile(r"|\.(json|model|txt|jinja|jinja2|tiktoken|md|rst|pdf|vocab|spm|bpe|v\d+)")
"""Suffixes of those that are data: no Python, no pickles, no libraries."""
TEMPLATE = "chat_template.jinja"


def companion_files(directory: Path) -> dict[str, bytes]:
    """The companions of a model directory: relative path -> content.

    JSON that names code of the model's own (`auto_map`) comes without that: the code is not exported, and nothing should
    fetch it.

    Raises:
        UserError: a file cannot be read, or is a link out of the directory (the blobs of a Hugging Face cache are inside).
    """
    files = {}
    for path in _companions(directory):
        _check_link(path, directory)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        settings = _object(content) if path.suffix == ".json" else {}
        if "auto_map" in settings:
            content = _json({key: value for key, value in settings.items() if key != "auto_map"})
        files[path.relative_to(directory).as_posix()] = content
    return files


def _companions(directory: Path) -> Iterator[Path]:
    for pattern in PATTERNS:
        for path in sorted(directory.glob(pattern)):
            if (path.is_file() or path.is_symlink()) and not path.is_dir() and _DATA.fullmatch(path.suffix.lower()):
                yield path


def _check_link(path: Path, directory: Path) -> None:
    root, real = directory.resolve(), path.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in inside):
        raise UserError(
            f"{path} is a link to {real}, outside of the model directory, and would be exported with it; put a copy of the "
            "file in place of the link, or remove it"
        )


def with_template(files: Mapping[str, bytes], template: str | None) -> dict[str, bytes]:
    """The companions with the chat template that a run was trained with, wherever a loader looks for one.

    Args:
        template: of `data.chat_template`; None: the tokenizer's own, so nothing changes.
    """
    changed = dict(files)
    if template is None:
        return changed
    changed[TEMPLATE] = template.encode()
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        settings = _object(changed.get(name, b""))
        if "chat_template" not in settings:
            continue
        named = settings["chat_template"]
        if isinstance(named, list):  # of {"name", "template"}: the others stay, as additional_chat_templates/ does
            others = [item for item in named if isinstance(item, dict) and item.get("name") != "default"]
            settings["chat_template"] = [{"name": "default", "template": template}, *others]
        else:
            settings["chat_template"] = template
        changed[name] = _json(settings)
    return changed


_OF_TOKENIZER = re.compile(
    r"(tokenizer|vocab|chat_template|additional_chat_templates/).*|.*\.(model|tiktoken)|merges\.txt|tekken\.json|"
    r"(special_tokens_map|added_tokens)\.json"
)


def with_tokenizer(files: Mapping[str, bytes], trained: Mapping[str, bytes]) -> dict[str, bytes]:
    """The companions of a model with tokenizer and templates of what was trained on it, as an adapter's directory has them.

    Args:
        trained: companions of the latter; without a tokenizer nothing changes. Else no file of the model's own tokenizer
            stays, which might say something else.
    """
    if "tokenizer_config.json" not in trained:
        return dict(files)
    own = {name: content for name, content in files.items() if not _OF_TOKENIZER.fullmatch(name)}
    return own | {name: content for name, content in trained.items() if _OF_TOKENIZER.fullmatch(name)}


@dataclass(frozen=True)
class Companions:
    """What stands beside the weights of a model directory, kept in memory: a run that saves and exports needs the
    directory that it began with no more.

    Attributes:
        settings: its config.json.
        files: relative path -> content, as `companion_files` gives them.
        passthrough: tensors that are no part of what is trained; None: it has none.
    """

    settings: dict[str, Any]
    files: dict[str, bytes]
    passthrough: Passthrough | None = None


def companions_of(hf_source: str | Path | Companions, chat_template: str | None = None) -> Companions:
    """Those of a Hugging Face directory or of one of our checkpoints.

    Args:
        chat_template: as in `with_template`, where `hf_source` is a directory.

    Raises:
        UserError: as `companion_files`, or there is no config.json.
    """
    if isinstance(hf_source, Companions):
        return hf_source
    source = hf_directory(hf_source)
    settings = without_quantization(read_json(source / "config.json"))
    settings.pop("auto_map", None)
    return Companions(settings, with_template(companion_files(source), chat_template))


def write_companions(companions: Companions, directory: Path) -> dict[str, FileRecord]:
    """Write the files below a directory; the record of each.

    Raises:
        UserError: the disk is full or refuses.
    """
    for name, content in companions.files.items():
        to = directory / name
        with writing(to):
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(content)
    return {name: record_of(content) for name, content in companions.files.items()}


def _object(content: bytes) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one where it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(settings: dict[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
