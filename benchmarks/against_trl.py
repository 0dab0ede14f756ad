"""Seconds of a step against TRL's DPOTrainer on the same pairs, live reference.

TRL runs its own training loop (`trainer.train()`, its own step, optimizer and clipping); between two of its steps the same
pairs go through `megadpo.training.trainer.training_step`. Both hold a live reference, fp32, the same weights at the start.
TRL gets its best micro-batch of those tried, and pairs sorted by length within a step, so that it pads less. Also:
which share of the machine's matrix product our steps use for what they have to compute (benchmarks/flop.py).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import MIXES, add_shared, median_ratio, print_table
from benchmarks.flop import product_peak, useful_flop


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.runs import prepared_setup

    with tempfile.TemporaryDirectory() as directory:
        setup, report["model"] = prepared_setup(
            Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity, max_length=1024
        )
        report["pairs_per_step"] = options.pairs
        report["mixes"] = [
            _mix(setup, report["model"]["body_parameters"], mix, options, Path(directory)) for mix in options.mixes
        ]
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, mixes=MIXES, rounds=3, warm_up=1, pairs=8, capacity=4096, vocabulary=8192, tiny=False)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="TRL's micro-batches, in pairs")


def _mix(setup: Any, num_body: int, mix: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Both arms on one mix of lengths, for each of TRL's batch sizes."""
    from benchmarks.runs import setup_on
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    groups = pairs_of_mix(setup, mix, options.rounds + options.warm_up, options.pairs, options.tiny)
    own_setup = setup_on(setup, groups)
    by_batch_size = {}
    with joined_world(setup.layout, setup.config.train.seed):
        run, peak = build(own_setup, Callbacks()), product_peak()
        for batch_size in options.batch_sizes:
            ours, theirs = _alternate(
                str(setup.policy.path), groups, batch_size, options, directory, lambda step: training_step(run, step)
            )
            by_batch_size[batch_size] = {"megadpo": ours, "trl": theirs, "speedup": median_ratio(theirs, ours)}
        peak = max(peak, product_peak())
    best = min(by_batch_size, key=lambda size: statistics.median(by_batch_size[size]["trl"]))
    starts = range(options.warm_up * options.pairs, len(groups), options.pairs)
    steps = [groups[start : start + options.pairs] for start in starts]
    flop = [useful_flop(step, setup.policy.config, num_body, live_reference=True) for step in steps]
    ours = by_batch_size[best]["megadpo"]
    prompts = [len(group.prompts[0]) for group in groups]
    completions = [len(response) for group in groups for response in group.responses]
    return {
        "mix": mix,
        "mean_prompt_tokens": statistics.mean(prompts),
        "mean_completion_tokens": statistics.mean(completions),
        "by_batch_size": by_batch_size,
        "best_batch_size": best,
        "speedup": by_batch_size[best]["speedup"],
        "product_peak_gflops": peak / 1e9,
        "useful_share_of_peak": statistics.median(work / s / peak for work, s in zip(flop, ours, strict=True)),
    }


def pairs_of_mix(setup: Any, mix: str, num_steps: int, num_pairs: int, tiny: bool) -> list[Any]:
    """As many pairs with a common prompt as the steps need, sorted by length within each step."""
    from benchmarks.material import synthetic_groups

    count = num_steps * num_pairs
    if mix == "hh-rlhf":
        rows = (setup.train.groups[int(row)] for step in range(1000) for row in setup.sampler.group_ids(step))
        most = 150 if tiny else 1024
        usable = (group for group in rows if group.shares_prompt and group.num_stream_tokens(True) <= most)
        groups = [group for group, _ in zip(usable, range(count), strict=False)]
    else:
        groups = synthetic_groups(mix, count, setup.policy.config.vocab_size, shrink=10 if tiny else 1)
    steps = [groups[start : start + num_pairs] for start in range(0, count, num_pairs)]
    return [group for step in steps for group in sorted(step, key=lambda g: g.num_stream_tokens(False))]


def _alternate(
    model: str,
    groups: Sequence[Any],
    batch_size: int,
    options: argparse.Namespace,
    directory: Path,
    our_step: Callable[[int], Any],
) -> tuple[list[float], list[float]]:
    """Seconds of our and of TRL's steps in turns, warm-up left out."""
    from transformers import TrainerCallback

    ours: list[float] = []
    theirs: list[float] = []

    class Turns(TrainerCallback):
        """Clocks each of TRL's steps, and lets ours follow it."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            finished = time.perf_counter()
            theirs.append(finished - self.started)
            our_step(len(ours))
            ours.append(time.perf_counter() - finished)

    trainer = trl_trainer(model, groups, batch_size, options.pairs, options.rounds + options.warm_up, directory)
    trainer.add_callback(Turns())
    trainer.train()
    return ours[options.warm_up :], theirs[options.warm_up :]


def trl_trainer(
    model: str,
    groups: Sequence[Any],
    batch_size: int,
    num_pairs: int,
    num_steps: int,
    directory: Path,
    dtype: str = "float32",
    rank: int = 0,
    **settings: Any,
) -> Any:
    """TRL's trainer on the very token ids of `groups`, with a live reference; on a CPU where `settings` say nothing else.

    Args:
        batch_size: pairs a micro-batch; `num_pairs` a step.
        dtype: of both models.
        rank: of LoRA adapters on every linear layer, which are trained in place of the model; 0: the model is.
        settings: more of DPOConfig's.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class TokenisedTrainer(DPOTrainer):
        """DPOTrainer on rows that are tokenised already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: ids.tolist() for name, ids in zip(names, (group.prompts[0], *group.responses), strict=True)}
        for group in groups
    ]
    common: dict[str, Any] = {
        "output_dir": str(directory / "trl"),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": num_pairs // batch_size,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    arguments = DPOConfig(**common | settings)
    policy, *references = (
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)) for _ in range(1 if rank else 2)
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    others: dict[str, Any] = {"ref_model": references[0]} if references else {}
    if rank:
        import peft

        adapters = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        others["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **adapters)
    return TokenisedTrainer(
        policy, **others, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def _print(report: dict[str, Any]) -> None:
    rows = []
    for mix in report["mixes"]:
        best = mix["by_batch_size"][mix["best_batch_size"]]
        medians = [statistics.median(best[arm]) for arm in ("trl", "megadpo")]
        lengths = [mix["mean_prompt_tokens"], mix["mean_completion_tokens"]]
        others = ", ".join(f"{size}: {entry['speedup']:.2f}" for size, entry in mix["by_batch_size"].items())
        share = mix["useful_share_of_peak"]
        rows.append([mix["mix"], *lengths, mix["best_batch_size"], *medians, mix["speedup"], others, share])
    print_table(
        f"Seconds a step of {report['pairs_per_step']} pairs, Llama with "
        f"{report['model']['body_parameters'] / 1e6:.1f} M body parameters, fp32, live reference; "
        "the ratio is the median over interleaved steps",
        [
            "pairs",
            "prompt",
            "completion",
            "TRL's best batch",
            "TRL",
            "megadpo",
            "TRL / megadpo",
            "at each batch size",
            "useful FLOP / product peak",
        ],
        rows,
    )
