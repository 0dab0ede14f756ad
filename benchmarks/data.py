"""The way of the data, from rows to micro-batches: tokenising, packing, balance, waiting.

* Tokenising: the whole of it (rows read, recognised, tokenised, cut at the boundary, put into the store's arrays) against
  the tokenizer's own batch call on the same texts, both on one thread, in turns; as text, and as conversations (against
  its own calls to render them all and to tokenise them).
* From the store on disk to micro-batches: pairs a second of a whole epoch.
* Packing a million groups; share of micro-batches that is filled; how even the replicas' work is.
* Training steps: how long they wait for their data, with it made ahead and in the step itself, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, median_ratio, print_table

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.material import preference_file

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        report["data"] = preference_file(directory)[1]
        report["tokenising"], stores = _tokenising(directory, options)
        report["micro_batches"] = [_micro_batches(what, store, options) for what, store in stores.items()]
        report["packing"] = [_packing_a_million(what, store, options) for what, store in stores.items()]
        report["filled"] = [line for what, store in stores.items() for line in _filled(what, store, options)]
        report["balance"] = [line for what, store in stores.items() for line in _balance(what, store, options)]
        report["waiting"] = _waiting(directory, options)
    _print(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=7, vocabulary=8192, tiny=False)
    parser.add_argument("--rows", type=int, help="tokenise so many rows only")
    parser.add_argument("--groups", type=int, default=1_000_000, help="groups packed at once")
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs of the epoch that is made into micro-batches")
    parser.add_argument("--pairs-per-step", type=int, default=64)
    parser.add_argument("--capacities", type=int, nargs="+", default=[8192, 16384], help="tokens a micro-batch")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.set_defaults(threads=1)


def _tokenising(directory: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows a second of both arms and their ratio; and the stores that the other measurements read, by name."""
    import itertools
    import json

    from benchmarks.material import MIXES, preference_file, save_tokenizer, synthetic_groups
    from megadpo.config.sources import parse_sources
    from megadpo.data.rows.dataset import TokeniseJob, make_groups
    from megadpo.data.rows.sources import iter_rows
    from megadpo.data.store import GroupStore

    rows, _ = preference_file(directory)
    texts = [row for _, row in itertools.islice(iter_rows(parse_sources(str(rows), {})[0]), options.rows)]
    as_text, as_chat = directory / "text.jsonl", directory / "chat.jsonl"
    for file, written in ((as_text, texts), (as_chat, map(_as_messages, texts))):
        file.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    save_tokenizer(directory / "model", as_text, options.vocabulary)
    lines, store = [], None
    for what, file, template in (("text", as_text, None), ("conversations", as_chat, CHATML)):
        job = TokeniseJob(str(directory / "model"), template, None, "prompt_left")
        sources = parse_sources(str(file), {})
        made = make_groups(sources, job, 1)[0]
        store = store or made
        lines.append(_compared_with_the_tokenizer(what, sources, job, options.rounds))
    assert store is not None
    store.save(directory / "store")
    mixes = {name: GroupStore.of(synthetic_groups(name, 3000, options.vocabulary)) for name in MIXES}
    return lines, {"hh-rlhf": GroupStore.load(directory / "store"), **mixes}


def _as_messages(row: dict[str, str]) -> dict[str, Any]:
    def turns(text: str) -> list[dict[str, str]]:
        parts = text.replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]
        return [{"role": ("user", "assistant")[n % 2], "content": part.strip() or "…"} for n, part in enumerate(parts)]

    return {side: turns(row[side]) for side in ("chosen", "rejected")}


