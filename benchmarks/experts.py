"""Time of a mixture's layer by how its experts are multiplied: one after the other, together, by torch's kernel.

Forward and backward of one mixture (router, dispatch, experts) over the same tokens, for every way of `model.expert_products`,
in one process in interleaved rounds, by the clock and of the processor (which a busy machine stretches less). Outputs and
gradients are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.common import add_shared, interleaved, median_ratio, print_table
from benchmarks.ranks import on_ranks


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from megadpo.model.moe.products import WAYS

    report["points"] = [on_ranks(1, _point, count, options)[0] for count in options.experts]
    print_table(
        f"A mixture's layer, forward + backward: {options.tokens:,} tokens, hidden {options.hidden}, {options.columns} columns "
        f"and {options.per_token} experts a token, fp32",
        ["experts", "tokens an expert", "way", "milliseconds", "loop / it", "processor, loop / it", "largest difference"],
        [
            [
                point["experts"],
                options.tokens * options.per_token // point["experts"],
                way,
                1000 * statistics.median(point["seconds"][way]),
                median_ratio(point["seconds"]["loop"], point["seconds"][way]),
                median_ratio(point["processor_seconds"]["loop"], point["processor_seconds"][way]),
                point["differences"][way],
            ]
            for point in report["points"]
            for way in WAYS
        ],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, hidden=256, rounds=7)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--per-token", type=int, default=4)
    parser.add_argument("--columns", type=int, default=128, help="inner size of an expert")


def _point(count: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from megadpo.model.moe.products import WAYS
    from megadpo.parallel.layout import Layout
    from megadpo.parallel.world import joined_world

    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo")
    with joined_world(Layout(), seed=1):
        arms, results, processor = {}, {}, {way: [] for way in WAYS}
        for way in WAYS:
            step = _step(way, count, options)
            results[way] = step()

            def arm(number: int, way: str = way, step: Any = step) -> None:
                started = time.process_time()
                step()
                if number >= 0:
                    processor[way].append(time.process_time() - started)

            arms[way] = arm
        seconds = interleaved(arms, options.rounds, 1)
    dist.destroy_process_group()
    of_loop = results["loop"]
    differences = {
        way: max(float((a - b).norm() / b.norm()) for a, b in zip(found, of_loop, strict=True))
        for way, found in results.items()
    }
    return {"experts": count, "seconds": seconds, "processor_seconds": processor, "differences": differences}


def _step(way: str, count: int, options: argparse.Namespace) -> Any:
    """Forward and backward of the layer; its output, its input's gradient, and an expert's."""
    import torch
    from transformers import Qwen3MoeConfig

    from megadpo.config.schema import ModelConfig
    from megadpo.model.build import build_stage
    from megadpo.model.families import shape_of
    from megadpo.parallel.layout import Layout

    sizes = {"hidden_size": options.hidden, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    mixture = {
        "num_experts": count,
        "num_experts_per_tok": options.per_token,
        "moe_intermediate_size": options.columns,
        "norm_topk_prob": True,
    }
    config = Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], vocab_size=64, head_dim=32, **sizes, **mixture)
    stage = build_stage(shape_of(config), Layout(), torch.float32, options=ModelConfig(expert_products=way))
    mixture_layer = stage.model.decoder.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture_layer.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    hidden = torch.randn(options.tokens, 1, options.hidden, generator=generator).requires_grad_()

    def step() -> list[Any]:
        mixture_layer.zero_grad(set_to_none=True)
        hidden.grad = None
        output, _ = mixture_layer(hidden)
        output.square().mean().backward()
        weight = mixture_layer.experts.local_experts[0].linear_fc1.weight
        return [output.detach().clone(), hidden.grad.clone(), weight.grad.clone()]

    return step
