"""Some steps of one arm of benchmarks.gpu in the process that it is: a line of JSON for every mix of lengths.

``python -m benchmarks.gpu_point POINT``: POINT is the JSON of what `measure` takes.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.flop import useful_flop
from benchmarks.material import MIXES, synthetic_groups

SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
REST = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
PEAK = 989e12
"""FLOP/s of an H100's products in dense bf16."""

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
Emit = Callable[[dict[str, Any]], None]


def measure(point: dict[str, Any], emit: Emit) -> None:
    """Take an arm's steps on every mix, and say of each what came out, or that memory was too small.

    Args:
        point: "arm", "size" and "mixes"; "model", a directory that is filled where it is not there; "pairs", "rounds",
            "trl_rounds", "warm_up", "capacity", "longest", "layers", "vocabulary" and "tiny" are benchmarks.gpu's options.
        emit: gets a record a mix.
    """
    options = SimpleNamespace(**point)
    directory = Path(options.model)
    if not directory.exists():
        save_model(directory, options)
    num_body = json.loads((directory / "body.json").read_text())
    (_trl_arm if options.arm.startswith("trl+") else _own_arm)(options, directory, num_body, emit)


def save_model(directory: Path, options: SimpleNamespace) -> None:
    """A random Qwen3 with a tokenizer; in body.json its parameters without the embedding, which is tied to the head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from benchmarks.material import made_up_file, save_tokenizer

    unfinished = directory.with_name(directory.name + ".tmp")
    unfinished.mkdir(parents=True)
    save_tokenizer(unfinished, made_up_file(unfinished, 20), 300)
    torch.manual_seed(0)
    body = TINY if options.tiny else {**REST, **SIZES[options.size]}
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        num_hidden_layers=options.layers,
        **body,
    )
    config.bos_token_id, config.eos_token_id = 0, 1
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(unfinished)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    (unfinished / "body.json").write_text(str(num_parameters - options.vocabulary * config.hidden_size))
    unfinished.rename(directory)


def _groups(options: SimpleNamespace, mix: str, num_steps: int) -> list[Any]:
    """As many pairs as the steps need."""
    own_longest = MIXES[mix][-1]
    longest = max(options.longest, own_longest) if mix == "UltraFeedback-like" else own_longest
    shrink = 10 if options.tiny else 1
    return synthetic_groups(mix, num_steps * options.pairs, options.vocabulary, shrink, longest)


def _own_arm(options: SimpleNamespace, directory: Path, num_body: int, emit: Emit) -> None:
    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.setup import prepare
    from megadpo.training.trainer import build
    from megadpo.validation.load import load_config

    attention, small_ops, *overrides = options.arm.split("+")
    config: dict[str, Any] = {
        "model": {
            "path": str(directory),
            "dtype": "fp32" if options.tiny else "bf16",
            "attention": attention,
            "small_ops": small_ops,
        },
        "data": {"train": str(directory / "made-up.jsonl"), "num_workers": 1},
        "train": {"steps": 1000, "pairs_per_step": options.pairs, "tokens_per_micro_batch": options.capacity},
        "output_dir": str(directory.parent / re.sub(r"\W", "_", options.arm)),
    }
    # Of each mix the measured steps, and one more for those that are not.
    by_mix = {mix: _groups(options, mix, options.rounds + 1) for mix in options.mixes}
    groups = [dataclasses.replace(group, row=row) for row, group in enumerate(chain.from_iterable(by_mix.values()))]
    setup = setup_on(prepare(load_config(config, overrides)), groups)
    with joined_world(setup.layout, setup.config.train.seed):
        try:
            run = build(setup, Callbacks())
        except torch.OutOfMemoryError:
            for mix in options.mixes:
                emit(_failed(options, mix, "out of memory"))
            return
        try:
            for number, mix in enumerate(options.mixes):
                emit(_own_steps(run, number * (options.rounds + 1), options, mix, by_mix[mix], num_body))
        finally:
            run.close()


def _own_steps(
    run: Any, first: int, options: SimpleNamespace, mix: str, groups: Sequence[Any], num_body: int
) -> dict[str, Any]:
    """Seconds of the steps from number `first` on, and of one more its kernels' milliseconds by kind."""
    from megadpo.training.trainer import training_step

    spare = first + options.rounds
    _forget_peak()
    seconds = []
    try:
        for step in [*([spare] * options.warm_up), *range(first, spare)]:
            _wait()
            started = time.perf_counter()
            training_step(run, step)
            _wait()
            seconds.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return _failed(options, mix, "out of memory")
    peak_gib = _peak_gib()
    kernel_ms = _profiled(lambda: training_step(run, spare)) if torch.cuda.is_available() else {}
    return _record(options, mix, seconds, options.warm_up, peak_gib, kernel_ms, run.setup.policy.shape, groups, num_body)


