"""Every recipe of examples/ on real preference data with a small model, on a CPU, in a minute or two:

    python examples/real_data/run.py --data DATA_DIRECTORY --output runs/real-1

DATA_DIRECTORY holds the files that rows.py names (default: $MEGADPO_TEST_DATA, else shared/data beside this project). A
small Llama with random weights is fine-tuned on the good answers of all of them; then preferences are trained with DPO
(hh-rlhf, and Chinese conversations), KTO (labelled answers), Plackett-Luce (ranked lists) and as a reward model; ORPO
starts from the random weights. Each is one `megadpo train` with a recipe that you can copy.

What is shown is that each run learns its training rows. A model this small, with so few rows, learns little that holds
for others: --passes, --rows and a real model are for that.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rows import FILES, data_sets, read_rows, texts_of, write_rows

EXAMPLES = Path(__file__).resolve().parents[1]
BATCH = 8
FEWEST_ROWS = 32
NUM_HELD_OUT = 16


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        file: the recipe under examples/.
        rows: what it is trained on: ROWS.train.jsonl.
        start: the model that it starts from, a directory under the output.
        settings: what it changes beyond what all of these runs do.
        num_processes: how many it runs on; without parallel.tensor or parallel.pipeline they share the batch.
        metrics: what tells that it learns: the loss falls, the others rise.
    """

    file: str
    rows: str
    start: str = "sft/hf"
    settings: dict[str, Any] = field(default_factory=dict)
    num_processes: int = 1
    metrics: tuple[str, ...] = ("loss", "rewards/accuracies", "rewards/margins")

    @property
    def source(self) -> str:
        """The data file that the rows come from; of the answers: those of all other recipes."""
        return {"lists": "hh", "answers": ""}.get(self.rows, self.rows)


RECIPES = {
    "sft": Recipe("sft.yaml", "answers", "start", {"train.learning_rate": 3e-3}, metrics=("loss", "mean_token_accuracy")),
    "dpo": Recipe("dpo.yaml", "hh", settings={"parallel.tensor": 2}, num_processes=2),
    "dpo_zh": Recipe("dpo.yaml", "zh"),
    "kto": Recipe(
        "kto.yaml",
        "kto",
        settings={"train.pairs_per_step": 16, "objective.desirable_weight": 0.8},  # enough for both labels in each step
        num_processes=2,
        metrics=("loss", "rewards/margins"),
    ),
    "orpo": Recipe("orpo.yaml", "hh", "start", {"train.learning_rate": 3e-3}),
    "listwise": Recipe("listwise.yaml", "lists"),
    "reward": Recipe("reward.yaml", "hh"),
}


def main() -> None:
    started = time.perf_counter()
    options = read_options()
    from small_model import save_small_model  # after the options: torch and transformers take seconds to import
    from transformers.utils.logging import disable_progress_bar

    output: Path = options.output.resolve()
    (output / "data").mkdir(parents=True, exist_ok=True)
    disable_progress_bar()

    say(f"Rows of {', '.join(FILES[source] for source in options.sources)}")
    rows = {source: read_rows(options.data, source) for source in options.sources}
    sets = data_sets(rows, options.rows, NUM_HELD_OUT)
    for name, set_rows in sets.items():
        write_rows(set_rows, output / "data" / f"{name}.jsonl")
        print(f"  {name}: {len(set_rows)} rows")

    say("A small Llama with random weights, and a tokenizer of the training rows")
    save_small_model(output / "start", (text for name in rows for text in texts_of(sets[f"{name}.train"])), options.seed)

    for name in options.recipes:
        recipe = RECIPES[name]
        say(f"{name}: {recipe.file}, {recipe.rows}.train.jsonl, starting from {recipe.start}")
        train(name, recipe, output, len(sets[f"{recipe.rows}.train"]), options)

    say("Mean of the first and of the last pass over the training rows; held-out rows after the first and the last pass")
    print_table(options.recipes, output)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Metrics and models: {output}/RECIPE/metrics.jsonl, hf/")


