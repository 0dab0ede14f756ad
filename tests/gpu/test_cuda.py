"""What only a GPU can show; skipped without one. One GPU is enough: a world of one rank over NCCL."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.gpu.machine import on
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model, write_hh
from tests.parity.optimizer_worker import stepped
from tests.parity.worker import Case, Outcome, outcomes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FP32, BF16 = pytest.mark.xdist_group("fp32"), pytest.mark.xdist_group("bf16")
"""Tests of a group share a warm process, in which FlexAttention, the one for fp32, compiles its variants once."""

DTYPES = [pytest.param(torch.float32, id="fp32", marks=FP32), pytest.param(torch.bfloat16, id="bf16", marks=BF16)]

NUM_STEPS = 4
WAYS = [
    Activations("small"),
    Activations("selective"),
    Activations("full"),
    Activations("full", recompute_num_layers=2),
    Activations("full", "block", 2),
    Activations(offload="cpu", offload_window_mib=0),
    Activations(offload="cpu"),
    Activations("small", offload="cpu", offload_window_mib=0),
    Activations("full", offload="cpu", offload_window_mib=0),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, list]:
    directory = tmp_path_factory.mktemp("cuda")
    policy, reference = (save_model(directory / str(seed), "qwen3", seed=seed, tokenizer=seed == 0) for seed in (0, 1))
    return policy, reference, random_groups(13, seed=3)


def run(device: str, files: tuple, cases: list[Case], dtype: torch.dtype = torch.float32) -> list[Outcome]:
    return on(device, outcomes, *files, cases, NUM_STEPS, dtype)


@pytest.fixture(scope="module")
def in_fp32(files) -> tuple[Outcome, Outcome]:
    """The same training on the CPU and on the GPU."""
    case = Case(Layout(), tokens_per_micro_batch=200)
    return run("cpu", files, [case])[0], run("cuda", files, [case])[0]


@FP32
def test_fp32_gives_the_cpu_s_log_probs_loss_gradients_and_weights(in_fp32):
    cpu, cuda = in_fp32
    torch.testing.assert_close(cuda.logps, cpu.logps, rtol=1e-4, atol=1e-3)
    assert cuda.losses == pytest.approx(cpu.losses, rel=1e-3)
    assert cuda.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-3)
    worst, name = oracle.worst_relative_error(cuda.gradients, cpu.gradients)
    assert worst <= 1e-3, name
    assert all(torch.equal(cuda.model_weights[name], weights) for name, weights in cuda.weights.items())


@FP32
def test_bf16_gives_fp32_s_loss_curve_and_log_probs_with_master_weights_in_fp32(files, in_fp32):
    (half,) = run("cuda", files, [Case(Layout(), tokens_per_micro_batch=200)], torch.bfloat16)
    full, num_tokens = in_fp32[0], torch.tensor([len(ids) for group in files[2] for ids in group.responses])
    assert half.losses == pytest.approx(full.losses, rel=0.02)
    assert float(((half.logps - full.logps).abs() / num_tokens).max()) < 2 * torch.finfo(torch.bfloat16).eps
    rounded = {name: weights.bfloat16().float() for name, weights in half.weights.items()}
    assert all(torch.equal(half.model_weights[name], weights) for name, weights in rounded.items())
    assert any(not torch.equal(half.weights[name], weights) for name, weights in rounded.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resident_reference_gives_margins_of_exactly_zero_at_step_0(files, dtype):
    policy, _, groups = files
    cases = [Case(Layout()), Case(Layout(), share_prompts=False), Case(Layout(), memory=Activations("full"))]
    for case, outcome in zip(cases, on("cuda", outcomes, policy, policy, groups, cases, 0, dtype), strict=True):
        assert len(outcome.margins) == len(groups) and not outcome.margins.any(), str(case)


@FP32
def test_recomputing_and_offloading_change_no_gradient(files):
    cases = [Case(Layout(), tokens_per_micro_batch=200, memory=way) for way in (Activations(), *WAYS)]
    kept, *found = run("cuda", files, cases)
    for case, outcome in zip(cases[1:], found, strict=True):
        worst, name = oracle.worst_relative_error(outcome.gradients, kept.gradients)
        assert worst <= 1e-5, f"{case}: {name} {worst}"
        assert outcome.losses == pytest.approx(kept.losses, rel=1e-4), str(case)
        assert (outcome.num_bytes_moved > 0) == (case.memory.offload == "cpu"), str(case)


@FP32
def test_overlapped_communication_changes_no_weight(files):
    cases = [Case(Layout(), tokens_per_micro_batch=200, overlap=overlap) for overlap in (False, True)]
    after, overlapped = run("cuda", files, cases)
    assert oracle.worst_relative_error(overlapped.gradients, after.gradients)[0] <= 1e-5
    assert all(torch.equal(overlapped.model_weights[name], weights) for name, weights in overlapped.weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_moments_on_the_host_give_the_weights_of_moments_on_the_device(files, dtype):
    # With drawn gradients: those of bf16 differ from run to run (kernels add up in any order), and AdamW's first steps
    # make of the smallest gradient a whole step.
    before, device = (on("cuda", stepped, files[0], "none", dtype, num_steps) for num_steps in (0, 4))
    for resumed_at in (None, 2):
        host = on("cuda", stepped, files[0], "cpu", dtype, 4, resumed_at)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            names = [name for name in device if name.split()[0] == kind]
            apart = torch.stack([(host[name] - device[name]).norm() for name in names]).norm()
            moved = torch.stack([(device[name] - before[name]).norm() for name in names]).norm()
            assert float(apart / moved) <= 1e-6, kind
        for name in (name for name in host if name.startswith("model ")):
            assert torch.equal(host[name], host[name.replace("model ", "weights ")].to(dtype).float())


@FP32
def test_a_run_with_moments_on_the_host_learns_as_without(files):
    cases = [Case(Layout(), tokens_per_micro_batch=200, offload=where) for where in ("none", "cpu")]
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.02)):
        device, host = run("cuda", files, cases, dtype)
        assert host.losses == pytest.approx(device.losses, rel=tolerance), dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradients_that_products_add_up_are_those_of_autograd(files, dtype):
    away = Activations(offload="cpu", offload_window_mib=0)
    for memory in (Activations(), away):
        cases = [Case(Layout(), tokens_per_micro_batch=200, memory=memory, fusion=fused) for fused in (False, True)]
        apart, fused = run("cuda", files, cases, dtype)
        worst, name = oracle.worst_relative_error(fused.gradients, apart.gradients)
        assert worst <= (1e-5 if dtype is torch.float32 else 1e-2), f"{memory}: {name}"


@BF16
def test_moments_in_bf16_learn_as_those_in_fp32_do_in_half_of_their_bytes(files):
    cases = [Case(Layout(), tokens_per_micro_batch=200, moments_dtype=dtype) for dtype in ("fp32", "bf16")]
    wide, narrow = run("cuda", files, cases, torch.bfloat16)
    assert narrow.losses == pytest.approx(wide.losses, rel=0.02)
    assert narrow.num_bytes_of_moments * 2 == wide.num_bytes_of_moments > 0


@BF16
def test_gradients_in_bf16_are_those_in_fp32_but_for_their_rounding_in_half_of_the_bytes(files):
    for ways in ({}, {"fusion": False}, {"overlap": False}):
        cases = [Case(Layout(), tokens_per_micro_batch=200, gradient_dtype=dtype, **ways) for dtype in ("fp32", "bf16")]
        wide, narrow = run("cuda", files, cases, torch.bfloat16)
        assert narrow.num_bytes_of_gradients * 2 == wide.num_bytes_of_gradients > 0
        assert 0 < oracle.worst_relative_error(narrow.gradients, wide.gradients)[0] <= 2e-2, str(ways)
        assert narrow.losses == pytest.approx(wide.losses, rel=0.02)


def peaks(ways: list[Activations]) -> list[tuple[int, int]]:
    """Of each way, bytes of activations when the forward pass is over and at the peak, on the device."""
    from benchmarks.memory import stage_and_step
    from megadpo.parallel.world import joined_world

    found = []
    for way in ways:
        with joined_world(Layout(), seed=0):
            settings = {"tokens": 16384, "hidden": 1024, "layers": 12, "heads": 8, "dtype": "bf16"}
            _, step = stage_and_step(settings, way)
            step(256, lambda: None)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, kept = torch.cuda.memory_allocated(), []
            step(settings["tokens"], lambda kept=kept: kept.append(torch.cuda.memory_allocated()))
            found.append((kept[0] - before, torch.cuda.max_memory_allocated() - before))
    return found


def test_recomputing_and_offloading_free_the_memory_of_the_device():
    away = Activations(offload="cpu", offload_window_mib=64)
    both_ways = Activations("full", offload="cpu", offload_window_mib=64)
    ways = [Activations(), Activations("small"), Activations("full"), away, both_ways]
    kept, small, recomputed, moved, both = on("cuda", peaks, ways)
    assert small[0] < 0.7 * kept[0] and small[1] < 0.8 * kept[1]
    assert recomputed[0] < 0.3 * kept[0] and recomputed[1] < 0.5 * kept[1]
    assert moved[0] < 0.3 * kept[0] and moved[1] < 0.5 * kept[1]
    assert both[0] < recomputed[0] and both[1] < recomputed[1]


def train(settings: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megadpo", "train", str(settings), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_like_one_that_was_never_stopped(files, tmp_path, offload):
    rows = write_hh(tmp_path / "rows.jsonl", 40)
    settings: dict[str, Any] = {
        "model": {"path": str(files[0])},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 4, "pairs_per_step": 8, "tokens_per_micro_batch": 1024, "learning_rate": 1e-3},
        "parallel": {"offload": offload},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }
    losses = {}
    for name in ("whole", "again"):
        directory = tmp_path / name
        (tmp_path / "run.yaml").write_text(json.dumps({**settings, "output_dir": str(directory)}))
        assert "activations recomputed (small)" in train(tmp_path / "run.yaml").stderr
        if name == "again":
            shutil.rmtree(directory / "checkpoints" / "step_00000004")
            train(tmp_path / "run.yaml")
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {record["step"]: record["loss"] for record in records}
    assert losses["again"] == pytest.approx(losses["whole"], rel=1e-2)


def test_megadpo_train_learns_in_bf16_reports_its_memory_and_exports_what_transformers_loads(files, tmp_path):
    settings: dict[str, Any] = {
        "model": {"path": str(files[0])},
        "data": {
            "train": str(write_hh(tmp_path / "rows.jsonl", 8)),
            "max_length": 128,
            "cache_dir": str(tmp_path / "cache"),
        },
        # Few pairs, each of them several times: what was seen before is learned.
        "train": {"steps": 6, "pairs_per_step": 4, "tokens_per_micro_batch": 1024, "learning_rate": 1e-3},
        "checkpoint": {"every": 3},
        "logging": {"tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    done = train(tmp_path / "run.yaml", "train.activation_offload=cpu", "train.recompute=full")
    assert "torch.bfloat16 on NVIDIA" in done.stderr and "activations recomputed (full), offloaded (cpu)" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 6 and records[-1]["loss"] < records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert all(record["peak_memory_gib"] > 0 for record in records)
    assert (tmp_path / "run" / "checkpoints").is_dir()
    exported = oracle.load(tmp_path / "run" / "hf", torch.bfloat16)
    logits = exported(torch.arange(2, 20)[None]).logits
    assert bool(torch.isfinite(logits).all())
