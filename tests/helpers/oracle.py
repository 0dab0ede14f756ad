"""The independent source: plain transformers, one sequence at a time, no packing, no sharing, no parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from megadpo.data.groups import Group


def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model in eager attention, linear attention by its definition."""
    use_definitions()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")


def use_definitions() -> None:
    """Have transformers compute linear attention by its recurrent rule: its chunks take differences of large sums in
    float32, and A_log's gradients are then 1e-4 away."""
    qwen3_next.torch_chunk_gated_delta_rule = qwen3_next.torch_recurrent_gated_delta_rule


def response_logp(model: torch.nn.Module, group: Group, response: int) -> Tensor:
    """Sum of the completion tokens' log-probs, float64."""
    prompt, completion = (torch.from_numpy(ids).long() for ids in (group.prompt_of(response), group.responses[response]))
    _forget_earlier_lengths(model)
    logits = model(torch.cat([prompt, completion])[None]).logits[0]
    logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, completion[:, None]).sum()


def _forget_earlier_lengths(model: torch.nn.Module) -> None:
    """A dynamic rope goes on with the frequencies of the longest sequence that it has seen."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq.data = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def all_logps(model: torch.nn.Module, groups: Sequence[Group]) -> Tensor:
    """[groups, 2], without gradients."""
    with torch.no_grad():
        return torch.stack([torch.stack([response_logp(model, g, r) for r in (0, 1)]) for g in groups])


def dpo_step(
    model: torch.nn.Module, groups: Sequence[Group], reference_logps: Tensor, beta: float, smoothing: float = 0.0
) -> tuple[float, dict[str, Tensor]]:
    """Loss of the batch (mean over pairs) and its gradient by Hugging Face parameter name."""
    model.zero_grad()
    total = 0.0
    for group, reference in zip(groups, reference_logps, strict=True):
        logps = torch.stack([response_logp(model, group, r) for r in (0, 1)])
        scaled = beta * ((logps - reference)[0] - (logps - reference)[1])
        loss = (-(1 - smoothing) * F.logsigmoid(scaled) - smoothing * F.logsigmoid(-scaled)) / len(groups)
        loss.backward()
        total += loss.item()
    return total, in_files(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, model.config
    )


def in_files(tensors: dict[str, Tensor], config: object) -> dict[str, Tensor]:
    """Tensors by parameter name under the names that model files have: experts apart, gate and up apart."""
    if config.model_type in ("gpt_oss", "llama4_text"):  # type: ignore[attr-defined]
        return _single_experts(tensors, in_turns=config.model_type == "gpt_oss")  # type: ignore[attr-defined]
    mixtral = config.model_type == "mixtral"  # type: ignore[attr-defined]
    block, (gate, up, down) = (
        (".block_sparse_moe.", ("w1", "w3", "w2")) if mixtral else (".mlp.", ("gate_proj", "up_proj", "down_proj"))
    )
    named: dict[str, Tensor] = {}
    for whole_name, tensor in tensors.items():
        name = whole_name.replace(".mlp.", block)
        if ".experts." not in name:
            named[name] = tensor
            continue
        before, kind = name.rsplit(".", 1)
        for number, matrix in enumerate(tensor):
            parts = zip((gate, up), matrix.chunk(2), strict=True) if kind == "gate_up_proj" else [(down, matrix)]
            named |= {f"{before}.{number}.{part}.weight": values for part, values in parts}
    return named


def _single_experts(tensors: dict[str, Tensor], in_turns: bool) -> dict[str, Tensor]:
    """GPT-OSS's and Llama 4's experts, which their files have as one tensor, under the names of Mixtral's and others'."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        before, _, kind = name.partition(".experts.")
        matrix, ending = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
        if not kind:
            named[name] = tensor
            continue
        gate, up = (tensor[..., ::2], tensor[..., 1::2]) if in_turns else tensor.chunk(2, dim=-1)
        parts = {"gate_proj": gate, "up_proj": up}
        for part, values in (parts if matrix == "gate_up_proj" else {"down_proj": tensor}).items():
            for number, expert in enumerate(values):
                named[f"{before}.experts.{number}.{part}.{ending}"] = expert.T if expert.ndim == 2 else expert
    return named


def worst_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """max over tensors of ||a - b|| / ||b||; a tensor with a tiny norm is measured against the largest one."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    largest = max(float(b.norm()) for b in theirs.values())
    errors = {}
    for name, b in theirs.items():
        size = float(b.norm())
        errors[name] = float((ours[name].double() - b.double()).norm()) / (size if size > 1e-4 * largest else largest)
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name


def assert_same_step(case: Any, ours: Any, theirs: Any) -> None:
    """Two outcomes of a global batch agree: every gradient within 1e-5 of its norm, the whole norm within 1e-5, the loss
    within 1e-6."""
    worst, name = worst_relative_error(ours.gradients, theirs.gradients)
    assert worst <= 1e-5, f"{case}: {name} {worst}"
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5), str(case)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6), str(case)
