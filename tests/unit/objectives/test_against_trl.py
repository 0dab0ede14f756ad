"""Every loss and option that TRL 1.16 has: loss and gradients equal those of TRL's own code."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import pytest
import torch

from tests.unit.objectives.trl_cases import CASES, Case, on_a_real_batch, on_random_logits

pytestmark = pytest.mark.slow

DOUBLE, SINGLE = 1e-7, 1e-5
"""Largest relative error in float64 (TRL keeps some constants in fp32) and where anything is computed in fp32."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tolerance(case: Case) -> float:
    return SINGLE if case.single else DOUBLE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_random_logits_loss_and_gradient_equal_trl(case):
    found = on_random_logits(case)
    assert found.gradient_norm > 1e-3
    assert found.worst <= _tolerance(case), found


@pytest.mark.parametrize("case", [case for case in CASES if not case.only_random], ids=str)
def test_on_a_real_batch_loss_and_gradient_equal_trl(case):
    found = on_a_real_batch(case)
    assert found.gradient_norm > 1e-2
    assert found.worst <= SINGLE, found


@pytest.mark.parametrize("trainer", ["DPO", "ORPO", "CPO", "KTO"])
def test_another_beta_is_noticed(trainer):
    case = next(case for case in CASES if case.trainer == trainer)
    other = replace(case, theirs={**case.theirs, "beta": 0.301})
    assert on_random_logits(other).worst > 10 * _tolerance(case)
    assert on_a_real_batch(other).worst > 10 * SINGLE


@pytest.mark.parametrize("measure", [on_random_logits, on_a_real_batch])
def test_a_kl_left_out_is_noticed(measure):
    kto = next(case for case in CASES if case.ours["loss_type"] == "kto")
    assert measure(replace(kto, theirs={"calculate_KL": False})).worst > 10 * SINGLE


def test_every_loss_of_trl_is_compared():
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer

    compared = {
        trainer: {
            name
            for case in CASES
            if case.trainer == trainer
            for names in [case.theirs.get("loss_type", case.ours["loss_type"])]
            for name in ([names] if isinstance(names, str) else names)
        }
        for trainer in ("DPO", "KTO", "CPO")
    }
    assert compared["DPO"] == set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert compared["KTO"] == set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(KTOTrainer._compute_loss)))
    # TRL's CPO has hinge and ipo without a reference too, which are in no paper.
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(CPOTrainer.cpo_loss)))
    assert compared["CPO"] == known - {"hinge", "ipo"}
