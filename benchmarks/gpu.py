"""Seconds, MFU, memory and kernels of a step on a CUDA device, by ways of attention and small operations, and by options.

A Qwen3 of random weights in bf16 with a live reference on pairs of random tokens whose lengths are like UltraFeedback's.
Every arm trains in a world of its own, one after the other; the first steps, which compile, are not counted. One more step
is profiled: milliseconds of its kernels by what they do. Arms that begin with "trl" are TRL's DPOTrainer on the same pairs,
sorted by length within a step, with bf16 weights and the micro-batch and options that they name. MFU is useful FLOP
(benchmarks/flop.py) over 989 TFLOP/s, the H100's for dense bf16.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import add_shared, print_table

SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
REST = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
PEAK = 989e12
KINDS = {
    # the first whose pattern a kernel's name has
    "attention": r"flash|flex|attention|sdpa|fmha|softmax",
    "products": r"gemm|nvjet|cutlass|xmma|sm90_|cublas",
    "small operations": r"_forward|_backward|_turn|rms_norm|layer_norm|silu|sigmoid",
    "optimizer": r"adam|multi_tensor",
    "gather and scatter": r"index|gather|scatter|embedding|^_copy$|^_add$",
    "copies": r"memcpy|memset|copy",
    "elementwise": r"elementwise|reduce|cat",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=4, warm_up=2, pairs=64, vocabulary=151_936)
    parser.add_argument("--size", choices=SIZES, default="1.7B", help="of the model")
    parser.add_argument("--layers", type=int, default=REST["num_hidden_layers"], help="of the model")
    parser.add_argument("--capacity", type=int, default=16_384, help="tokens a micro-batch")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of a prompt with an answer, at most")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["varlen+torch", "varlen+triton", "flex+triton"],
        metavar="ATTENTION+SMALL_OPS[+OPTION=VALUE…]",
        help="values of model.attention and model.small_ops, and further options, such as train.recompute=full; or "
        "trl+PAIRS[+OPTION…], TRL's micro-batch and what is set of gradient_checkpointing and use_liger_kernel "
        "(default: %(default)s)",
    )


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu needs a CUDA device, of which there is none")
    report["device"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(report["device"])
    with tempfile.TemporaryDirectory() as directory:
        num_body = _save_model(Path(directory) / "model", options)
        report["body_parameters"], report["arms"] = num_body, []
        for arm in options.arms:
            measure = _trl_arm if arm.startswith("trl+") else _arm
            report["arms"].append(measure(arm, Path(directory), num_body, options))
            print(report["arms"][-1], flush=True)
    kinds = [*KINDS, "other"]
    print_table(
        f"Steps of {options.pairs} pairs, {options.size}, {options.capacity:,} tokens a micro-batch",
        ["arm", "s / step", "pairs / s", "MFU", "peak GiB", "first step, s", *(f"{kind}, ms" for kind in kinds)],
        [
            [
                arm["arm"],
                f"{arm['median_seconds']:.3f}",
                f"{options.pairs / arm['median_seconds']:.1f}",
                f"{arm['mfu']:.3f}",
                f"{arm['peak_gib']:.1f}",
                f"{arm['first_seconds']:.1f}",
                *(f"{arm['kernel_ms'].get(kind, 0):.0f}" for kind in kinds),
            ]
            for arm in report["arms"]
        ],
    )


def _save_model(directory: Path, options: argparse.Namespace) -> int:
    """A random Qwen3 with a tokenizer; its parameters without the embedding, which is tied to the head."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from benchmarks.material import made_up_file, save_tokenizer

    directory.mkdir()
    save_tokenizer(directory, made_up_file(directory, 20), 300)
    torch.manual_seed(0)
    body = {**REST, **SIZES[options.size], "num_hidden_layers": options.layers}
    config = Qwen3Config(vocab_size=options.vocabulary, tie_word_embeddings=True, max_position_embeddings=8192, **body)
    config.bos_token_id, config.eos_token_id = 0, 1
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters()) - options.vocabulary * config.hidden_size


