"""Layers of TransformerEngine: the numbers of local ones up to bf16's, or FP8's, rounding; skipped where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.config.schema import ModelConfig
from megadpo.model.activations import Activations
from megadpo.parallel.layout import Layout
from tests.gpu.machine import on
from tests.helpers import oracle
from tests.helpers.models import random_groups, save_model
from tests.parity.worker import Case, Outcome, outcomes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.xdist_group("layers"),
]

THEIRS = ModelConfig(layers="transformer_engine")
IN_FP8 = ModelConfig(layers="transformer_engine", fp8=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path, list]:
    pytest.importorskip("transformer_engine")
    directory = tmp_path_factory.mktemp("layers")
    policy, reference = (save_model(directory / str(seed), "qwen3", seed=seed, tokenizer=False) for seed in (0, 1))
    return policy, reference, random_groups(13, seed=3)


def run(files: tuple, options: ModelConfig, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Outcome:
    case = Case(Layout(), tokens_per_micro_batch=200, model=options, **changes)  # type: ignore[arg-type]
    return on("cuda", outcomes, *files, [case], 4, dtype)[0]


def test_fp32_gives_the_log_probs_gradients_and_weights_of_local_layers(files):
    local, theirs = run(files, ModelConfig(), torch.float32), run(files, THEIRS, torch.float32)
    torch.testing.assert_close(theirs.logps, local.logps, rtol=1e-4, atol=1e-3)
    assert oracle.worst_relative_error(theirs.gradients, local.gradients)[0] <= 1e-3
    assert theirs.losses == pytest.approx(local.losses, rel=1e-3)


@pytest.mark.parametrize(("options", "apart"), [(THEIRS, 0.02), (IN_FP8, 0.1)], ids=["bf16", "FP8"])
def test_half_and_quarter_precision_give_fp32_s_loss_curve(files, options, apart):
    skip_without_fp8(options)
    assert run(files, options).losses == pytest.approx(run(files, ModelConfig(), torch.float32).losses, rel=apart)


@pytest.mark.parametrize("options", [THEIRS, IN_FP8], ids=["bf16", "FP8"])
def test_a_resident_reference_gives_margins_of_exactly_zero_at_step_0(files, options):
    skip_without_fp8(options)
    policy, _, groups = files
    outcome = run((policy, policy, groups), options)
    assert len(outcome.margins) == len(groups) and not outcome.margins.any()


def test_fused_gradients_and_recomputed_activations_are_those_of_neither(files):
    plain = run(files, THEIRS, torch.float32, fusion=False)
    for changes in ({"fusion": True}, {"fusion": True, "memory": Activations("full")}):
        found = run(files, THEIRS, torch.float32, **changes)
        assert oracle.worst_relative_error(found.gradients, plain.gradients)[0] <= 1e-5, str(changes)


def skip_without_fp8(options: ModelConfig) -> None:
    if options.fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
