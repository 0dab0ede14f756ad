"""What an adapter_config.json says, and which adapters there are by it and by the names of the tensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.errors import UserError
from megadpo.model.adapters.spec import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    KINDS,
    AdapterSpec,
    adaptable_modules,
    matching,
    whole_modules,
)
from megadpo.model.shape import ModelShape

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"),
        *("init_lora_weights", "base_model_name_or_path"),
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "task_type",
            "auto_mapping",
            "peft_version",
            "revision",
            "inference_mode",
            "runtime_config",
            "ensure_weight_tying",
        ),
        # How an adapter began, which its tensors do not depend on any more.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        *("megatron_config", "megatron_core"),
    }
)
"""Fields that may have any value: what the adapter computes does not depend on them."""

MOST_REPEATS = 4
"""Of `.*` and the like in an expression of a foreign adapter: with more, or one within the other, matching a name could take
for ever."""

_LEFT_BASE_ALONE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` for which the base's weights are those of its files."""


@dataclass(frozen=True)
class PeftSettings:
    """The fields of an adapter_config.json, each of its type or refused."""

    values: dict[str, Any]
    file: Path

    def check(self) -> None:
        """Raises UserError for what would change what the adapter computes and is not built here."""
        values = self.values
        if values.get("peft_type") != "LORA":
            raise UserError(f"{self.file}: peft_type is {values.get('peft_type')!r}; only LORA adapters are supported")
        if values.get("bias", "none") != "none":
            raise UserError(f"{self.file}: bias is {values['bias']!r}; adapters with trained biases are not supported")
        how = values.get("init_lora_weights", True)
        if how not in _LEFT_BASE_ALONE:
            raise UserError(
                f"{self.file}: init_lora_weights is {how!r}, which changes the base's weights, so that the adapter does not "
                "fit those of its files; save it with path_initial_model_for_weight_conversion in PEFT, which turns it into "
                "a plain one"
            )
        for name, value in values.items():
            if value and name not in _READ and name not in _WITHOUT_EFFECT:
                raise UserError(
                    f"{self.file}: {name} is {json.dumps(value)[:60]}, which is not supported; only plain LoRA is"
                )

    def count(self, name: str, default: int) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.file}: {name} is {value!r}; it must be a whole number of 1 or more")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{self.file}: {name} is {value!r}; it must be a number")
        return float(value)

    def truth(self, name: str) -> bool:
        value = self.values.get(name) or False
        if type(value) is not bool:
            raise UserError(f"{self.file}: {name} is {value!r}; it must be true or false")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise UserError(f"{self.file}: {name} is {value!r}; it must be a list of names")
        return value

    def check_time(self, name: str, expression: str) -> None:
        """Raises UserError for an expression whose time on a name of a module has no bound worth the name."""
        plain = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", expression))
        if len(re.findall(r"[*+{]", plain)) > MOST_REPEATS or re.search(r"\)[*+{]", plain):
            raise UserError(
                f"{self.file}: {name} has the expression {expression[:60]!r}, which could take too long to match; write the "
                "modules' names in its place"
            )

    def targets(self) -> str | list[str]:
        value = self.values.get("target_modules")
        if isinstance(value, str):
            self.check_time("target_modules", value)
            return value
        return self.texts("target_modules")

    def layers(self) -> list[int] | None:
        value = self.values.get("layers_to_transform")
        value = [value] if type(value) is int else value or None
        if value is not None and not (isinstance(value, list) and all(type(each) is int for each in value)):
            raise UserError(f"{self.file}: layers_to_transform is {value!r}; it must be a list of layers' numbers")
        return value

    def pattern(self, name: str, *, is_whole: bool = False) -> dict[str, int | float]:
        value, kinds = self.values.get(name) or {}, (int,) if is_whole else (int, float)
        if not isinstance(value, dict) or not all(type(each) in kinds and each > 0 for each in value.values()):
            raise UserError(f"{self.file}: {name} is {value!r}; it must be names with {'whole ' * is_whole}numbers above 0")
        for key in value:
            try:
                re.compile(f"({key})$")
            except re.error as error:
                raise UserError(f"{self.file}: {name} has {key!r}, which is no regular expression ({error})") from error
            self.check_time(name, key)
        return value