def read_options() -> argparse.Namespace:
    default = os.environ.get("MEGADPO_TEST_DATA") or EXAMPLES.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(default), help=f"directory of the rows (default {default})")
    parser.add_argument("--output", type=Path, help="directory for all it makes (default: the next free runs/real-N)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all, in this order")
    parser.add_argument(
        "--rows", type=int, default=48, help=f"training rows of each file, at least {FEWEST_ROWS}; default 48"
    )
    parser.add_argument("--passes", type=int, default=5, help="over the training rows, at least 2; default 5")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `megadpo` below is not left behind
    options.recipes = [name for name in RECIPES if name in options.recipes or name == "sft"]  # most start from sft
    options.sources = list(dict.fromkeys(source for name in options.recipes if (source := RECIPES[name].source)))
    options.sources = options.sources or list(FILES)
    missing = [FILES[source] for source in options.sources if not (options.data / FILES[source]).is_file()]
    if missing:
        parser.error(
            f"{options.data} has no {', '.join(missing)}; name the directory with --data or $MEGADPO_TEST_DATA "
            "(rows.py says where the files are from), or fewer --recipes"
        )
    if options.rows < FEWEST_ROWS or options.passes < 2:
        parser.error(f"--rows must be at least {FEWEST_ROWS} and --passes at least 2")
    if options.output is None:
        options.output = next(path for n in count(1) if not (path := Path(f"runs/real-{n}")).exists())
    if (options.output / "sft").exists():
        parser.error(f"{options.output} holds such runs already: remove it, or choose another --output")
    return options


def train(name: str, recipe: Recipe, output: Path, num_rows: int, options: argparse.Namespace) -> None:
    """One recipe with the command line; ends with its status if it fails, after its own words."""
    values: dict[str, Any] = {
        "model.path": output / recipe.start,
        "model.dtype": "fp32",
        "data.train": output / "data" / f"{recipe.rows}.train.jsonl",
        "data.eval": output / "data" / f"{recipe.rows}.held_out.jsonl",
        "data.num_workers": 1,
        "data.cache_dir": output / "cache",
        "output_dir": output / name,
        "train.epochs": None,
        "train.pairs_per_step": BATCH,
        "train.learning_rate": 5e-4,  # so small a model needs far more than a real one
        "train.warmup_steps": 2,
        "train.seed": options.seed,
        **recipe.settings,
    }
    steps_per_pass = num_rows // values["train.pairs_per_step"]
    values |= {"train.steps": options.passes * steps_per_pass, "eval.every": steps_per_pass}
    settings = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]  # a JSON text is a YAML text
    command = ["train", f"examples/{recipe.file}", *settings, "--nproc", str(recipe.num_processes)]
    print("  $ megadpo " + shlex.join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes on what may be two cores
    process = subprocess.Popen([sys.executable, "-m", "megadpo", *command], env=environment, cwd=EXAMPLES.parent)
    try:
        status = process.wait()
    finally:
        process.terminate()  # nothing if it has ended; what it started goes with it
    if status:
        sys.exit(status)


def print_table(names: list[str], output: Path) -> None:
    """A line a recipe and metric: first and last pass, in training and held out."""
    print(f"  {'recipe':10}{'metric':22}{'first pass':>12}{'last pass':>12}{'held-out, first':>18}{'last':>10}")
    for name in names:
        records = read_metrics(output / name)
        evaluated = [number + 1 for number, record in enumerate(records) if "eval_loss" in record]
        first, last = records[: evaluated[0]], records[evaluated[-2] : evaluated[-1]]
        for metric in RECIPES[name].metrics:
            means = [sum(record[metric] for record in records) / len(records) for records in (first, last)]
            held_out = [records[-1][f"eval_{metric}"] for records in (first, last)]
            print(f"  {name:10}{metric:22}{means[0]:12.3f}{means[1]:12.3f}{held_out[0]:18.3f}{held_out[1]:10.3f}")


def read_metrics(run_directory: Path) -> list[dict[str, float]]:
    """A record a step."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def say(sentence: str) -> None:
    print(f"\n{sentence}", flush=True)


if __name__ == "__main__":
    main()
