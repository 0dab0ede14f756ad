"""Options of the evaluation in the step loop: names of sets, the metric of the best model, when a run ends."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from megadpo.config.sources import eval_label, eval_prefix, eval_sets, is_held_out
from megadpo.errors import UserError
from megadpo.validation.evaluation import best_of, check_best_metric, metrics_of_evaluation
from megadpo.validation.load import load_config

SETS = {"helpful": "a.jsonl", "harm-less.2": {"path": "b.jsonl", "split": "test"}}


def config_of(held_out: Any = "a.jsonl", **options: Any) -> Any:
    return load_config({"data": {"eval": held_out}, "eval": {"every": 5, **options}})


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_best_metric(config_of(*arguments, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sets_have_names_in_the_configuration_and_one_set_has_none():
    sets = eval_sets(config_of(SETS).data.eval)
    assert sets == {"helpful": "a.jsonl", "harm-less.2": [{"path": "b.jsonl", "split": "test"}]}
    assert [(eval_label(name), eval_prefix(name)) for name in sets] == [
        *[("eval helpful", "eval_helpful_"), ("eval harm-less.2", "eval_harm-less.2_")]
    ]
    one = {"path": "b.jsonl", "split": "test"}
    assert eval_sets(config_of(one).data.eval) == {"": [one]} and (eval_label(""), eval_prefix("")) == ("eval", "eval_")
    assert eval_sets(load_config({}).data.eval) == {}
    assert [is_held_out(label) for label in ("train", "eval", "eval train")] == [False, True, True]


def test_from_python_sets_are_a_dict_of_datasets_or_a_dataset_dict():
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    whole = DatasetDict(train=rows, test=rows)
    assert eval_sets(config_of(whole).data.eval) == {"": whole}, "a data set, of which the held-out split is meant"
    for given in ({"x": rows, "y": [rows, "more.jsonl"]}, DatasetDict(x=rows, y=rows)):
        config = config_of(given)
        assert eval_sets(config.data.eval)["x"] is rows and "<datasets.Dataset, 1 rows" in config.to_yaml()
        assert load_config(config).data.eval == config.data.eval


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "data.eval is an empty mapping"),
        ({"a b": "x.jsonl"}, "data.eval: 'a b' is no name for a set"),
        ({"a": None}, "data.eval.a has no source"),
        ({"a": {"pth": "x"}}, "data.eval.a has no path"),
        ({"a": []}, "data.eval.a is an empty list"),
        (
            {"pth": "x", "split": "test"},
            "data.eval has no path; a source is a path or {path, weight, split, subset, columns}",
        ),
        ({"chosen": "x", "rejected": "y"}, "data.eval has no path"),
        ({1: "x.jsonl"}, "data.eval: '1' is no name"),
    ],
)
def test_a_mapping_that_is_neither_a_source_nor_names_is_refused(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        config_of(given)


@pytest.mark.parametrize(
    ("metric", "direction", "is_more_better"),
    [
        *[("eval_loss", "auto", False), ("loss", "auto", False), ("rewards/accuracies", "auto", True)],
        *[("eval_rewards/margins", "auto", True), ("mean_token_accuracy", "auto", True), ("entropy", "min", False)],
        *[("eval_loss", "max", True)],
    ],
)
def test_what_is_better_follows_from_the_metric_s_name_or_is_said(metric, direction, is_more_better):
    config = config_of(best_metric=metric, best_direction=direction, patience=2, min_improvement=0.1)
    best = best_of(config)
    check_best_metric(config)
    assert best.metric == f"eval_{metric.removeprefix('eval_')}" in metrics_of_evaluation(config)
    assert (best.is_more_better, best.patience, best.min_improvement) == (is_more_better, 2, 0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"best_metric": "eval_entropy"}, "eval.best_direction is auto, but what is better of eval_entropy is not known"),
        (
            {"best_metric": "eval_lossy", "best_direction": "min"},
            "gives no eval_lossy (did you mean eval_loss?); it gives eval_",
        ),
        ({"best_metric": "helpful_loss"}, "the evaluation gives no eval_helpful_loss"),
        ({"best_metric": "los"}, "the evaluation gives no eval_los (did you mean eval_loss?)"),
        ({"best_metric": ""}, "eval.best_metric is empty"),
        ({"best_metric": "loss", "every": 0}, "eval.every is 0"),
        ({"best_metric": "loss", "min_improvement": 0.1}, "eval.min_improvement is read with eval.patience"),
        ({"best_metric": "loss", "patience": 0}, "eval.patience must be at least 1"),
        ({"best_metric": "loss", "patience": 1, "min_improvement": -1}, "eval.min_improvement must be at least 0"),
        ({"best_metric": "loss", "best_direction": "maximum"}, "eval.best_direction: 'maximum' is not known"),
        ({"patience": 2}, "eval.patience is read with eval.best_metric, which is null"),
        ({"best_direction": "max"}, "eval.best_direction is read with eval.best_metric"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, words):
    assert words in error_of(**options)


@pytest.mark.parametrize("option", ["every=1", "pairs=1", "at_start=true", "best_metric=loss", "patience=1"])
def test_options_of_an_evaluation_without_held_out_data_are_refused(option):
    with pytest.raises(UserError, match=rf"eval.{option.partition('=')[0]} is set, but there is nothing to evaluate on"):
        load_config({}, [f"eval.{option}"])


def test_a_metric_is_one_of_a_named_set_or_a_user_s_own():
    assert "it gives eval_helpful_loss" in error_of(SETS, best_metric="eval_loss")
    check_best_metric(config_of(SETS, best_metric="helpful_loss"))
    own = config_of(best_metric="mine", best_direction="max")
    check_best_metric(own, own={"eval_mine"})
    with pytest.raises(UserError, match="gives no eval_mine"):
        check_best_metric(own)
