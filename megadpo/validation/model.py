"""Options that do not fit the models of a run: refused here, once the models' configurations are read."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from megadpo.data.rows.tokenise import tokenizers_differ
from megadpo.errors import UserError
from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.adapters.spec import EMBEDDING_MODULE, HEAD_MODULE, all_shapes
from megadpo.model.shape import ModelShape
from megadpo.objectives.specs import couples_batch

if TYPE_CHECKING:
    from megadpo.config.schema import Config
    from megadpo.model.adapters.spec import AdapterSpec
    from megadpo.parallel.layout import Layout


def check_experts(config: Config, shape: ModelShape) -> None:
    """Options about experts are for a model that has some, and a model with experts has an engine that is built for it.

    Args:
        shape: of the policy.

    Raises:
        UserError: in one sentence.
    """
    coefficient, path = config.train.router_aux_coef, config.model.path
    _check_bias_updates(config, shape)
    _check_router_replay(config, shape)
    if shape.experts is None:
        if coefficient:
            raise UserError(f"train.router_aux_coef is {coefficient!r}, but {path} has no experts; remove it")
        if config.model.expert_products != "auto":
            raise UserError(f"model.expert_products is {config.model.expert_products}, but {path} has no experts; remove it")
    elif config.model.expert_products.startswith("grouped") and config.model.quantization != "none":
        raise UserError(
            f"model.expert_products is {config.model.expert_products} with model.quantization {config.model.quantization}, "
            "whose matrices are made dense one after the other; set expert_products to auto"
        )
    elif (
        config.parallel.engine == "deepspeed"
        and config.parallel.zero_stage == 3
        and config.model.expert_products not in ("auto", "loop")
    ):
        raise UserError(
            f"model.expert_products is {config.model.expert_products} with parallel.zero_stage 3, which gathers the "
            "matrices of one expert at a time; set expert_products to auto"
        )


def check_linear_attention(config: Config, policy: ModelShape, reference: ModelShape | None = None) -> None:
    """Options that do not go with linear attention, or that are about it while no model has any.

    Args:
        reference: None: it is the policy's.

    Raises:
        UserError: in one sentence.
    """
    model = config.model
    if policy.linear is None and (reference is None or reference.linear is None):
        if model.linear_attention != "auto":
            raise UserError(
                f"model.linear_attention is {model.linear_attention}, but {model.path} has no layers with linear attention; "
                "remove it"
            )
    elif config.schedule.split_pairs:
        raise UserError(
            "schedule.split_pairs is true, but the model has layers with linear attention, whose state is not handed from a "
            "prompt in one half of a micro-batch to a response in the other; set it to false"
        )


def _check_bias_updates(config: Config, shape: ModelShape) -> None:
    rate = config.train.router_bias_update_rate
    if not rate:
        return
    reason = None
    if shape.experts is None or not shape.experts.routing.has_correction_bias:
        reason = f"{config.model.path} has no routers with a correction bias (e_score_correction_bias); remove it"
    elif config.adapter.kind != "none":
        reason = f"with adapter.kind {config.adapter.kind} the model, its routers' biases too, stays as it is; set it to 0"
    if reason is not None:
        raise UserError(f"train.router_bias_update_rate is {rate!r}, but {reason}")


def _check_router_replay(config: Config, shape: ModelShape) -> None:
    if not config.reference.router_replay:
        return
    reason = None
    if shape.experts is None:
        reason = f"{config.model.path} has no experts; remove it"
    elif config.train.router_aux_coef or config.train.router_bias_update_rate:
        name = "router_aux_coef" if config.train.router_aux_coef else "router_bias_update_rate"
        reason = (
            f"the load is then the reference's, which nothing that train.{name} does to the policy could balance; set one "
            "of the two to its default"
        )
    if reason is not None:
        raise UserError(f"reference.router_replay is true, but {reason}")


def check_same_routes(config: Config, reference: ModelShape, policy: ModelShape) -> None:
    """Refuse router replay from a reference whose experts are not those of the policy one by one.

    Args:
        reference: of `reference.path`.

    Raises:
        UserError: saying what differs.
    """
    if not config.reference.router_replay:
        return

    def facts(shape: ModelShape) -> dict[str, object]:
        experts = shape.experts
        if experts is None:
            return {"experts": 0}
        return {
            "experts": experts.count,
            "experts per token": experts.per_token,
            "with experts": f"layers {_ranges(experts.layers)}",
        }

    for (what, ours), (_, theirs) in zip(facts(policy).items(), facts(reference).items(), strict=False):
        if ours != theirs:
            raise UserError(
                f"reference.router_replay is true, but {config.reference.path} has {theirs} {what} and {config.model.path} "
                f"{ours}; their routes can't be the same: set it to false"
            )


def _ranges(numbers: Collection[int]) -> str:
    """ "0-3, 5"; "none" without any."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"


