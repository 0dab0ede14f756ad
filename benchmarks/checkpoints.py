"""What saves and loads of checkpoints cost: hashed against not, behind the step loop against in it.

A real run's state (weights and both moments, fp32) is saved and loaded in turns by the trainer's own functions, on one
process.

Save: seconds in the step loop of a save in it, of the same without hashes (in this benchmark only: a save always hashes),
and of a save behind the loop, which is waited for before the next one begins; seconds of a core that the hashes of a save
take, beside its writing; a training step beside such a save against one alone.

Load: seconds until the run can go on, with every byte verified and without (`checkpoint.verify: false`), once with the
files in the page cache, once after the kernel was told to drop them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, median_ratio, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=7, warm_up=1, pairs=1, capacity=2048, vocabulary=8000, tiny=False)
    parser.add_argument("--directory", metavar="DIR", help="on the disk to measure (default: the system's temporary one)")


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from benchmarks.runs import prepared_setup
    from megadpo.parallel.world import joined_world
    from megadpo.training.run import Callbacks
    from megadpo.training.trainer import build, training_step

    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        setup, about = prepared_setup(Path(directory), options.vocabulary, options.tiny, options.pairs, options.capacity)
        with joined_world(setup.layout, 0):
            run_ = build(setup, Callbacks())
            training_step(run_, 0)  # before the first there are no moments
            report["model"] = about
            report["save"] = _saves(run_, options)
            report["load"] = _loads(run_, options)
            run_.close()
    _print(report)


def _saves(run: Any, options: argparse.Namespace) -> dict[str, Any]:
    from megadpo.checkpoint import tensor_file
    from megadpo.checkpoint.integrity import FileRecord, Hasher
    from megadpo.training.run_state import save
    from megadpo.training.trainer import training_step

    class NoHash(Hasher):
        def update(self, block: Any) -> None:
            self._size += len(block)

        def record(self) -> FileRecord:
            return FileRecord(self._size, "0" * 32)

    chosen = dataclasses.replace(run.setup.config.checkpoint, keep=1)
    savers = {
        behind: dataclasses.replace(run.saver, options=dataclasses.replace(chosen, asynchronous=behind))
        for behind in (False, True)
    }

    class Timed(Hasher):
        def update(self, block: Any) -> None:
            started = time.thread_time()
            super().update(block)
            hashing[-1] += time.thread_time() - started

    hashing: list[float] = []
    seconds: dict[str, list[float]] = {}
    steps = iter(range(1, 1_000_000))

    def timed(name: str, number: int, act: Callable[[], Any]) -> None:
        started = time.perf_counter()
        act()
        if number >= 0:
            seconds.setdefault(name, []).append(time.perf_counter() - started)

    for number in range(-options.warm_up, options.rounds):
        run.saver = savers[False]
        hashing.append(0.0)
        arms = [("in the loop", Timed), ("in the loop, without hashes", NoHash)]
        for name, hasher in arms if number % 2 else arms[::-1]:
            tensor_file.Hasher = hasher  # type: ignore[misc]
            timed(name, number, lambda: save(run, next(steps)))
        tensor_file.Hasher = Hasher  # type: ignore[misc]
        run.saver = savers[True]
        timed("behind the loop", number, lambda: save(run, next(steps)))
        timed("behind the loop, until it is written", number, run.saver.finish)
        timed("step", number, lambda: training_step(run, 1))
        save(run, next(steps))
        timed("step beside a save", number, lambda: training_step(run, 1))
        run.saver.finish()
    savers[True].close()
    run.saver = savers[False]
    newest = max((run.setup.output_dir / "checkpoints").iterdir())
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    seconds["hashing, of a core"] = hashing[options.warm_up :]
    return {"bytes": num_bytes, "seconds": seconds}


def _loads(run: Any, options: argparse.Namespace) -> dict[str, Any]:
    from megadpo.training.resume import find_checkpoint, settle_checkpoint
    from megadpo.training.run_state import resume

    own = dataclasses.replace(run.setup.search, num_steps=1_000_000)
    searches = {verify: dataclasses.replace(own, verify=verify) for verify in (True, False)}
    seconds: dict[str, list[float]] = {}
    newest = max((run.setup.output_dir / "checkpoints").iterdir())
    for number in range(-options.warm_up, options.rounds):
        for cached in (True, False):
            for verify, search in searches.items():
                if not cached:
                    _drop(newest)
                started = time.perf_counter()
                origin = settle_checkpoint(search, find_checkpoint(search))
                run.setup = dataclasses.replace(run.setup, search=search, origin=origin)
                resume(run)
                if number >= 0:
                    name = (
                        f"{'verified' if verify else 'not verified'}, {'in the page cache' if cached else 'from the disk'}"
                    )
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {"seconds": seconds}


def _drop(directory: Path) -> None:
    """Tell the kernel to keep none of the files in its cache."""
    for path in directory.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _print(report: dict[str, Any]) -> None:
    saves, loads = report["save"]["seconds"], report["load"]["seconds"]
    ratios = {
        "save in the loop / without hashes": median_ratio(saves["in the loop"], saves["in the loop, without hashes"]),
        "hashing, of a core / save in the loop": median_ratio(saves["hashing, of a core"], saves["in the loop"]),
        "stall: behind / in the loop": median_ratio(saves["behind the loop"], saves["in the loop"]),
        "step beside a save / alone": median_ratio(saves["step beside a save"], saves["step"]),
        **{
            f"load {where}: verified / not": median_ratio(loads[f"verified, {where}"], loads[f"not verified, {where}"])
            for where in ("in the page cache", "from the disk")
        },
    }
    report["ratios"] = ratios
    mib = report["save"]["bytes"] / 2**20
    rows = [[name, statistics.median(values), min(values), max(values)] for name, values in {**saves, **loads}.items()]
    print_table(f"A checkpoint of {mib:,.0f} MiB", ["seconds of", "median", "least", "most"], rows)
    print_table("Medians of the ratio within a round", ["what", "ratio"], list(ratios.items()))