def _trl_arm(options: SimpleNamespace, directory: Path, num_body: int, emit: Emit) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    for mix in options.mixes:
        # The first steps of those that ours are measured on.
        groups = _groups(options, mix, options.rounds + 1)[: options.trl_rounds * options.pairs]
        _forget_peak()
        failed = None
        try:
            seconds = _trl_seconds(options, directory, groups)
        except torch.OutOfMemoryError:
            failed = "out of memory"  # and outside of this block, where the exception keeps no tensor, it is freed
        if failed is None:
            emit(_record(options, mix, seconds, 1, _peak_gib(), {}, config, groups, num_body))
        else:
            emit(_failed(options, mix, failed))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _trl_seconds(options: SimpleNamespace, directory: Path, groups: Sequence[Any]) -> list[float]:
    """Of a step that is not measured, on the first one's pairs with the longest first, and of the measured ones."""
    from transformers import TrainerCallback

    from benchmarks.against_trl import trl_trainer

    _, batch_size, *switched_on = options.arm.split("+")
    num_pairs = options.pairs
    steps = [
        sorted(groups[start : start + num_pairs], key=lambda group: group.num_stream_tokens(False))
        for start in range(0, len(groups), num_pairs)
    ]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.started)

    settings = {"bf16": not options.tiny, "use_cpu": not torch.cuda.is_available(), **dict.fromkeys(switched_on, True)}
    dtype = "float32" if options.tiny else "bfloat16"
    pairs = [*steps[0][::-1], *(group for step in steps for group in step)]
    trainer = trl_trainer(
        str(directory), pairs, int(batch_size), num_pairs, len(steps) + 1, directory.parent, dtype, **settings
    )
    trainer.add_callback(Clock())
    trainer.train()
    return seconds


def _record(
    options: SimpleNamespace,
    mix: str,
    seconds: list[float],
    num_warm_up: int,
    peak_gib: float,
    kernel_ms: dict[str, float],
    model: Any,
    groups: Sequence[Any],
    num_body: int,
) -> dict[str, Any]:
    """Of an arm, whose model has the sizes `model`; MFU and tokens count what the step has to compute, prompts once."""
    measured = seconds[num_warm_up:]
    steps = [groups[n * options.pairs :][: options.pairs] for n in range(len(measured))]
    shape = SimpleNamespace(hidden_size=model.hidden_size, vocab_size=model.vocab_size, num_hidden_layers=options.layers)
    work = [useful_flop(step, shape, num_body, live_reference=True) for step in steps]
    tokens = [sum(group.num_stream_tokens(True) for group in step) for step in steps]
    return {
        "arm": options.arm,
        "size": options.size,
        "mix": mix,
        "device": f"{torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu",
        "seconds": measured,
        "median_seconds": statistics.median(measured),
        "pairs_per_second": statistics.median(options.pairs / taken for taken in measured),
        "tokens_per_second": statistics.median(n / taken for n, taken in zip(tokens, measured, strict=True)),
        "mfu": statistics.median(each / taken / PEAK for each, taken in zip(work, measured, strict=True)),
        "peak_gib": peak_gib,
        "first_seconds": seconds[0],
        "kernel_ms": kernel_ms,
    }


def _failed(options: SimpleNamespace, mix: str, why: str) -> dict[str, Any]:
    return {"arm": options.arm, "size": options.size, "mix": mix, "failed": why}


def _profiled(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a step's kernels, by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        _wait()
    kernel_ms: Counter[str] = Counter()
    for event in profile.key_averages():
        if event.self_device_time_total:
            kernel_ms[kind_of(event.key)] += event.self_device_time_total / 1000
            print(f"{event.self_device_time_total / 1000:9.1f} ms {event.count:6} {kind_of(event.key):20} {event.key[:110]}")
    return dict(kernel_ms)


def kind_of(name: str) -> str:
    """Which of KINDS a kernel is, or "other"."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def main(argument: str) -> None:
    point = json.loads(argument)
    torch.set_num_threads(point["threads"])

    def emit(record: dict[str, Any]) -> None:
        with open(point["out"], "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    measure(point, emit)


if __name__ == "__main__":
    main(sys.argv[1])