def spec_of(settings: PeftSettings, names: Iterable[str], shape: ModelShape, dropout: float | None) -> AdapterSpec:
    """What the tensors' names say that there is, held to what the settings say."""
    file = settings.file
    linear, whole = adaptable_modules(shape), whole_modules(shape)
    found, saved = set(), set()
    for name in names:
        for ending in KINDS:
            if name.endswith(f".{ending}"):
                found.add(name.removesuffix(f".{ending}"))
                break
        else:
            saved.add(name.removesuffix(".weight"))
    unknown = sorted(found - set(linear))
    if unknown:
        raise UserError(
            f"{file.parent}: it has an adapter of {unknown[0]}, which is no module of the model that can have one; it "
            "belongs to another model"
        )
    unknown = sorted(saved - set(whole))
    if unknown:
        raise UserError(
            f"{file.parent}: it has the tensor {unknown[0]}, which is neither LoRA's nor a module of the model that can be "
            "trained whole; it belongs to another model"
        )
    ranks, alphas = settings.pattern("rank_pattern", is_whole=True), settings.pattern("alpha_pattern")
    modules = tuple(module for module in linear if module in found)
    rank, alpha = settings.count("r", 8), settings.number("lora_alpha", 8)
    spec = AdapterSpec(
        rank=rank,
        alpha=alpha,
        dropout=settings.number("lora_dropout", 0) if dropout is None else dropout,
        use_rslora=settings.truth("use_rslora"),
        use_dora=settings.truth("use_dora"),
        modules=modules,
        modules_to_save=tuple(module for module in whole if module in saved),
        init="kaiming",
        ranks={m: int(value) for m in modules if (value := _by_pattern(ranks, m, rank)) != rank},
        alphas={m: float(value) for m in modules if (value := _by_pattern(alphas, m, alpha)) != alpha},
    )
    _check_targets(settings, spec, shape)
    if spec.use_dora and EMBEDDING_MODULE in modules:
        raise UserError(f"{file}: it has a DoRA adapter of the embedding, which is not supported; use plain LoRA for it")
    has_ends = EMBEDDING_MODULE in modules or HEAD_MODULE in modules
    if has_ends and shape.tied_embeddings and settings.truth("ensure_weight_tying"):
        raise UserError(
            f"{file}: ensure_weight_tying is true, so that embedding and head share an adapter, which is not supported; "
            "give one that was trained without it"
        )
    meant = {module for module in whole if any(module.endswith(name) for name in settings.texts("modules_to_save"))}
    if shape.tied_embeddings and "model.embed_tokens" in saved and not settings.truth("ensure_weight_tying"):
        raise UserError(
            f"{file}: modules_to_save has embed_tokens without ensure_weight_tying, so that the head, which is the "
            "embedding in this model, is another matrix from then on; save it with ensure_weight_tying=True"
        )
    if meant ^ saved:
        module = sorted(meant ^ saved)[0]
        raise UserError(
            f"{file.parent}: its tensors {'do not ' if module in meant else ''}have {module}, of which modules_to_save says "
            "otherwise; get the adapter again"
        )
    return spec


def _by_pattern(pattern: Mapping[str, int | float], module: str, default: int | float) -> int | float:
    """PEFT's rule: the first key that, as a regular expression, matches the name or its last parts."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_targets(settings: PeftSettings, spec: AdapterSpec, shape: ModelShape) -> None:
    """The adapters that there are, are those that `target_modules` names."""
    targets, layers = settings.targets(), settings.layers()
    if not targets or settings.texts("layers_pattern") not in ([], ["layers"]):
        field = "layers_pattern" if targets else "target_modules"
        raise UserError(f"{settings.file}: {field} is {settings.values.get(field)!r}, which is not supported")
    excluded, field = settings.values.get("exclude_modules") or [], "exclude_modules"
    if isinstance(excluded, str):
        settings.check_time(field, excluded)
    try:
        without = {*matching(excluded, None, shape), *spec.modules_to_save} if excluded else {*spec.modules_to_save}
        field = "target_modules"
        named = matching(targets, layers, shape, without)
    except re.error as error:
        raise UserError(f"{settings.file}: {field} is no regular expression ({error})") from error
    missing = [module for module in named if module not in spec.modules]
    if missing:
        raise UserError(
            f"{settings.file.parent}: {settings.file.name} says that {missing[0]} has an adapter, but {WEIGHTS_NAME} has no "
            "tensors of it; get the adapter again"
        )
    surplus = [module for module in spec.modules if module not in named]
    if surplus:
        raise UserError(
            f"{settings.file.parent}: {WEIGHTS_NAME} has an adapter of {surplus[0]}, of which {settings.file.name} says "
            "nothing; get the adapter again"
        )
