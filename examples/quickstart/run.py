"""From nothing to a model trained on preferences, on a CPU, in a few minutes and without any download:

    python examples/quickstart/run.py --output runs/quickstart-1

It makes preference pairs of a task whose right answers are known (write a word backwards), a tokenizer and a small
Llama, teaches the model until it is right about half the time, trains it with DPO on two processes with
`megadpo train`, and checks the outcome on pairs and prompts that training never saw.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import torch
from small_model import make_model, make_tokenizer, share_right, warm_up
from task import make_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

BETA = 0.5
NUM_PROCESSES = 2


def main() -> None:
    started = time.perf_counter()
    options = read_options()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    torch.set_num_threads(1 if (os.cpu_count() or 1) < 4 else 2)

    say("1. Preference pairs: a word written backwards is chosen, one with a slip is rejected")
    train_rows, held_out_rows = make_rows(options.train_pairs, options.held_out_pairs, options.seed)
    train_file, held_out_file = output / "train.jsonl", output / "held_out.jsonl"
    write_rows(train_rows, train_file)
    write_rows(held_out_rows, held_out_file)
    print("  " + json.dumps(train_rows[0]))
    prompts = held_out_rows[:256]

    say("2. A tokenizer and a small Llama with random weights")
    tokenizer = make_tokenizer(train_rows)
    model = make_model(tokenizer, options.seed)
    print(f"  {len(tokenizer)} tokens, {model.num_parameters():,} parameters")

    say("3. Warm-up: supervised fine-tuning on the chosen answers, stopped about half-way")
    warm_up(model, tokenizer, train_rows, max_steps=options.warm_up_steps, until_right=0.4, seed=options.seed)
    right_before = share_right(model, tokenizer, prompts)
    warm_directory = output / "warmed_up"
    model.save_pretrained(warm_directory)
    tokenizer.save_pretrained(warm_directory)

    say(f"4. DPO on {NUM_PROCESSES} processes, every layer split over both")
    run_directory = output / "dpo"
    config_file = output / "quickstart.yaml"
    config_file.write_text(
        CONFIG.format(
            model=json.dumps(str(warm_directory)),  # a JSON text is a YAML text, whatever the path holds
            train=json.dumps(str(train_file)),
            held_out=json.dumps(str(held_out_file)),
            output=json.dumps(str(run_directory)),
            cache=json.dumps(str(output / "cache")),
            beta=BETA,
            seed=options.seed,
            steps=options.steps,
            warmup_steps=min(10, options.steps - 1),
        ),
        encoding="utf-8",
    )
    megadpo("train", config_file, "--nproc", NUM_PROCESSES)

    say("5. Held-out pairs: how far does the trained model move towards the chosen answers?")
    first, last = first_and_last_record(run_directory)
    accuracy = last["eval_rewards/accuracies"]
    print(f"  margin before the first update (training pairs): {first['rewards/margins']}")
    print(f"  margin after training (held-out pairs): {last['eval_rewards/margins']:.2f}")

    say("6. Held-out prompts: the trained model, loaded in transformers, answers them")
    trained_directory = run_directory / "hf"
    trained = AutoModelForCausalLM.from_pretrained(trained_directory, dtype=torch.float32)
    right_after = share_right(trained, AutoTokenizer.from_pretrained(trained_directory), prompts)
    print(f"  right answers: {right_before:.1%} before DPO, {right_after:.1%} after")

    say(f"Done in {time.perf_counter() - started:.0f} s")
    print(f"  pairs           {train_file}, {held_out_file}")
    print(f"  before DPO      {warm_directory}")
    print(f"  configuration   {config_file}")
    print(f"  metrics         {run_directory / 'metrics.jsonl'}")
    print(f"  trained model   {trained_directory}")
    print(f"held-out reward accuracy: {accuracy:.2f}")


CONFIG = """\
model: {{path: {model}, dtype: fp32}}
data: {{train: {train}, eval: {held_out}, max_length: 64, num_workers: 1, cache_dir: {cache}}}
objective: {{loss_type: sigmoid, beta: {beta}}}
parallel: {{tensor: 2}}
train:
  steps: {steps}
  pairs_per_step: 64
  tokens_per_micro_batch: 4096
  learning_rate: 2.0e-4
  warmup_steps: {warmup_steps}
  seed: {seed}
eval: {{every: 40}}
output_dir: {output}
"""


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="directory for all it makes (default: the next free runs/quickstart-N)")
    parser.add_argument("--seed", type=int, default=0, help="of pairs, weights and batches (default 0)")
    parser.add_argument("--train-pairs", type=int, default=8000, help="default 8000")
    parser.add_argument("--held-out-pairs", type=int, default=512, help="default 512")
    parser.add_argument("--warm-up-steps", type=int, default=400, help="at most; default 400")
    parser.add_argument("--steps", type=int, default=80, help="of DPO; default 80")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `megadpo` below is not left behind
    if options.output is None:
        options.output = next(path for n in count(1) if not (path := Path(f"runs/quickstart-{n}")).exists())
    if (options.output / "dpo").exists():
        parser.error(f"{options.output} holds a quickstart already: remove it, or choose another --output")
    return options


def megadpo(*arguments: object) -> None:
    """Runs a megadpo command; ends with its status if it fails, after its own words."""
    command = [sys.executable, "-m", "megadpo", *map(str, arguments)]
    print("  $ megadpo " + " ".join(command[3:]), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes on what may be two cores
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    finally:
        process.terminate()  # nothing if it has ended; what it started goes with it
    if status:
        sys.exit(status)


def first_and_last_record(run_directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the first step, whose batch is measured before any update, and of the last, with the evaluation."""
    lines = (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[0]), json.loads(lines[-1])


def say(sentence: str) -> None:
    print(f"\n{sentence}", flush=True)


if __name__ == "__main__":
    main()