def check_adapters(config: Config, shape: ModelShape, layout: Layout, adapter: AdapterSpec) -> None:
    """The adapters are ones that this layout and this engine are built for.

    Args:
        shape: of the policy.

    Raises:
        UserError: in one sentence.
    """
    _check_vocabulary_adapters(shape, adapter)
    numbers = {int(module.split(".")[2]) for module in adapter.modules if module.startswith("model.layers.")}
    chunks = layout.layers_of_chunks(shape.num_layers)
    for number, layers in enumerate(chunks):
        has_end = (number == 0 and EMBEDDING_MODULE in adapter.modules) or (
            number == len(chunks) - 1 and HEAD_MODULE in adapter.modules
        )
        if not has_end and not numbers & set(layers):
            raise UserError(
                f"adapter.layers_to_transform and adapter.target_modules leave chunk {number + 1} of the pipeline (layers "
                f"{layers[0]} to {layers[-1]}) without an adapter, and so without anything to train; give it one, or lower "
                "parallel.pipeline"
            )
    has_experts = any(".experts." in module for module in adapter.modules)
    if has_experts and config.model.expert_products.startswith("grouped"):
        raise UserError(
            f"model.expert_products is {config.model.expert_products}, but experts with adapters are computed one after the "
            "other; set it to auto, or leave experts out of adapter.target_modules"
        )
    if has_experts and layout.expert_tensor not in (1, layout.tensor):
        raise UserError(
            f"parallel.expert_tensor is {layout.expert_tensor} with parallel.tensor {layout.tensor}, but adapters of "
            "experts are built for 1 or the latter; use one of these, or leave experts out of adapter.target_modules"
        )
    if has_experts and adapter.use_dora and layout.expert_tensor > 1:
        raise UserError(
            f"parallel.expert_tensor is {layout.expert_tensor} with adapter.use_dora, whose magnitudes are built for whole "
            "experts; leave it at 1, or leave experts out of adapter.target_modules"
        )
    if adapter.init in DECOMPOSED:
        sizes = all_shapes(shape)
        smallest = min(adapter.modules, key=lambda module: min(sizes[f"{module}.weight"]))
        if adapter.rank > min(sizes[f"{smallest}.weight"]):
            raise UserError(
                f"adapter.rank is {adapter.rank}, but with adapter.init {adapter.init} an adapter is a part of its matrix, "
                f"and {smallest} has {' x '.join(map(str, sizes[f'{smallest}.weight']))} numbers; lower it"
            )
    if adapter.use_dora and adapter.dropout:
        raise UserError(
            f"adapter.dropout is {adapter.dropout} with adapter.use_dora, whose magnitudes would then be those of other "
            "inputs; set it to 0"
        )
    if adapter.dropout and couples_batch(config.objective):
        raise UserError(
            f"adapter.dropout is {adapter.dropout}, but objective.loss_type {', '.join(config.objective.loss_types)} is "
            "computed from a forward pass of its own, in which other inputs would be dropped than in the one that learns; "
            "set it to 0"
        )
    if adapter.use_dora and config.parallel.engine == "deepspeed":
        raise UserError(
            "adapter.use_dora is true, but its magnitudes, which stay in fp32, are built for parallel.engine megatron only; "
            "use that, or remove use_dora"
        )
    zero_3 = config.parallel.engine == "deepspeed" and config.parallel.zero_stage == 3
    if zero_3 and adapter.modules_to_save and config.reference.mode in ("adapter", "cached"):
        raise UserError(
            f"adapter.modules_to_save has {', '.join(adapter.modules_to_save)}, whose original values the reference needs; "
            "with parallel.zero_stage 3 these are not kept beside the trained ones: set reference.mode to precomputed, or "
            "use another stage"
        )