def _arm(arm: str, directory: Path, num_body: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.setup import prepare
    from megadpo.validation.load import load_config

    attention, small_ops, *overrides = arm.split("+")
    config: dict[str, Any] = {
        "model": {"path": str(directory / "model"), "dtype": "bf16", "attention": attention, "small_ops": small_ops},
        "data": {"train": str(directory / "model" / "made-up.jsonl"), "num_workers": 1},
        "train": {"steps": 1000, "pairs_per_step": options.pairs, "tokens_per_micro_batch": options.capacity},
        "output_dir": str(directory / re.sub(r"\W", "_", arm)),
    }
    groups = _groups(options)
    setup = setup_on(prepare(load_config(config, overrides)), groups)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with joined_world(setup.layout, setup.config.train.seed):
        seconds, kernel_ms = _steps(setup, options)
    return _summary(arm, seconds, kernel_ms, setup.policy.shape, groups, num_body, options)


def _trl_arm(arm: str, directory: Path, num_body: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, TrainerCallback

    from benchmarks.against_trl import trl_trainer

    _, batch_size, *switched_on = arm.split("+")
    model, groups, order = str(directory / "model"), _groups(options), _order(options)
    steps = [groups[n * options.pairs :][: options.pairs] for n in order]
    pairs = [group for step in steps for group in sorted(step, key=lambda group: group.num_stream_tokens(False))]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    settings = {"bf16": True, "use_cpu": False, **dict.fromkeys(switched_on, True)}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = trl_trainer(model, pairs, int(batch_size), options.pairs, len(order), directory, "bfloat16", **settings)
    trainer.add_callback(Clock())
    trainer.train()
    return _summary(arm, seconds, {}, AutoConfig.from_pretrained(model), groups, num_body, options)


def _groups(options: argparse.Namespace) -> list[Any]:
    """The pairs of the measured steps, and of one more, for the steps that are not."""
    from benchmarks.material import synthetic_groups

    num_pairs = options.pairs * (options.rounds + 1)
    return synthetic_groups("UltraFeedback-like", num_pairs, options.vocabulary, longest=options.longest)


def _order(options: argparse.Namespace) -> list[int]:
    """Which of the steps' pairs each step is on, those that are not measured first."""
    return [*([options.rounds] * options.warm_up), *range(options.rounds)]


def _summary(
    arm: str,
    seconds: list[float],
    kernel_ms: dict[str, float],
    model: Any,
    groups: list[Any],
    num_body: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Of an arm, whose model has the sizes `model`; MFU counts what the step has to compute, whoever computes it."""
    import torch

    from benchmarks.flop import useful_flop

    measured = seconds[options.warm_up :]
    steps = [groups[n * options.pairs :][: options.pairs] for n in range(options.rounds)]
    shape = SimpleNamespace(hidden_size=model.hidden_size, vocab_size=model.vocab_size, num_hidden_layers=options.layers)
    flop = [useful_flop(step, shape, num_body, True) for step in steps]
    return {
        "arm": arm,
        "seconds": measured,
        "median_seconds": statistics.median(measured),
        "mfu": statistics.median(each / taken / PEAK for each, taken in zip(flop, measured, strict=True)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_seconds": seconds[0],
        "kernel_ms": kernel_ms,
    }


def _steps(setup: Any, options: argparse.Namespace) -> tuple[list[float], dict[str, float]]:
    """Seconds of every step, and of one more its kernels' milliseconds by kind."""
    import torch

    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    run = build(setup, Callbacks())
    seconds = []
    try:
        for step in _order(options):
            torch.cuda.synchronize()
            started = time.perf_counter()
            training_step(run, step)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            training_step(run, options.rounds)
            torch.cuda.synchronize()
    finally:
        run.close()
    kernel_ms: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.self_device_time_total:
            kernel_ms[_kind(event.key)] += event.self_device_time_total / 1000
            print(f"{event.self_device_time_total / 1000:9.1f} ms {event.count:6} {_kind(event.key):20} {event.key[:110]}")
    return seconds, dict(kernel_ms)


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
