"""Which modules have adapters and how large these are: PEFT's `target_modules` against the names of a model.

An adapter of a linear layer W [out, in] is A [rank, in] and B [out, rank]: the layer computes W x + scaling * B A x (LoRA,
arXiv:2106.09685). Its tensors have PEFT's names without the prefix ``base_model.model.``:
``model.layers.3.self_attn.q_proj.lora_A.weight``, ``….lora_B.weight`` and DoRA's ``….lora_magnitude_vector`` [out]; a module
that is trained whole beside them keeps its plain name (``model.norm.weight``). The embedding W [vocabulary, hidden] has
``model.embed_tokens.lora_embedding_A`` [rank, vocabulary] and ``….lora_embedding_B`` [hidden, rank]: a token x is then
W[x] + scaling * B A[:, x].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megadpo.errors import UserError
from megadpo.model.families import HEAD, SCORE, logical_shapes, shard_parameters
from megadpo.model.families.common import EMBEDDING

if TYPE_CHECKING:
    from megadpo.config.schema import AdapterConfig
    from megadpo.model.shape import ModelShape

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
KINDS = (A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B)
"""What an adapter's tensors are called, behind the name of the module."""

ALL_LINEAR = "all-linear"
_WEIGHT = ".weight"
EMBEDDING_MODULE, HEAD_MODULE = EMBEDDING.removesuffix(_WEIGHT), HEAD.removesuffix(_WEIGHT)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model.

    Attributes:
        rank: of each adapter that `ranks` does not name.
        alpha: of each adapter that `alphas` does not name; see `scaling`.
        dropout: of an adapter's input, in training.
        use_rslora: scale by alpha / sqrt(rank) (arXiv:2312.03732).
        use_dora: each row of the sum has a magnitude that is trained as well (arXiv:2402.09353).
        modules: full names of the linear layers (and embeddings) that have one, in the model's order.
        modules_to_save: full names of the modules that are trained whole, in the model's order.
        init: how a new adapter begins; not read of one that is loaded.
        ranks, alphas: by the full name of a module, where they differ.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    init: str
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self.ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        """The factor on a module's B A x: alpha / rank, or alpha / sqrt(rank)."""
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def resolve(options: AdapterConfig, shape: ModelShape) -> AdapterSpec:
    """The adapters that the options ask for, of a model of this shape.

    A reward model's scalar head is trained whole, as PEFT does with a sequence classifier.

    Raises:
        UserError: a name or pattern that matches no module, a layer that the model does not have, or a module that cannot
            be trained in this way; the sentence says what there is.
    """
    saved = _modules_to_save(options.modules_to_save, shape)
    modules = _modules(options, shape, saved)
    return AdapterSpec(
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules=modules,
        modules_to_save=saved,
        init=options.init,
    )