def _check_vocabulary_adapters(shape: ModelShape, adapter: AdapterSpec) -> None:
    """Adapters of the embedding and the head are plain LoRA, and a tied matrix is trained in one way."""
    ends = [module for module in (EMBEDDING_MODULE, HEAD_MODULE) if module in adapter.modules]
    if not ends:
        return
    if adapter.use_dora:
        raise UserError(
            f"adapter.use_dora is true and {ends[0]} has an adapter, but lengths of rows of the vocabulary are not built; "
            "remove one of them"
        )
    if adapter.init in DECOMPOSED:
        raise UserError(
            f"adapter.init is {adapter.init} and {ends[0]} has an adapter, but matrices of the vocabulary are not "
            f"decomposed; set adapter.init to kaiming, or leave {ends[0]} out of adapter.target_modules"
        )
    if shape.tied_embeddings and EMBEDDING_MODULE in adapter.modules_to_save:
        raise UserError(
            "adapter.modules_to_save has the embedding, which is the head too in this model (tie_word_embeddings), and "
            "adapter.target_modules has lm_head; remove one of them"
        )


def check_reference_adapter(reference: AdapterSpec, trained: AdapterSpec) -> None:
    """What the reference's adapter has trained whole is trained whole by the policy's, too: else the model under both would
    be another one. The embedding's and the head's are plain LoRA.

    Raises:
        UserError: it is not.
    """
    ends = [module for module in (EMBEDDING_MODULE, HEAD_MODULE) if module in reference.modules]
    if reference.use_dora and ends:
        raise UserError(
            f"reference.adapter is a DoRA adapter with {ends[0]}, but lengths of rows of the vocabulary are not built; give "
            "another one, or merge it (megadpo convert merge) and set reference.path to the result"
        )
    others = [module for module in reference.modules_to_save if module not in trained.modules_to_save]
    if others:
        raise UserError(
            f"reference.adapter has {others[0]} whole, which the policy's adapter leaves as it is in model.path; add it to "
            "adapter.modules_to_save"
        )


def check_same_vocabulary(path: str, reference: ModelShape, policy: ModelShape) -> None:
    """The reference at `path` reads the policy's token ids.

    Args:
        reference, policy: their shapes.

    Raises:
        UserError: their vocabularies differ in size.
    """
    if policy.vocab_size != reference.vocab_size:
        raise UserError(
            f"reference.path: {path} has {reference.vocab_size} vocabulary rows and the policy "
            f"{policy.vocab_size}; both must read the same tokens"
        )


def check_same_tokenizer(reference: str, policy: str) -> None:
    """The tokenizer beside the reference, where there is one, gives the policy's token ids: it scores these.

    Args:
        reference, policy: directories with a tokenizer.

    Raises:
        UserError: some ids are other tokens there.
    """
    difference = tokenizers_differ(policy, reference)
    if difference is not None:
        raise UserError(
            f"reference.path: the tokenizer of {reference} {difference}; a reference scores the policy's token ids: use one "
            "that was trained with them"
        )
