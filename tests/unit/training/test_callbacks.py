"""What callbacks give back: no, or metrics of their own, or what is refused in a sentence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.errors import UserError
from megadpo.training.callbacks import Callbacks, EvaluatedSet, checked_metrics, is_no


@pytest.mark.parametrize(("answer", "no"), [(False, True), (np.False_, True), (None, False), (True, False), (0, False)])
def test_only_false_ends_a_run(answer, no):
    assert is_no(answer) is no


def test_own_metrics_get_the_set_s_prefix_once_and_are_numbers():
    given = {"a": 1, "b/c": np.float32(0.5), "eval_x_d": np.array(2), "e": float("nan")}
    found = checked_metrics(given, "eval_x_", {"eval_x_loss": 1.0})
    assert list(found) == ["eval_x_a", "eval_x_b/c", "eval_x_d", "eval_x_e"]
    assert [type(value) for value in found.values()] == [float] * 4 and list(found.values())[:3] == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "gave a NoneType; it must give a dict of names to numbers"),
        ([("a", 1)], "gave a list"),
        ({"a b": 1}, "gave the name 'a b'"),
        ({3: 1}, "gave the name '3'"),
        ({"a": "1"}, "gave '1' for a, which is no number"),
        ({"a": True}, "gave 'True' for a"),
        ({"a": np.ones(2)}, "for a, which is no number"),
        ({"a": torch.ones(2)}, "for a, which is no number"),
        ({"loss": 1.0}, "gave loss, but eval_loss is a metric already"),
        ({"a": 1.0, "eval_a": 1.0}, "gave eval_a, but eval_a is a metric already"),
    ],
)
def test_other_answers_are_refused_in_a_sentence(given, words):
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        checked_metrics(given, "eval_", {"eval_loss": 1.0})
    assert str(refused.value).startswith("callbacks.compute_metrics gave") and "\n" not in str(refused.value)


def evaluated(kind: str, groups: list[int]) -> EvaluatedSet:
    values = np.arange(len(groups), dtype=np.float64)
    of_groups = np.arange(max(groups) + 1)
    return EvaluatedSet("", kind, of_groups, np.array(groups), values, values, values.astype(int), values, values, {})


def test_responses_of_pairs_are_parted_and_of_lists_the_first_is_chosen():
    pairs, lists = evaluated("pairs", [0, 0, 1, 1]), evaluated("lists", [0, 0, 0, 1, 1])
    assert pairs.chosen(pairs.logps).tolist() == [0, 2] and pairs.rejected(pairs.logps).tolist() == [1, 3]
    assert lists.chosen(lists.logps).tolist() == [0, 3]
    with pytest.raises(ValueError, match="lists"):
        lists.rejected(lists.logps)


@pytest.mark.parametrize("name", ["on_begin", "compute_metrics"])
def test_what_is_no_function_is_refused(name):
    given: Any = {name: 3}
    with pytest.raises(UserError, match=rf"callbacks\.{name} is a int, not a function"):
        Callbacks.checked(Callbacks(**given))
