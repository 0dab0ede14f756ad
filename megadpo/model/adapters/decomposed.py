"""Adapters that begin as a part of the weights (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775), which the frozen model
then is without: W = (W - scaling B A) + scaling B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megadpo.model.adapters.beginnings import DECOMPOSED
from megadpo.model.adapters.spec import A, AdapterSpec, B
from megadpo.model.families import TensorSource
from megadpo.platform.device import compute_device


def decompose(weight_OI: Tensor, init: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [rank, I] and B [O, rank] in float32, in PEFT's numbers.

    Args:
        init: ``pissa``: the largest singular values, the root of each in A and in B, B A being scaled; ``olora``: the first
            rows of R and columns of Q of W = Q R.
    """
    weight_OI = weight_OI.float()
    if init == "olora":
        q, r = torch.linalg.qr(weight_OI)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    assert init == "pissa", init
    u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
    roots = torch.diag((s[:rank] / scaling).sqrt())
    return roots @ vh[:rank], u[:, :rank] @ roots


def beginnings(spec: AdapterSpec, source: TensorSource) -> dict[str, Tensor]:
    """A and B of every module, float32 in host memory, the same on every rank: each decomposes its share. Collective."""
    assert spec.init in DECOMPOSED, spec.init
    rank, world, device = dist.get_rank(), dist.get_world_size(), compute_device()
    own: dict[str, tuple[Tensor, Tensor]] = {}
    for number, module in enumerate(spec.modules):
        if number % world == rank:
            name = f"{module}.weight"
            weight_OI = source.read(name, 0, 0, source.shape(name)[0]).to(device)
            a, b = decompose(weight_OI, spec.init, spec.rank_of(module), spec.scaling(module))
            own[module] = a.cpu(), b.cpu()
    found: dict[str, Tensor] = {}
    for number, module in enumerate(spec.modules):
        num_outputs, num_inputs = source.shape(f"{module}.weight")
        num_columns = spec.rank_of(module)
        for which, kind, size in ((0, A, (num_columns, num_inputs)), (1, B, (num_outputs, num_columns))):
            sent = own[module][which].to(device) if module in own else torch.empty(size, device=device)
            dist.broadcast(sent, number % world)
            found[f"{module}.{kind}"] = sent.cpu()
    source.release()
    return found


def as_plain(spec: AdapterSpec) -> AdapterSpec:
    """The adapters, of twice the rank, that `plain_tensor` makes for the model as it was."""
    factor = math.sqrt(2) if spec.use_rslora else 2.0
    return replace(spec, rank=2 * spec.rank, alpha=factor * spec.alpha, init="kaiming")


def plain_tensor(name: str, trained: Tensor, begun: Mapping[str, Tensor]) -> Tensor:
    """A trained tensor as part of an adapter of the model as it was, float32: B A - B0 A0 = [B | -B0] [A ; A0], as PEFT
    writes it."""
    if name.endswith(A):
        return torch.cat([trained.float(), begun[name]])
    return torch.cat([trained.float(), -begun[name]], 1) if name.endswith(B) else trained
