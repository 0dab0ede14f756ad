"""Is a checkpoint complete, and does it fit its config?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from megadpo.errors import UserError
from megadpo.model.families.common import EMBEDDING, HEAD, TensorSource
from megadpo.model.families.shards import logical_shapes
from megadpo.model.shape import ModelShape

# Buffers that old versions of transformers saved; the model computes them.
HARMLESS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")
ROWS_AT_A_TIME = 4096


MTP_PREFIXES = ("mtp.", "model.mtp.", "model.mtp_layers.")
"""Of Qwen3-Next, LongCat and MiMo."""
_MTP_LAYER = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")
"""The projection that layers after the last one have where they predict more than one token (DeepSeek-V3, GLM-4.5)."""


def mtp_names(num_layers: int, names: Iterable[str]) -> list[str]:
    """Those tensors of a model of so many layers that only multi-token prediction uses: they are not trained, and go into
    exports as they are."""
    names = list(names)
    layers = {int(found[1]) for name in names if (found := _MTP_LAYER.fullmatch(name))}
    prefixes = (*MTP_PREFIXES, *(f"model.layers.{layer}." for layer in layers if layer >= num_layers))
    return sorted(name for name in names if name.startswith(prefixes))


def check_tensors(shape: ModelShape, source: TensorSource) -> None:
    """Refuse weights that are incomplete, of another shape, quantised, or more than the model has.

    Raises:
        UserError: naming the tensor, with the found and the expected shape where they differ.
    """
    for problem in _problems(shape, source):
        raise UserError(problem)


def tensor_problems(shape: ModelShape, source: TensorSource) -> list[str]:
    """All that `check_tensors` would refuse, a sentence each."""
    return list(_problems(shape, source))


def _problems(shape: ModelShape, source: TensorSource) -> Iterator[str]:
    expected, found = logical_shapes(shape), set(source.names())
    for name, size in expected.items():
        if name not in found:
            yield f"the model's weights have no tensor {name} of shape {list(size)}, which its config asks for"
        elif tuple(source.shape(name)) != size:
            yield f"the model's tensor {name} has shape {list(source.shape(name))} but its config asks for {list(size)}"
        elif not source.dtype(name).is_floating_point or source.dtype(name).itemsize < 2:
            yield f"the model's tensor {name} is {source.dtype(name)}; quantised weights are not supported"
    passed_on = mtp_names(shape.num_layers, found)
    surplus = sorted(name for name in found - expected.keys() - {*passed_on} if not name.endswith(HARMLESS))
    if surplus == [HEAD] and shape.tied_embeddings:
        yield from _tied_head_problem(source)
    elif surplus:
        yield f"the model's weights have {len(surplus)} tensors that its config does not know, the first is {surplus[0]}"


def _tied_head_problem(source: TensorSource) -> Iterator[str]:
    """transformers ties only if both are equal, and otherwise overrules the config with a warning; we stop."""
    same = source.shape(HEAD) == source.shape(EMBEDDING)
    num_rows = source.shape(EMBEDDING)[0]
    for start in range(0, num_rows if same else 0, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, num_rows - start)
        same = same and torch.equal(source.read(HEAD, 0, start, count), source.read(EMBEDDING, 0, start, count))
    if not same:
        yield (
            f"the model's config ties the embeddings, but {HEAD} and {EMBEDDING} differ; "
            "set tie_word_embeddings to false in its config.json"
        )
