"""Models that are refused, and why: what transformers calls them."""

from __future__ import annotations

REFUSED: dict[str, tuple[str, ...]] = {
    "it has layers with a recurrent state (state-space or linear attention) of another kind than Qwen3-Next's, which is not "
    "built here": (
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
    ),
    "its linear attention is Qwen3-Next's, but its tensors have other names and places, which are not built here": (
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
    ),
    "it reads images or sound, and only text is trained on here": (
        "aya_vision",
        "gemma3",
        "gemma3n",
        "glm4v",
        "glm4v_moe",
        "idefics2",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "mistral3",
        "mllama",
        "paligemma",
        "phi4_multimodal",
        "pixtral",
        "qwen2_5_omni",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_vl",
        "qwen3_omni_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "voxtral",
    ),
    "it reads images, and only text is trained on here; save its text part alone by transformers "
    "(Llama4ForCausalLM.from_pretrained(DIR).save_pretrained(NEW)) and give that directory": ("llama4",),
    "it has an encoder and a decoder, and only decoders are trained here": (
        "bart",
        "bigbird_pegasus",
        "encoder-decoder",
        "led",
        "longt5",
        "m2m_100",
        "mbart",
        "mt5",
        "pegasus",
        "switch_transformers",
        "t5",
        "t5gemma",
        "umt5",
    ),
}
"""By reason, values of ``model_type``."""


def why_refused(model_type: object) -> str | None:
    """Why models of this type are refused, as the second half of a sentence; None: nothing is known against them."""
    return next((reason for reason, types in REFUSED.items() if model_type in types), None)
