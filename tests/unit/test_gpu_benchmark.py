"""`benchmarks gpu`: what it tries in which order, within its time, and what it makes of what came out."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import TRL_ARMS, best_of, draw, joined, turns

MIXES = ["UltraFeedback-like", "hh-rlhf-like"]


def options(*arms: str, sizes: tuple[str, ...] = ("1.7B",), **changes: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    gpu.add_arguments(parser)
    parsed = parser.parse_args(["--arms", *arms, "--mixes", *MIXES, "--sizes", *sizes])
    return argparse.Namespace(**vars(parsed) | changes)


def record(arm: str, mix: str = MIXES[0], size: str = "1.7B", pairs: float = 8.0, **more: Any) -> dict[str, Any]:
    figures = {"pairs_per_second": pairs, "tokens_per_second": 1.0, "mfu": 0.4, "median_seconds": 64 / pairs}
    return {"arm": arm, "size": size, "mix": mix, "seconds": [64 / pairs], "kernel_ms": {}} | figures | more


def failed(arm: str, mix: str, why: str = "out of memory") -> dict[str, Any]:
    return {"arm": arm, "size": "1.7B", "mix": mix, "failed": why}


def tried(
    chosen: argparse.Namespace, records: list[dict[str, Any]], seconds: float = 1000
) -> list[tuple[str, str, list[str]]]:
    return [(arm, size, mixes) for arm, size, mixes, _ in turns(chosen, records, time.monotonic() + seconds)]


def test_ours_are_tried_first_and_last_and_of_trl_s_every_one_the_promising_first(monkeypatch):
    monkeypatch.setattr(gpu, "_missing", lambda arm: None)
    found = tried(options("auto+auto", "trl", sizes=("1.7B", "0.6B")), [])
    assert found[:2] == found[-2:] == [("auto+auto", "1.7B", MIXES), ("auto+auto", "0.6B", MIXES)]
    assert [arm for arm, size, _ in found[2:-2] if size == "1.7B"] == TRL_ARMS
    assert TRL_ARMS[0] == "trl+16+gradient_checkpointing+use_liger_kernel" and len(set(TRL_ARMS)) == len(TRL_ARMS) == 44
    assert tried(options("auto+auto"), []) == [("auto+auto", "1.7B", MIXES)]
    assert [arm for arm, *_ in tried(options("auto+auto", "trl+2", turns=1), [])] == ["auto+auto", "trl+2"]


def test_what_is_not_installed_is_left_out_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    wanted = ["trl+2+use_liger_kernel", "trl+2+padding_free", "trl+2"]
    assert [arm for arm, *_ in tried(options(*wanted), [])] == ["trl+2"]
    assert capsys.readouterr().out.splitlines() == [
        "trl+2+use_liger_kernel: left out, Liger is not installed",
        "trl+2+padding_free: left out, flash-attn is not installed",
    ]


def test_more_pairs_with_less_that_saves_memory_are_not_tried_after_one_ran_out_of_it(monkeypatch):
    monkeypatch.setattr(gpu, "_missing", lambda arm: None)
    arms = ["trl+2", "trl+4", "trl+4+use_liger_kernel", "trl+8+use_liger_kernel", "trl+2+gradient_checkpointing"]
    records = [failed("trl+4+use_liger_kernel", MIXES[0])]
    assert tried(options(*arms), records) == [
        ("trl+2", "1.7B", MIXES),
        ("trl+4", "1.7B", MIXES[1:]),
        ("trl+4+use_liger_kernel", "1.7B", MIXES[1:]),
        ("trl+8+use_liger_kernel", "1.7B", MIXES[1:]),
        ("trl+2+gradient_checkpointing", "1.7B", MIXES),
    ]
    records.append(failed("trl+2", MIXES[1], "not ended when the time was over"))
    assert ("trl+2", "1.7B", MIXES) in tried(options(*arms), records)


def test_when_the_time_is_over_nothing_is_tried_and_trl_s_leave_time_for_ours():
    assert tried(options("auto+auto", "trl+2"), [], seconds=-1) == []
    seconds = 1000.0
    (_, *_, first), (arm, *_, second), *_ = turns(options("auto+auto", "trl+2"), [], time.monotonic() + seconds)
    assert arm == "trl+2" and first == pytest.approx(seconds, abs=5)
    assert second == pytest.approx(seconds - gpu.SPARE_SECONDS, abs=5)


def test_a_process_that_does_not_end_in_time_is_ended_and_what_it_had_written_counts(tmp_path, monkeypatch):
    code = """if True:
        import json, sys, time
        point = json.loads(sys.argv[3])
        open(point["out"], "a").write(json.dumps({"mix": point["mixes"][0], "failed": "out of memory"}) + "\\n")
        time.sleep(60)
    """
    program = tmp_path / "python"
    (tmp_path / "code.py").write_text(code)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/code.py "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(program))
    began = time.monotonic()
    one, other = gpu._in_own_process("trl+2", "1.7B", MIXES, options("trl+2"), tmp_path, 3.0)
    assert time.monotonic() - began < 30
    assert one == {"mix": MIXES[0], "failed": "out of memory"}
    assert other == failed("trl+2", MIXES[1], "not ended when the time was over")


def test_turns_of_an_arm_are_one_record_and_the_best_of_trl_s_is_named():
    records = [
        record("auto+auto", pairs=50.0),
        record("trl+2", pairs=7.0),
        record("trl+8+gradient_checkpointing", pairs=9.0),
        failed("trl+16", MIXES[0]),
        record("auto+auto", pairs=40.0),
        record("trl+2", mix=MIXES[1], pairs=20.0),
    ]
    arms = joined(records)
    assert len(arms) == 5 and arms[0]["pairs_per_second"] == 45.0 and arms[0]["seconds"] == [64 / 50, 64 / 40]
    assert best_of(arms, "1.7B", MIXES[0], is_trl=True)["arm"] == "trl+8+gradient_checkpointing"
    assert best_of(arms, "1.7B", MIXES[0], is_trl=False)["arm"] == "auto+auto"
    assert best_of(arms, "1.7B", MIXES[1], is_trl=False) is None


def test_a_bar_is_drawn_for_every_profiled_step_as_long_as_its_parts(tmp_path: Path):
    path = tmp_path / "split.svg"
    arms = [
        record("auto+auto", pairs=64.0, kernel_ms={"products": 600.0, "attention": 150.0}),
        record("auto+auto", mix=MIXES[1], pairs=128.0, kernel_ms={"products": 400.0, "other": 100.0}),
        record("trl+2"),
    ]
    draw(path, arms)
    text = path.read_text()
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)" height="20"', text)]
    assert len(widths) == 6 and sum(widths[:3]) == pytest.approx(2 * sum(widths[3:]), rel=1e-3)
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-3)
    assert "products: 600 ms" in text and "no kernel: 250 ms" in text and "trl+2" not in text and "hh-rlhf-like" in text
