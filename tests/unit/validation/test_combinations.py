"""The table of combinations says what happens: each feature and each pair is switched on, and the page shows the same."""

from __future__ import annotations

import itertools

import pytest

from megadpo.errors import UserError
from megadpo.validation import combinations
from megadpo.validation.combinations import EXCLUDED, FEATURES, NEEDS, are_of_one_option, rule_between
from megadpo.validation.load import load_config

BY_NAME = {feature.name: feature for feature in FEATURES}


def switched_on(*names: str) -> list[str]:
    return [override for name in names for override in BY_NAME[name].example]


@pytest.mark.parametrize("name", BY_NAME)
def test_a_feature_s_example_switches_it_on(name: str) -> None:
    assert BY_NAME[name].is_on(load_config({}, switched_on(name)))
    assert not BY_NAME[name].is_on(load_config({}))


PAIRS = [pair for pair in itertools.combinations(BY_NAME, 2) if not are_of_one_option(*pair)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_features_combine_unless_the_table_says_why_not(first: str, second: str) -> None:
    rule = rule_between(first, second)
    if rule is None:
        config = load_config({}, switched_on(first, second))
        assert BY_NAME[first].is_on(config) and BY_NAME[second].is_on(config)
    else:
        with pytest.raises(UserError) as caught:
            load_config({}, switched_on(first, second))
        assert str(caught.value).startswith(BY_NAME[rule.first].setting) and str(caught.value).endswith(rule.why)


def test_every_rule_names_features_that_exist_and_says_why_once() -> None:
    for rule in EXCLUDED + NEEDS:
        assert {rule.first, rule.second} <= BY_NAME.keys() and rule.why
    pairs = [frozenset((rule.first, rule.second)) for rule in EXCLUDED]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("override", ["parallel.sequence=true", "parallel.virtual_pipeline=2"])
def test_what_a_feature_cannot_do_without_is_asked_for(override: str) -> None:
    with pytest.raises(UserError, match=r"^parallel\.\w+ is \w+, but .* needs parallel\.\w+ > 1; "):
        load_config({}, [override])


def test_a_new_exclusion_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = combinations.Rule("virtual pipeline", "recomputation", "they were never introduced")
    monkeypatch.setattr(combinations, "EXCLUDED", (*EXCLUDED, rule))
    with pytest.raises(UserError, match=r"parallel.virtual_pipeline is 2, but they were never introduced"):
        load_config({}, switched_on("virtual pipeline", "recomputation"))


def test_the_page_shows_the_table() -> None:
    from tools.combinations_table import PART, render

    assert PART.written() == render(), "run: python -m tools.combinations_table --write"
