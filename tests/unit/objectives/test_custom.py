"""An objective from the user's own file: computed like ours, told in a sentence when it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megadpo.config.schema import ObjectiveConfig
from megadpo.errors import UserError
from megadpo.objectives.custom import load_custom
from megadpo.objectives.pairwise import sigmoid as smooth  # noqa: F401 - named by test_options.py
from megadpo.objectives.terms import Normalisers, Pairs
from megadpo.validation.load import load_config
from tests.helpers.statistics import evaluate, random_statistics

EXAMPLE = "examples/custom_objective.py:squared_hinge"


def one_number(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    return pairs.scaled_margin_P.sum()


def constant(pairs: Pairs, normalisers: Normalisers) -> Tensor:
    return torch.ones(len(pairs.statistics.chosen_P))


def test_the_example_is_the_square_of_the_hinge():
    statistics, normalisers = random_statistics(5), Normalisers(5)
    own = evaluate(statistics, normalisers, load_config({"objective": {"loss_type": "custom", "module": EXAMPLE}}).objective)
    hinge = evaluate(statistics, normalisers, ObjectiveConfig(loss_type="hinge"))
    torch.testing.assert_close(own.losses_U, hinge.losses_U**2)
    responses = torch.arange(10) // 2
    torch.testing.assert_close(own.gradient_RD[:, 0], 2 * hinge.losses_U[responses] * hinge.gradient_RD[:, 0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("loss.py", "not of the form path.py:function"),
        ("nowhere.py:loss", "there is no file nowhere.py"),
        ("examples/custom_objective.py:loss", "has no function loss"),
        ("BROKEN:loss", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_file_that_gives_no_function_is_told(tmp_path, module, message):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=message):
        load_custom(module.replace("BROKEN", str(tmp_path / "broken.py")))


@pytest.mark.parametrize("name", ["one_number", "constant"])
def test_a_function_that_gives_no_loss_a_pair_is_told(name):
    options = ObjectiveConfig(loss_type="custom", module=f"tests/unit/objectives/test_custom.py:{name}")
    with pytest.raises(UserError, match=r"must give one loss a pair, shape \[3\]"):
        evaluate(random_statistics(3), Normalisers(3), options)


def test_custom_without_a_file_is_refused():
    with pytest.raises(UserError, match=r"name its function in objective\.module"):
        load_config({"objective": {"loss_type": "custom"}})