def _compared_with_the_tokenizer(what: str, sources: Any, job: Any, num_rounds: int) -> dict[str, Any]:
    """Every round of both arms in a process of its own, as the workers of a run are: many texts tokenised before leave
    their memory in pieces, in which an arm that makes and frees as it goes along is slower than one that holds all."""
    from megadpo.data.rows.sources import iter_rows

    seconds: dict[str, list[float]] = {"tokenizer": [], "megadpo": []}
    for _ in range(num_rounds):
        seconds["tokenizer"].append(_in_a_new_process(_seconds_of_the_tokenizer, sources, job))
        seconds["megadpo"].append(_in_a_new_process(_seconds_of_make_groups, sources, job))
    num_rows = sum(1 for source in sources for _ in iter_rows(source))
    return {
        "rows": what,
        "num_rows": num_rows,
        "seconds": seconds,
        "tokenizer_rows_per_second": num_rows / statistics.median(seconds["tokenizer"]),
        "rows_per_second": num_rows / statistics.median(seconds["megadpo"]),
        "speed_ratio": median_ratio(seconds["tokenizer"], seconds["megadpo"]),
    }


def _in_a_new_process(function: Callable[..., float], *arguments: Any) -> float:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _seconds_of_the_tokenizer(sources: Any, job: Any) -> float:
    """Its own calls for many texts: one for all of them; of conversations, one each to render all prompts and all wholes."""
    from megadpo.data.rows import tokenise

    tokenizer, rows = _warmed_up(sources, job)
    if job.chat_template is None:
        texts = [text for location, row in rows for text in tokenise._texts_of(row, tokenizer, location)]
        started = time.perf_counter()
        tokenizer(texts)
        return time.perf_counter() - started
    chats = [chat for location, row in rows for chat in tokenise._conversations_of(row, tokenizer, location)]
    prompts, wholes = ([chat.messages for chat in chats if chat.is_prompt == is_prompt] for is_prompt in (True, False))
    started = time.perf_counter()
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    texts += tokenizer.apply_chat_template(wholes, tokenize=False)
    tokenizer(texts, add_special_tokens=False)
    return time.perf_counter() - started


def _seconds_of_make_groups(sources: Any, job: Any) -> float:
    """Without those to load the tokenizer, which a run does once."""
    from megadpo.data.rows.dataset import make_groups
    from megadpo.data.rows.tokenise import load_tokenizer

    _warmed_up(sources, job)
    started = time.perf_counter()
    load_tokenizer(job.tokenizer_path, job.chat_template)
    loaded = time.perf_counter()
    make_groups(sources, job, 1)
    return time.perf_counter() - loaded - (loaded - started)


