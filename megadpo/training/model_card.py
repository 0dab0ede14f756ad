"""The model card, `hf/README.md`: what was trained, on what, how, how it went, by what, and how to load it.

It is made to be published: no secrets, and of paths of this machine only the names.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from megadpo.config import yaml_core
from megadpo.config.schema import Config
from megadpo.config.sources import eval_label, eval_sets, parse_sources
from megadpo.errors import reason
from megadpo.model.families import parameter_shapes
from megadpo.parallel.world import world_size
from megadpo.platform.hub import id_of_snapshot, is_id
from megadpo.secrets.redact import redact, redacted
from megadpo.training.console import log
from megadpo.training.run_record import installed_versions
from megadpo.training.setup import RunSetup
from megadpo.training.summary import how_to_load

NAME = "README.md"
SHOWN = re.compile(r"loss|rewards/(accuracies|margins|chosen|rejected)|logps/(chosen|rejected)|kl|num_tokens|epoch|eval_.+")
"""Metrics that say what a model is; those of time and memory say what a machine is."""
_LICENCE = ("license", "license_name", "license_link")


def with_card(setup: RunSetup, metrics: Mapping[str, float], exported: str = "") -> RunSetup:
    """The set-up with a card among what is exported beside the weights, where `logging.model_card` asks for one.

    Args:
        metrics: of the model that is exported, and its step.
        exported: whose the model is, where it is not that of the planned last step: a sentence.
    """
    if not setup.config.logging.model_card:
        return setup
    try:
        card = model_card(setup, metrics, exported).encode()
    except Exception as error:  # a card that cannot be made takes nothing away from what was trained
        log(f"warning: no model card: {reason(error)}")
        return setup
    companions = setup.companions
    return replace(setup, companions=replace(companions, files={**companions.files, NAME: card}))


def model_card(setup: RunSetup, metrics: Mapping[str, float], exported: str = "") -> str:
    """The card as Markdown with its front matter."""
    name = setup.config.logging.run_name or setup.output_dir.absolute().name
    base = base_name(setup)
    trained = "An adapter" if setup.adapter is not None and not setup.config.adapter.merge else "A model"
    losses = ", ".join(setup.config.objective.loss_types)
    sections = [
        f"# {name}",
        f"{trained} trained from `{base}` with the objective `{losses}` by megadpo.",
        "## How to load it\n\n```python\n" + _loading(setup) + "\n```",
        "## Data\n\n" + _table(("", "sources", "rows used"), list(_data(setup))),
        "## Objective\n\n" + _table(("option", "value"), list(_objective(setup.config))),
        "## Training\n\n" + _table(("", ""), list(_training(setup, int(metrics.get("step", setup.num_steps))))),
        "## Results\n\n"
        + (f"{exported}\n\n" if exported else "")
        + _table(("metric", "at the end"), list(_results(metrics))),
        "## Versions\n\n" + _table(("", ""), list(_versions())),
        f"## Command\n\n```bash\n{command_line(sys.argv)}\n```",
        "## Configuration\n\n```yaml\n" + _configuration(setup.config) + "```",
    ]
    return redact(f"---\n{_front_matter(setup, base)}---\n\n" + "\n\n".join(sections) + "\n")


def base_name(setup: RunSetup) -> str:
    """The base as others know it: its id on the Hub, else the last part of its directory."""
    path = setup.policy.path
    written = getattr(setup.policy.config, "_name_or_path", "")
    known = id_of_snapshot(path) or (written if is_id(str(written)) and not os.path.lexists(written) else None)
    return known or public_path(path)


def _front_matter(setup: RunSetup, base: str) -> str:
    is_adapter = setup.adapter is not None and not setup.config.adapter.merge
    tags = ["megadpo", *(["lora"] if setup.adapter is not None else []), *setup.config.objective.loss_types]
    found: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if setup.objective.has_reward_head else "text-generation",
        **({} if base_is_local(setup) else {"base_model": base}),
        "tags": [*dict.fromkeys([*tags, "preference-training"])],
    }
    if datasets := [name for name in dict.fromkeys(_source_names(setup.config.data.train)) if is_id(name)]:
        found["datasets"] = datasets
    return yaml.safe_dump(found | licence_of(setup.policy.huggingface), sort_keys=False, allow_unicode=True)


def licence_of(directory: Path) -> dict[str, str]:
    """What the card of the base says of its licence; nothing where it has no card or says nothing."""
    try:
        text = (directory / NAME).read_text(encoding="utf-8")
        matter = re.match(r"---\r?\n(.*?)\r?\n---\s", text, re.DOTALL)
        found = yaml.safe_load(matter[1]) if matter else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in _LICENCE if isinstance(found, dict) and isinstance(found.get(key), str)}


def _loading(setup: RunSetup) -> str:
    auto = how_to_load(setup, "PATH")
    library, call = auto.split(".", 1)
    path = setup.config.hub.push or f"{setup.output_dir.absolute().name}/hf"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{path}")'
    model = f"model = {call.replace('PATH', path)}"
    name = call.partition(".")[0]
    if library == "transformers":
        return f"from transformers import {name}, AutoTokenizer\n\n{model}\n{tokenizer}"
    base = "  # its base is where adapter_config.json says" if base_is_local(setup) else ""
    return f"from peft import {name}\nfrom transformers import AutoTokenizer\n\n{model}{base}\n{tokenizer}"


def base_is_local(setup: RunSetup) -> bool:
    """Whether the base is known by a directory of this machine only."""
    return not is_id(base_name(setup))


def _data(setup: RunSetup) -> Iterator[tuple[str, str, str]]:
    sides = [("training", setup.config.data.train, setup.train, "train")]
    for name, sources in eval_sets(setup.config.data.eval).items():
        sides.append((f"held out, {name}" if name else "held out", sources, setup.eval[name], eval_label(name)))
    for words, sources, packing, which in sides:
        report = setup.reports[which]
        num_used = report.num_kept if which == "train" and setup.stream else len(packing.groups)
        used = f"{num_used:,} of {report.num_rows:,} {report.noun}s"
        yield words, ", ".join(f"`{source}`" for source in _source_names(sources)), used


def _source_names(sources: Any) -> list[str]:
    return [public_path(source.name) for source in parse_sources(sources)]


def _objective(config: Config) -> Iterator[tuple[str, str]]:
    """The losses, beta, and every option that was set."""
    options, defaults = config.objective, type(config.objective)()
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ("loss_type", "beta") or value != getattr(defaults, field.name):
            yield f"`{field.name}`", f"`{public_path(value) if field.name == 'module' else value}`"
    yield "reference", _reference(config)


def _reference(config: Config) -> str:
    reference = config.reference
    if reference.mode == "none":
        return "none"
    if reference.adapter:
        return f"`{public_path(reference.adapter)}`"
    return "the base" if reference.path in (None, config.model.path) else f"`{public_path(reference.path)}`"


def _training(setup: RunSetup, num_steps: int) -> Iterator[tuple[str, str]]:
    config, train = setup.config, setup.config.train
    shapes = parameter_shapes(setup.policy.shape)
    whole, trained = (sum(map(math.prod, sizes.values())) for sizes in (shapes, setup.trained_shapes))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    yield "parameters", f"{whole:,}" if trained == whole else f"{trained:,} trained beside {whole:,}"
    if setup.adapter is not None:
        spec = setup.adapter.spec
        yield "adapter", f"LoRA, rank {spec.rank}, alpha {spec.alpha:g}"
    if config.model.quantization != "none":
        yield "frozen weights", config.model.quantization
    yield "steps", f"{num_steps:,} of {train.pairs_per_step:,} {setup.reports['train'].noun}s"
    yield (
        "learning rate",
        f"{train.learning_rate:g}, {train.schedule}, {train.num_warmup_steps(setup.num_steps):,} steps of warm-up",
    )
    yield "longest sequence", "no limit" if config.data.max_length is None else f"{config.data.max_length:,} tokens"
    yield "arithmetic", str(setup.dtype).removeprefix("torch.")
    yield "layout", f"{setup.layout}, {world_size()} x {device}, engine {config.parallel.engine}"


def _results(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    for name, value in metrics.items():
        if SHOWN.fullmatch(name) and not name.endswith("_seconds"):
            yield f"`{name}`", f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _versions() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    yield from installed_versions().items()


def command_line(argv: Sequence[str]) -> str:
    """The command that started this process, without paths of this machine; of a program that imports megadpo, its name."""
    program = PurePath(argv[0]) if argv else PurePath("")
    if program.name != "megadpo" and program.parts[-2:] != ("megadpo", "__main__.py"):
        return f"# megadpo.train(…) in {program.name or 'Python'}"
    more = f" --nproc {world_size()}" if world_size() > 1 and "--nproc" not in argv else ""
    return redact(" ".join(["megadpo", *(_public_argument(one) for one in argv[1:])])) + more


def _public_argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    shown = public_text(value if equals else name)
    shown = f"{name}={shown}" if equals else shown
    return f"'{shown}'" if re.search(r"[\s\[\]{}*?;&|<>$()]", shown) else shown


def public_path(path: Any) -> str:
    """A path without where it lies on this machine: its last part, a Hub id as it is."""
    text = str(path)
    known = id_of_snapshot(text)
    if known is not None or (is_id(text) and not os.path.lexists(text)):
        return known or text
    return PurePath(text).name or text


def public_text(text: str) -> str:
    """A text in which of every path only the last part stands; ids of the Hub and addresses stay."""
    if "/" in text and "://" not in text and not re.search(r"[\s<>\[\]{},;'\"]", text):
        return public_path(text)
    if text.startswith(("[", "{")) and "<" not in text:  # a list of sources on the command line
        return re.sub(r"[^\s\[\]{},;'\"]+/[^\s\[\]{},;'\"]*", lambda found: public_text(found[0]), text)
    if text.startswith(("/", "~")):
        return public_path(text) if not re.search(r"[\[\]{},'\"]", text) else _without_directories(text)
    return _without_directories(text)


def _without_directories(text: str) -> str:
    home = str(Path.home())
    text = text.replace(home, "~") if len(home) > 1 else text
    return re.sub(r"(?<![\w.:/<-])~?/(?:[^\s/'\",;=\[\]{}()]+/)*([^\s/'\",;=\[\]{}()]+)/?", r"\1", text)


def _configuration(config: Config) -> str:
    """What was asked for besides the defaults, as YAML."""
    plain, defaults = redacted(config.to_dict()), Config().to_dict()
    shown: dict[str, Any] = {}
    for section, values in plain.items():
        if not isinstance(values, dict):
            continue
        changed = {name: _public(value) for name, value in values.items() if value != defaults[section][name]}
        if changed:
            shown[section] = changed
    return yaml_core.dump(shown, sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, str):
        known = id_of_snapshot(value)
        return known if known is not None else public_text(value)
    return value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