def adapter_shapes(shape: ModelShape, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is trained, in the model's order: adapters, and modules that are trained whole."""
    adapted, saved = frozenset(spec.modules), frozenset(spec.modules_to_save)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in all_shapes(shape).items():
        module = name.removesuffix(_WEIGHT)
        if module in saved:
            shapes[name] = size
        if module in adapted and module == EMBEDDING_MODULE:
            rank = spec.rank_of(module)
            shapes |= {f"{module}.{EMBEDDING_A}": (rank, size[0]), f"{module}.{EMBEDDING_B}": (size[1], rank)}
        elif module in adapted:
            rank = spec.rank_of(module)
            shapes |= {f"{module}.{A}": (rank, size[1]), f"{module}.{B}": (size[0], rank)}
            if spec.use_dora:
                shapes[f"{module}.{MAGNITUDE}"] = size[:1]
    return shapes


def fused_tensors(shape: ModelShape, spec: AdapterSpec | None) -> list[tuple[str, ...]]:
    """Names of trained tensors that are one parameter in Megatron's layers: queries, keys and values, gate and up, what a
    layer of linear attention projects its inputs to."""
    layers = range(shape.num_layers)
    shards = shard_parameters(shape, tensor_rank=0, num_tensor=1, layers=layers, has_embedding=True, has_head=True)
    found = [tuple(dict.fromkeys(piece.logical_name for piece in shard.pieces)) for shard in shards]
    if spec is not None:
        adapted = frozenset(spec.modules)
        modules = [[name.removesuffix(_WEIGHT) for name in names] for names in found]
        found = [tuple(f"{module}.{A}" for module in names if module in adapted) for names in modules]
    return [names for names in found if len(names) > 1]


def adaptable_modules(shape: ModelShape) -> tuple[str, ...]:
    """Full names of the modules that can have an adapter, in the model's order: the embedding, linear layers, experts' too,
    and the head.

    The routers of experts are none (no adapter moves where tokens go), nor are the gates of shared experts, which are no
    linear layers here. Experts that are one tensor in the model's files are
    no modules, to which PEFT could add one.
    """
    routers, fused = _routers(shape), shape.experts is not None and shape.experts.fused is not None
    matrices = (name for name, size in all_shapes(shape).items() if len(size) == 2 and name.endswith(_WEIGHT))
    modules = (name.removesuffix(_WEIGHT) for name in matrices)
    modules = (m for m in modules if m not in routers and not (fused and ".experts." in m))
    others = (SCORE.removesuffix(_WEIGHT), ".q_norm", ".k_norm")  # norms of some models have a row for each head
    return tuple(m for m in modules if not m.endswith(others))


def _routers(shape: ModelShape) -> set[str]:
    """And the gates of shared experts."""
    experts = shape.experts
    if experts is None:
        return set()
    names = [f"{experts.block}.{experts.router}"]
    if experts.shared is not None and experts.shared.has_gate:
        names.append(f"{experts.block}.{experts.shared.name}_gate")
    return {f"model.layers.{layer}.{name}" for layer in experts.layers for name in names}


def whole_modules(shape: ModelShape) -> tuple[str, ...]:
    """Full names of the modules that can be trained whole beside adapters: embedding, norms and head."""
    names = (name for name in logical_shapes(shape) if name.endswith(_WEIGHT))
    others = set(adaptable_modules(shape)) - {EMBEDDING_MODULE, HEAD_MODULE} | _routers(shape)
    return tuple(m for m in (name.removesuffix(_WEIGHT) for name in names) if m not in others and ".experts." not in m)


def all_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """`logical_shapes`, with the head of a tied model under its own name: in PEFT it is a module like any other."""
    shapes = dict(logical_shapes(shape))
    if shape.tied_embeddings and shape.head == "logprobs":
        shapes[HEAD] = (shape.vocab_size, shape.hidden_size)
    return shapes


def matching(
    target_modules: str | Sequence[str],
    layers: Iterable[int] | None,
    shape: ModelShape,
    excluded: Iterable[str] = (),
) -> tuple[str, ...]:
    """Full names of the modules that PEFT's `target_modules` means, in the model's order.

    Args:
        target_modules: ``all-linear`` (all linear layers but the head), a regular expression that a whole name must match,
            or names, of which each means every module of that name or with it as its last parts.
        layers: numbers of the layers that count, but for modules that are named in full; None: all, and what stands outside
            of layers.
        excluded: modules that have none, whatever `target_modules` says: those that are trained whole.
    """
    without = set(excluded)
    names = [name for name in adaptable_modules(shape) if name not in without]
    in_full: set[str] = set()
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        names = [name for name in names if _LAYER.match(name)]
    elif isinstance(target_modules, str):
        names = [name for name in names if re.fullmatch(target_modules, name)]
    else:
        names = [name for name in names if any(_is_named(name, target) for target in target_modules)]
        in_full = set(target_modules)
    if layers is not None:
        wanted = set(layers)
        names = [n for n in names if n in in_full or ((match := _LAYER.match(n)) and int(match[1]) in wanted)]
    return tuple(names)


def _is_named(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _modules(options: AdapterConfig, shape: ModelShape, saved: tuple[str, ...]) -> tuple[str, ...]:
    targets, layers = options.target_modules, options.layers_to_transform
    for layer in layers or ():
        if not 0 <= layer < shape.num_layers:
            raise UserError(
                f"adapter.layers_to_transform names layer {layer}, but the model has layers 0 to {shape.num_layers - 1}"
            )
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(
                f"adapter.target_modules: {targets!r} is no regular expression ({error}); give one that whole names match, "
                "a list of names, or all-linear"
            ) from error
        if not matching(targets, None, shape):
            names = [name.strip() for name in targets.split(",")]
            hint = f" (a list of names: [{', '.join(names)}])" if all(matching([n], None, shape) for n in names) else ""
            raise UserError(
                f"adapter.target_modules: no linear layer's whole name is {targets!r}{hint}; there are {_there_is(shape)}"
            )
    elif not isinstance(targets, str):
        _check_names(targets, shape)
        _check_outside_of_layers(targets, layers, shape)
    modules = matching(targets, layers, shape, saved)
    if not modules:
        what = targets if isinstance(targets, str) else ", ".join(targets)
        within = f" in layers {', '.join(map(str, layers))}" if layers is not None else ""
        raise UserError(f"adapter.target_modules: {what} matches nothing{within}; there are {_there_is(shape)}")
    return modules


def _check_names(targets: Sequence[str], shape: ModelShape) -> None:
    if not targets:
        raise UserError(f"adapter.target_modules is empty; name linear layers, there are {_there_is(shape)}, or all-linear")
    for target in targets:
        if matching([target], None, shape):
            continue
        why = "is no linear layer of this model"
        if shape.experts is not None and _is_named(f"{shape.experts.block}.{shape.experts.router}", target):
            why = "is the experts' router, which gets no adapter"
        elif shape.experts is not None and any(_is_named(module, target) for module in _routers(shape)):
            why = "is the gate of the shared expert, which gets no adapter"
        elif target.lower() == ALL_LINEAR:
            why = f"stands for all by itself only: write target_modules: {ALL_LINEAR}"
        raise UserError(f"adapter.target_modules: {target!r} {why}; there are {_there_is(shape)}")


def _check_outside_of_layers(targets: Sequence[str], layers: Sequence[int] | None, shape: ModelShape) -> None:
    """PEFT's rule: beside numbers of layers, what stands outside of these has to be named in full."""
    for target in targets if layers is not None else ():
        outside = [module for module in matching([target], None, shape) if not _LAYER.match(module)]
        if outside and target not in outside:
            raise UserError(
                f"adapter.target_modules: {target!r} stands outside of layers, which adapter.layers_to_transform keeps to; "
                f"name it in full: {outside[0]}"
            )


def _there_is(shape: ModelShape) -> str:
    """The last parts of the modules' names, those of the layers first, and an example of a whole one."""
    layers = [module for module in adaptable_modules(shape) if _LAYER.match(module)]
    ends = [module for module in adaptable_modules(shape) if not _LAYER.match(module)]
    names = dict.fromkeys(module.rpartition(".")[2] for module in layers + ends)
    return f"{', '.join(names)} (in full: {layers[0]}, …)"


def _modules_to_save(names: Sequence[str], shape: ModelShape) -> tuple[str, ...]:
    """The modules whose full names end with one of `names`, as in PEFT: ``norm`` is every norm, ``model.norm`` the last."""
    there = whole_modules(shape)
    for name in names:
        if not name or not any(module.endswith(name) for module in there):
            if shape.tied_embeddings and name == HEAD_MODULE and shape.head == "logprobs":
                why = "is the embedding in this model (tie_word_embeddings); name embed_tokens"
            elif any(module.endswith(name) for module in adaptable_modules(shape)):
                why = "is a linear layer, which gets an adapter (adapter.target_modules) or is frozen"
            else:
                why = "matches no module of this model"
            raise UserError(
                f"adapter.modules_to_save: {name!r} {why}; there are "
                f"{', '.join(dict.fromkeys(module.rpartition('.')[2] for module in there))}"
            )
    score = SCORE.removesuffix(_WEIGHT)
    return tuple(module for module in there if module == score or any(module.endswith(name) for name in names))
