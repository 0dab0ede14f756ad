"""Which family a config belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megadpo.errors import UserError, reason
from megadpo.model.families.cohere import COHERE, COHERE2
from megadpo.model.families.common import Family
from megadpo.model.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megadpo.model.families.gemma import GEMMA2, GEMMA3
from megadpo.model.families.glm import GLM, GLM4
from megadpo.model.families.glm4_moe import GLM4_MOE
from megadpo.model.families.gpt_oss import GPT_OSS
from megadpo.model.families.granite import GRANITE
from megadpo.model.families.llama import LLAMA
from megadpo.model.families.llama4 import LLAMA4
from megadpo.model.families.ministral import MINISTRAL
from megadpo.model.families.mistral import MISTRAL
from megadpo.model.families.mixtral import MIXTRAL
from megadpo.model.families.olmo2 import OLMO2
from megadpo.model.families.phi3 import PHI3
from megadpo.model.families.qwen2 import QWEN2
from megadpo.model.families.qwen2_moe import QWEN2_MOE
from megadpo.model.families.qwen3 import QWEN3
from megadpo.model.families.qwen3_moe import QWEN3_MOE
from megadpo.model.families.qwen3_next import QWEN3_NEXT
from megadpo.model.families.refused import why_refused
from megadpo.model.families.smollm3 import SMOLLM3

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = (
    LLAMA,
    QWEN2,
    QWEN3,
    MISTRAL,
    MIXTRAL,
    QWEN3_MOE,
    PHI3,
    OLMO2,
    SMOLLM3,
    GRANITE,
    MINISTRAL,
    GLM,
    GLM4,
    COHERE,
    COHERE2,
    GEMMA2,
    GEMMA3,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    QWEN2_MOE,
    GLM4_MOE,
    LLAMA4,
    QWEN3_NEXT,
)


def family_of(hf_config: PretrainedConfig | dict[str, Any]) -> Family:
    """The family of a transformers config or of the dict that config.json holds.

    ``architectures`` decides; a config without it goes by its ``model_type``.

    Raises:
        UserError: an unsupported architecture, named, with the list of supported ones.
    """
    field = hf_config.get if isinstance(hf_config, dict) else lambda key: getattr(hf_config, key, None)
    architectures, model_type = field("architectures") or [], field("model_type")
    if not isinstance(architectures, list | tuple):
        raise UserError(f"architectures is {architectures!r}; it must be a list of names")
    for family in FAMILIES:
        if family.name == model_type and (not architectures or set(architectures) & set(family.known_architectures)):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.known_architectures)
    named = ", ".join(map(str, architectures)) or "none"
    known = why_refused(model_type)
    if known is not None:
        raise UserError(f"the model's architecture {named} (model_type {model_type!r}) is not supported: {known}")
    raise UserError(f"the model's architecture {named} (model_type {model_type!r}) is not supported; supported: {supported}")


def as_config(hf_config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """A transformers config; a dict (config.json's content) is turned into one.

    Raises:
        UserError: an unsupported architecture, or values that transformers refuses.
    """
    if not isinstance(hf_config, dict):
        return hf_config
    from transformers import AutoConfig

    family = family_of(hf_config)
    try:
        settings = {key: value for key, value in hf_config.items() if key != "model_type"}
        return AutoConfig.for_model(family.name, **settings)
    except Exception as error:  # transformers' validators raise several kinds
        raise UserError(f"transformers refuses the model's config: {reason(error, limit=None)}") from error
