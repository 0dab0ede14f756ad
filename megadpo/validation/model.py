"""Options that do not fit the models of a run: refused here, once the models' configurations are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.data.rows.tokenise import tokenizers_differ
from megadpo.errors import UserError
from megadpo.model.shape import ModelShape

if TYPE_CHECKING:
    from megadpo.config.schema import Config


def check_experts(config: Config, shape: ModelShape) -> None:
    """Options about experts are for a model that has some, and a model with experts has an engine that is built for it.

    Args:
        shape: of the policy.

    Raises:
        UserError: in one sentence.
    """
    coefficient, path = config.train.router_aux_coef, config.model.path
    if shape.experts is None:
        if coefficient:
            raise UserError(f"train.router_aux_coef is {coefficient!r}, but {path} has no experts; remove it")
    elif config.parallel.engine != "megatron":
        raise UserError(
            f"parallel.engine is {config.parallel.engine}, but {path} has experts, which are built for engine "
            "megatron only; use that"
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
