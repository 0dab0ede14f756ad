"""The independent source for adapters: PEFT on plain transformers, with adapters that have learned something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadpo.checkpoint.hf import read_hf_config
from megadpo.config.schema import AdapterConfig
from megadpo.model.adapters.spec import adapter_shapes, resolve
from megadpo.model.families import shape_of
from tests.helpers import oracle

PREFIX = "base_model.model."


def new_model(directory: Path, seed: int = 0, quantization: Any = None, **options: Any) -> Any:
    """A PeftModel on the model of `directory`, in eager attention, that has not learned anything; `options` are
    LoraConfig's, `quantization` is transformers' BitsAndBytesConfig."""
    import peft

    how = {"dtype": torch.float32, "attn_implementation": "eager"}
    if quantization is not None:
        how |= {"quantization_config": quantization, "device_map": {"": "cpu"}}
    oracle.use_definitions()
    base = AutoModelForCausalLM.from_pretrained(directory, **how)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def adapted_model(directory: Path, seed: int = 0, quantization: Any = None, **options: Any) -> Any:
    """The same whose every adapter adds something."""
    model = new_model(directory, seed, quantization, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
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


def chain_rule(gradients: dict[str, Tensor], tensors: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Gradients of A and B from those of the matrices W + scaling B A."""
    found = {}
    for name, tensor in tensors.items():
        module, kind = name.removesuffix(".weight").rsplit(".", 1)
        whole = gradients[f"{module}.weight"] * scaling
        other = tensors[f"{module}.{'lora_B' if kind == 'lora_A' else 'lora_A'}.weight"]
        found[name] = other.t() @ whole if kind == "lora_A" else whole @ other.t()
        assert found[name].shape == tensor.shape
    return found


def shapes_of(model: Path, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapters' tensors."""
    shape = shape_of(read_hf_config(model))
    return adapter_shapes(shape, resolve(AdapterConfig(kind="lora", **options), shape))


def add_to_matrices(model: torch.nn.Module, tensors: dict[str, Tensor], scaling: float) -> None:
    """W + scaling B A in the place of each W, in matrices that transformers holds for all experts, too."""
    named = oracle.in_files({name: p.data for name, p in model.named_parameters()}, model.config)
    for name, b in tensors.items():
        if name.endswith("lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")]
            named[name.replace("lora_B.weight", "weight")] += scaling * b @ a
