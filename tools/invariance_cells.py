"""Lists the layouts that tests hold to a single process, from those tests' own cases, in docs/tested_layouts.md:
``python -m tools.invariance_cells --write`` (a test compares)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megadpo.parallel.layout import Layout
from tests.parity import (
    test_context_parallel,
    test_deepspeed,
    test_deepspeed_chunks,
    test_layouts,
    test_mixtures,
    test_pipeline,
)
from tools.generated import Part

PART = Part(
    Path(__file__).parents[1] / "docs" / "tested_layouts.md",
    "<!-- Between these marks: made by tools/invariance_cells.py from the tests' cases. -->\n",
    "<!-- end of the cells -->\n",
)
COLUMNS = (
    "processes",
    "tensor",
    "sequence",
    "pipeline",
    "virtual",
    "layers of stages",
    "context",
    "data",
    "expert",
    "expert tensor",
    "engine",
    "ZeRO stage",
    "offload",
)
Cell = tuple[str, ...]
"""A text for each of COLUMNS."""
MEGATRON = ("Megatron", "1", "")


def cells() -> dict[Cell, dict[str, bool]]:
    """Cell -> model -> whether the weights after three steps are compared too, not just the first step; fewest processes
    first. Cells of one process are what the others are compared with."""
    found: dict[Cell, dict[str, bool]] = {}
    for layout, engine, model, steps in _cases():
        if layout.world_size > 1:
            models = found.setdefault(_cell(layout, engine), {})
            models[model] = models.get(model, False) or steps
    return dict(sorted(found.items(), key=lambda item: (item[0][10:], item[0])))


def _cases() -> Iterator[tuple[Layout, Sequence[str], str, bool]]:
    """Layout, engine columns, model and whether three steps are compared, of every case of every test."""
    for model in test_layouts.FAMILIES:
        yield from ((case.layout, MEGATRON, model, False) for some in test_layouts.CASES.values() for case in some)
    for by_size in (test_layouts.INVARIANCE, test_layouts.MANY_STAGES):
        for case in (case for some in by_size.values() for case in some):
            yield from ((case.layout, MEGATRON, model, True) for model in ("qwen3", "qwen3-tied"))
    yield from (
        (case.layout, MEGATRON, "qwen3-tied", True) for some in test_context_parallel.CASES.values() for case in some
    )
    yield from ((case.layout, MEGATRON, "llama-tied", True) for case in test_pipeline.FOUR_STAGES)
    for model, (_, by_size) in test_mixtures.MODELS.items():
        name = model.removesuffix("-more")
        yield from ((case.layout, MEGATRON, name, False) for some in by_size.values() for case in some)
    for by_size in (test_mixtures.ONE, test_mixtures.TWO, test_mixtures.FOUR):
        yield from ((case.layout, MEGATRON, "mixtral", True) for some in by_size.values() for case in some)
    for model, cases in (
        ("qwen3", test_deepspeed.UNTIED),
        ("qwen3-tied", test_deepspeed.TIED),
        ("qwen3", test_deepspeed.UNEVEN),
        ("qwen3_moe", test_deepspeed.EXPERTS),
        ("glm4_moe", test_deepspeed.SHARED),
        ("llama4_text", test_deepspeed.SCALED),
        ("qwen3_next", test_deepspeed.LINEAR),
    ):
        for layout, stage in (case for some in cases.values() for case in some):
            yield layout, ("DeepSpeed", str(stage), ""), model, True
    for layout, stage, _ in test_deepspeed.RECOMPUTED:
        yield layout, ("DeepSpeed", str(stage), ""), "qwen3", True
    for layout, stage in test_deepspeed.OFFLOADED:
        yield layout, ("DeepSpeed", str(stage), "cpu"), "llama", True
    chunks = test_deepspeed_chunks
    for model, chunked in (("llama", chunks.FEW + chunks.ALL), ("mixtral", chunks.MIXTURES)):
        for each in chunked:
            offload = "" if each.offload == "none" else each.offload
            yield each.layout, ("DeepSpeed", str(each.zero_stage), offload), model, True
    for layout, _ in (case for some in test_deepspeed.NVME.values() for case in some):
        yield layout, ("DeepSpeed", "3", "nvme"), "llama", True


def _cell(layout: Layout, engine: Sequence[str]) -> Cell:
    def above_one(size: int) -> str:
        return str(size) if size > 1 else ""

    return (
        str(layout.world_size),
        above_one(layout.tensor),
        "yes" if layout.sequence else "",
        above_one(layout.pipeline),
        above_one(layout.virtual),
        ", ".join(map(str, layout.chunk_layers or ())),
        f"{layout.context} {layout.context_method}" if layout.context > 1 else "",
        above_one(layout.data),
        above_one(layout.expert),
        above_one(layout.expert_tensor),
        *engine,
    )


def render() -> str:
    """How many cells there are, and a table of them."""
    found = cells()
    num_all, num_stepped = len(found), sum(any(models.values()) for models in found.values())
    num_with_models = sum(len(models) for models in found.values())
    lines = [
        f"{num_all} cells ({num_with_models} with their models), {num_stepped} of them over three steps. Models in",
        "*italics*: the first step only.",
        "",
        "| " + " | ".join((*COLUMNS, "models")) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for cell, models in found.items():
        names = ", ".join(name if stepped else f"*{name}*" for name, stepped in sorted(models.items()))
        lines.append("| " + " | ".join((*cell, names)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PART.main(render)