def _warmed_up(sources: Any, job: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """The tokenizer and the rows that are kept, of which a few were tokenised: everything is imported."""
    from megadpo.data.rows.formats import recognise
    from megadpo.data.rows.sources import iter_rows
    from megadpo.data.rows.tokenise import load_tokenizer, tokenise_rows

    tokenizer = load_tokenizer(job.tokenizer_path, job.chat_template)
    rows = [(location, recognise(row, location)) for source in sources for location, row in iter_rows(source)]
    kept = [(location, row) for location, row in rows if row.reason_to_drop() is None]
    tokenise_rows(kept[:20], tokenizer)
    return tokenizer, kept


def _packing_of(store: Any, capacity: int, num_replicas: int) -> Any:
    from benchmarks.material import BODY
    from megadpo.data.batches.packed_dataset import PackedDataset, PackingOptions

    return PackedDataset.of(
        store,
        PackingOptions(
            tokens_per_micro_batch=capacity,
            setting="--capacities",
            num_data_parallel=num_replicas,
            hidden_size=BODY["hidden_size"],
            head_work=0.2,
        ),
    )


def _micro_batches(what: str, store: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Pairs a second from the store to micro-batches, epoch after epoch until so many pairs were seen."""
    from megadpo.data.batches.sampler import StepSampler

    packing = _packing_of(store, options.capacities[0], 1)
    batches = StepSampler(store.sources, store.source_weights, options.pairs_per_step, seed=1)
    num_steps = max(options.pairs // options.pairs_per_step, 1)
    rates = []
    for _ in range(max(options.rounds // 2, 1)):
        started = time.perf_counter()
        for step in range(num_steps):
            packing.micro_batches(batches.group_ids(step), 0)
        rates.append(num_steps * options.pairs_per_step / (time.perf_counter() - started))
    tokens = float(packing.num_tokens_G.mean())
    return {"data": what, "tokens_per_pair": tokens, "pairs_per_second": statistics.median(rates), "all": rates}


def _packing_a_million(what: str, store: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One best-fit packing of very many groups, and composing the steps of an epoch of as many."""
    import numpy as np

    from megadpo.data.batches.bin_packing import best_fit_decreasing
    from megadpo.data.batches.sampler import StepSampler

    lengths_G = store.num_tokens(True)[np.random.default_rng(3).integers(0, len(store), options.groups)]
    line: dict[str, Any] = {"data": what, "groups": options.groups}
    for capacity in options.capacities:
        started = time.perf_counter()
        bins = best_fit_decreasing(lengths_G, capacity)
        line[f"seconds_{capacity}"] = time.perf_counter() - started
        line[f"filled_{capacity}"] = float(lengths_G.sum() / (capacity * len(bins)))
    started = time.perf_counter()
    multiple = options.capacities[0]
    batches = StepSampler(len(lengths_G), (1.0,), options.pairs_per_step, 1, True, 1.0, lengths_G, multiple)
    assert batches.num_steps is not None
    seen = np.concatenate([batches.group_ids(step) for step in range(batches.num_steps)])
    line["composing_seconds"] = time.perf_counter() - started
    assert (np.bincount(seen, minlength=len(lengths_G)) == 1).all()
    return line


def _filled(what: str, store: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of the micro-batches' tokens that is filled: 128 steps as drawn, and composed.

    Their pairs are drawn from the store's with replacement, so that every data set is long enough.
    """
    import numpy as np

    from megadpo.data.batches.sampler import StepSampler

    lines = []
    for capacity in options.capacities:
        packing = _packing_of(store, capacity, 1)
        for size in (options.pairs_per_step, 4 * options.pairs_per_step):
            drawn_G = np.random.default_rng(5).integers(0, len(store), 128 * size)
            lengths_G = packing.num_tokens_G[drawn_G]
            line: dict[str, Any] = {"data": what, "capacity": capacity, "pairs_per_step": size}
            mean = float(lengths_G.mean()) * size
            for name, multiple in (("drawn", None), ("composed", capacity)):
                if multiple is not None and mean < multiple:
                    line[name] = None
                    continue
                batches = StepSampler(len(drawn_G), (1.0,), size, 1, False, 1.0, lengths_G, multiple)
                plans = [_plan(packing, drawn_G[batches.group_ids(step)])[0] for step in range(128)]
                line[name] = float(lengths_G.sum() / (sum(len(plan[0]) for plan in plans) * capacity))
            lines.append(line | {"capacities_a_step": mean / capacity})
    return lines


def _plan(packing: Any, numbers: Any) -> tuple[Any, int]:
    from megadpo.data.batches.bin_packing import pack_micro_batches

    tokens_N = packing.num_tokens_G[numbers]
    setup = pack_micro_batches(
        tokens_N, packing.costs_G[numbers], packing.options.tokens_per_micro_batch, packing.options.num_data_parallel
    )
    return setup, int(tokens_N.sum())


def _balance(what: str, store: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Dearest replica over the mean one, by modelled cost: of a step, and of the micro-batches that run at one time."""
    import numpy as np

    from megadpo.data.batches.sampler import StepSampler

    lines = []
    for num_replicas in options.replicas:
        packing = _packing_of(store, options.capacities[0], num_replicas)
        size = options.pairs_per_step * num_replicas
        multiple = options.capacities[0] * num_replicas
        fits = float(packing.num_tokens_G.mean()) * size >= multiple and len(store) >= 2 * size
        batches = StepSampler(
            store.sources,
            store.source_weights,
            size,
            1,
            True,
            None,
            packing.num_tokens_G,
            multiple if fits else None,
        )
        of_steps, of_slots = [], []
        for step in range(max(len(store) // size, 1)):
            numbers = batches.group_ids(step)
            costs = packing.costs_G[numbers]
            setup = np.array([[costs[members].sum() for members in replica] for replica in _plan(packing, numbers)[0]])
            of_steps.append(float(setup.sum(1).max() / setup.sum(1).mean()))
            of_slots.append(float((setup.max(0) / setup.mean(0)).mean()))
        lines.append(
            {
                "data": what,
                "replicas": num_replicas,
                "pairs_per_step": size,
                "composed": fits,
                "mean": statistics.mean(of_steps),
                "worst": max(of_steps),
                "at_one_time": statistics.mean(of_slots),
            }
        )
    return lines


def _waiting(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds that steps of the trainer wait for their data."""
    from benchmarks.runs import prepared_setup
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    setup, _ = prepared_setup(directory / "run", options.vocabulary, options.tiny, options.pairs_per_step // 4, 4096)
    waited: dict[str, list[float]] = {"made ahead": [], "made in the step": []}
    seconds: dict[str, list[float]] = {name: [] for name in waited}
    with joined_world(setup.layout, setup.config.train.seed):
        run = build(setup, Callbacks())
        try:
            for number in range(options.rounds + 1):
                # A step that does not come after the last one has its data made when it is asked for.
                for name, step in (("made in the step", 4 * number), ("made ahead", 4 * number + 1)):
                    record = training_step(run, step)
                    if number:
                        waited[name].append(record["data_wait_seconds"])
                        seconds[name].append(record["step_seconds"])
        finally:
            run.close()
    return {"waited": waited, "step_seconds": seconds, "pairs_per_step": options.pairs_per_step // 4}


def _print(report: dict[str, Any]) -> None:
    print(report["data"])
    print_table(
        "Tokenising on one thread: rows a second, median ratio of speeds",
        ["rows", "count", "tokenizer's batch call", "megadpo", "ratio"],
        [
            [t["rows"], t["num_rows"], t["tokenizer_rows_per_second"], t["rows_per_second"], t["speed_ratio"]]
            for t in report["tokenising"]
        ],
    )
    print_table(
        "From the store to micro-batches",
        ["data", "tokens a pair", "pairs a second"],
        [[m["data"], m["tokens_per_pair"], m["pairs_per_second"]] for m in report["micro_batches"]],
    )
    for line in report["packing"]:
        print_table(
            f"Packing {line['groups']:,} groups, {line['data']}",
            ["what", "figure"],
            [[name, value] for name, value in line.items() if name not in ("data", "groups")],
        )
    print_table(
        "Share of the micro-batches that is filled over an epoch",
        ["data", "capacity", "pairs a step", "capacities a step", "steps as drawn", "steps composed"],
        [
            [
                f["data"],
                f["capacity"],
                f["pairs_per_step"],
                f["capacities_a_step"],
                f"{f['drawn']:.4f}",
                "a step is shorter" if f["composed"] is None else f"{f['composed']:.4f}",
            ]
            for f in report["filled"]
        ],
    )
    print_table(
        "Dearest replica over the mean one, modelled cost",
        ["data", "replicas", "pairs a step", "composed", "mean of the steps", "worst step", "micro-batches at one time"],
        [
            [b["data"], b["replicas"], b["pairs_per_step"], str(b["composed"])]
            + [f"{b[name]:.4f}" for name in ("mean", "worst", "at_one_time")]
            for b in report["balance"]
        ],
    )
    waiting = report["waiting"]
    rows = []
    for name, waits in waiting["waited"].items():
        step_seconds = statistics.median(waiting["step_seconds"][name])
        rows.append([name, 1e3 * statistics.median(waits), 1e3 * max(waits), 1e3 * step_seconds])
    print_table(
        f"Milliseconds that a step of {waiting['pairs_per_step']} pairs waits for its data",
        ["data", "median wait", "longest wait", "median step"],
        rows,
    )
