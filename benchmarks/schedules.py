"""Idle share of pipeline stages under Megatron's schedules and ours, measured and simulated.

Arms take turns. With a resident reference: Megatron's schedules with the reference's pass before the policy's 1F1B, our
executor in the same order, and our executor with the reference's forwards in the policy's bubbles, some of them a step
ahead, under 1F1B and with weight gradients delayed. Without one: Megatron's 1F1B, ours, and ours with these
delayed. A stage is idle when it is in no operation between the barriers around a step; the share is the mean over stages and
steps. Real models on as many processes as there are cores, one thread each; and, for more stages than cores, operations
that sleep for a known time, which shows the executor alone. Beside each of ours: what the simulator says for the seconds
that were measured in that arm: of each operation, the mean of a message (from the end of an operation to the beginning
of the one that waits for it), and the median between two operations. "Steady" leaves out the first step, which has the
reference of two steps to do, and the last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_shared, print_table
from benchmarks.schedule_point import ARMS, Arm, measure


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    shared = {**vars(options), "chunks": 1}
    points = [{**shared, "operations": "slept", "stages": stages} for stages in options.slept]
    points += [{**shared, "operations": "computed", "stages": stages} for stages in options.computed]
    report["points"] = [_point(point) for point in points]
    for point in report["points"]:
        _print(point)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, rounds=2, hidden=512, layers=4, vocabulary=512)
    parser.add_argument("--slept", type=int, nargs="*", default=[2, 4], help="stages of the points whose operations sleep")
    parser.add_argument("--computed", type=int, nargs="*", default=[2], help="stages of those with real models")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="in a row, of which the first and the last are not steady")
    parser.add_argument("--forward", type=float, default=0.02, help="seconds that a slept forward takes")
    parser.add_argument("--backward", type=float, default=0.04)
    parser.add_argument("--reference", type=float, default=0.02)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.set_defaults(threads=1)


def _point(point: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with tempfile.TemporaryDirectory() as directory:
        paths = [f"{directory}/{rank}.json" for rank in range(point["stages"])]
        processes = [context.Process(target=measure, args=(rank, port, point, path)) for rank, path in enumerate(paths)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed: its own error is above")
        ranks = [json.loads(Path(path).read_text()) for path in paths]
    about = {name: point[name] for name in ("operations", "stages", "micro_batches", "steps")}
    found, base = {}, ""
    for arm in ARMS:
        found[arm.name] = _arm(arm, [rank["records"][arm.name] for rank in ranks], point)
        base = base if arm.is_ours else arm.name
        found[arm.name]["ratio"] = found[arm.name]["steady"] / found[base]["steady"]
        found[arm.name]["seconds_ratio"] = found[arm.name]["steady_seconds"] / found[base]["steady_seconds"]
    return about | {"arms": found}


def _arm(arm: Arm, by_rank: list[list[dict[str, Any]]], point: dict[str, Any]) -> dict[str, Any]:
    """Idle shares of an arm from all its ranks' steps, measured and (of ours) simulated."""
    last = point["steps"] - 1
    steady = [[record for record in records if 0 < record["step"] < last] for records in by_rank]
    found = {
        "all_steps": _idle_share(by_rank),
        "steady": _idle_share(steady),
        "steady_seconds": statistics.median(record["seconds"] for record in steady[0]),
    }
    if not arm.is_ours:
        return found | {"simulated_all_steps": None, "simulated_steady": None}
    message, between = _gaps(by_rank)
    simulated = _simulated(arm, by_rank, message, between, point)
    shares = {
        "simulated_all_steps": _share(simulated),
        "simulated_steady": _share([s for s in simulated if 0 < s[0] < last]),
    }
    costs = [_mean_costs(records) for records in steady]
    return found | shares | {"costs": costs, "message_seconds": message, "seconds_between": between}


def _idle_share(by_rank: list[list[dict[str, Any]]]) -> float:
    return statistics.mean(1 - sum(r["busy"] for r in records) / sum(r["seconds"] for r in records) for records in by_rank)


def _mean_costs(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a stage's operations by kind."""
    by_kind: dict[str, list[float]] = {}
    for record in records:
        for kind, _, begin, end in record["times"]:
            by_kind.setdefault("reference" if kind == "ahead" else kind, []).append(end - begin)
    return {kind: statistics.mean(times) for kind, times in by_kind.items()}


def _gaps(by_rank: list[list[dict[str, Any]]]) -> tuple[float, float]:
    """Mean seconds from the end of an operation to the beginning of one on another stage that waited for it, and the median
    from one to the next on a stage that waited for nobody."""
    from megadpo.pipeline.schedule import Op, source_of

    waited, others = [], []
    for steps in zip(*by_rank, strict=True):
        ends = [{(kind, number): end for kind, number, _, end in record["times"]} for record in steps]
        for stage, record in enumerate(steps):
            for (*_, free), (kind, number, begin, _) in itertools.pairwise(record["times"]):
                source = source_of(stage, Op(kind, number), len(steps), 1)
                made = -math.inf if source is None else ends[source[0]].get((kind, number), -math.inf)
                if made > free:
                    waited.append(begin - made)
                else:
                    others.append(begin - free)
    return statistics.mean(waited or [0.0]), statistics.median(others or [0.0])


def _simulated(
    arm: Arm, by_rank: list[list[dict[str, Any]]], message: float, between: float, point: dict[str, Any]
) -> list[tuple[int, float, float]]:
    """(number in its run, idle share, seconds) of every step; what lies between two operations is idle too."""
    from megadpo.pipeline.fill import policy_schedule, rough_costs, with_reference, with_reference_before
    from megadpo.pipeline.simulate import Costs, simulate

    count, done, steps = point["micro_batches"], None, []
    policy = policy_schedule(point["stages"], count, is_zero_bubble=arm.zero_bubble)
    for records in zip(*by_rank, strict=True):
        step, schedule = records[0]["step"], policy
        if arm.reference == "interleaved":
            ahead = 0 if step == point["steps"] - 1 else count
            costs = rough_costs(is_zero_bubble=arm.zero_bubble)
            schedule, done = with_reference(policy, done if step else None, ahead, costs)
        elif arm.reference == "before":
            schedule = with_reference_before(policy)
        took = [[end - begin + between for *_, begin, end in record["times"]] for record in records]
        seconds = simulate(schedule, Costs(message=max(0.0, message - between)), took).seconds
        busy = statistics.mean(record["busy"] for record in records)
        steps.append((step, 1 - busy / seconds, seconds))
    return steps


def _share(steps: list[tuple[int, float, float]]) -> float:
    return sum(share * seconds for _, share, seconds in steps) / sum(seconds for *_, seconds in steps)


def _print(point: dict[str, Any]) -> None:
    what = "that sleep" if point["operations"] == "slept" else "of real models"
    columns = ["arm", "idle, steady", "simulated", "idle, all steps", "simulated", "idle ratio", "step, s", "time ratio"]
    names = ("steady", "simulated_steady", "all_steps", "simulated_all_steps", "ratio", "steady_seconds", "seconds_ratio")
    rows = [[name, *(arm[key] for key in names)] for name, arm in point["arms"].items()]
    sizes = f"{point['stages']} stages, {point['micro_batches']} micro-batches a step, {point['steps']} steps"
    print_table(f"Operations {what}, {sizes}", columns, rows)
