"""The independent source for adapters: PEFT on plain transformers, with adapters that have learned something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

PREFIX = "base_model.model."


def new_model(directory: Path, seed: int = 0, quantization: Any = None, **options: Any) -> Any:
    """A PeftModel on the model of `directory`, in eager attention, that has not learned anything; `options` are
    LoraConfig's, `quantization` is transformers' BitsAndBytesConfig."""
    import peft

    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    if quantization is not None:
        how |= {"quantization_config": quantization, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(directory, **how)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def adapted_model(directory: Path, seed: int = 0, quantization: Any = None, **options: Any) -> Any:
    """The same whose every adapter adds something."""
    model = new_model(directory, seed, quantization, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            elif "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """What PEFT would save, without the prefix."""
    import peft

    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): tensor.clone() for name, tensor in tensors.items()}


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of all that is trained, by the same names."""
    import peft

    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    state = {name: found.get(name, tensor) for name, tensor in model.state_dict().items()}
    tensors = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {name.removeprefix(PREFIX): tensor.clone() for name, tensor in tensors.items()}
