"""The recipes of examples/ are run on real rows, by the command that their users would give, and learn them."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megadpo.validation.load import load_config
from tests.helpers.launched import finish_script
from tests.helpers.models import DATA, hh_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
HH, ZH, KTO = "hh-rlhf-harmless-test.jsonl.gz", "dpo_zh_demo.json", "kto_en_demo.json"
FILES = {"sft": HH, "dpo": HH, "dpo_zh": ZH, "kto": KTO, "orpo": HH, "listwise": HH, "reward": HH}
"""Recipe -> the file that it cannot do without."""
TOGETHER = (("sft", "dpo", "kto"), ("dpo_zh", "orpo", "listwise", "reward"))
"""Recipes that one call of the example runs; `exhaustive` are the second ones."""
NUM_ROWS, NUM_PASSES = 32, 5

pytestmark = pytest.mark.timeout(600)


def each(recipes: Iterable[str]) -> list[Any]:
    """For `parametrize`: the recipes, of which those of the second call are exhaustive."""
    return [pytest.param(recipe, marks=pytest.mark.exhaustive if recipe in TOGETHER[1] else ()) for recipe in recipes]


def real_data(directory: Path, *arguments: object) -> tuple[int, str]:
    """Exit status and what is printed."""
    return finish_script(EXAMPLES / "real_data" / "run.py", list(map(str, arguments)), directory)


@dataclass(frozen=True)
class Runs:
    """What one call of the example has left behind."""

    output: Path
    said: str
    are_real: bool  # made-up answers are random words, which are harder to tell apart than real ones

    @property
    def least_accuracy(self) -> float:
        """Share of training rows whose preference is learned at least."""
        return 0.8 if self.are_real else 0.6

    def passes(self, recipe: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The records of the first and of the last pass over the training rows, a record a step."""
        if not (self.output / recipe).is_dir():
            pytest.skip(f"{DATA} has no {FILES[recipe]}")
        lines = (self.output / recipe / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        num_steps = len(records) // NUM_PASSES
        return records[:num_steps], records[-num_steps:]

    def weights(self, model: str) -> torch.Tensor:
        """All of a language model's weights, one after the other; every one must be in the directory."""
        from transformers import AutoModelForCausalLM

        path = self.output / model
        if not path.is_dir():
            pytest.skip(f"no {model}: {DATA} has not every file")
        loaded, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        return torch.cat([weight.detach().flatten() for _, weight in sorted(loaded.named_parameters())])


@pytest.fixture(scope="module")
def runs_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """The runs among which a recipe's is, made once."""
    run = functools.cache(functools.partial(run_together, tmp_path_factory))
    return lambda recipe: run(next(together for together in TOGETHER if recipe in together))


def run_together(tmp_path_factory: pytest.TempPathFactory, together: Sequence[str]) -> Runs:
    """The example as it is, on the real rows; of hh-rlhf made-up ones where its file is missing."""
    output, data = tmp_path_factory.mktemp("runs"), DATA
    recipes = [recipe for recipe in together if FILES[recipe] == HH or (DATA / FILES[recipe]).is_file()]
    if not (DATA / HH).is_file():
        data = tmp_path_factory.mktemp("data")
        with gzip.open(data / HH, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in hh_rows(200))
        for name in (ZH, KTO):
            if (DATA / name).is_file():
                (data / name).symlink_to((DATA / name).resolve())
    sizes = ("--rows", NUM_ROWS, "--passes", NUM_PASSES)
    status, said = real_data(output, "--data", data, "--output", output, "--recipes", *recipes, *sizes)
    assert status == 0, said
    return Runs(output, said, are_real=data == DATA)


def mean(records: list[dict[str, Any]], metric: str) -> float:
    return sum(record[metric] for record in records) / len(records)


# Recipe -> the least change of a metric's mean, from the first to the last pass over its training rows. About a third of
# what was measured.
LEAST_CHANGE = {
    "sft": {"loss": -0.6, "mean_token_accuracy": 0.04},
    "dpo": {"loss": -0.2, "rewards/margins": 1.5, "rewards/accuracies": 0.15},
    "dpo_zh": {"loss": -0.2, "rewards/margins": 2.5, "rewards/accuracies": 0.15},
    "kto": {"loss": -0.1, "rewards/margins": 3.5},
    "orpo": {"loss": -0.9, "rewards/margins": 0.04, "rewards/accuracies": 0.15},
    "listwise": {"loss": -0.6, "rewards/margins": 0.8, "rewards/accuracies": 0.25},
    "reward": {"loss": -0.2, "rewards/margins": 1.3, "rewards/accuracies": 0.15},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", each(LEAST_CHANGE))
def test_each_recipe_learns_its_rows(runs_with: Callable[[str], Runs], recipe: str) -> None:
    runs, changes = runs_with(recipe), LEAST_CHANGE[recipe]
    first, last = runs.passes(recipe)
    share = 1 if runs.are_real else 0.1
    for metric, least in changes.items():
        before, after = mean(first, metric), mean(last, metric)
        assert (after - before) / least > share, f"{metric}: {before} in the first pass, {after} in the last one"
        assert re.search(rf"^  {recipe} +{metric} +{before:.3f} +{after:.3f} ", runs.said, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", each(recipe for recipe in FILES if recipe != "sft"))
def test_preferences_begin_undecided_and_end_on_the_right_side(runs_with: Callable[[str], Runs], recipe: str) -> None:
    runs = runs_with(recipe)
    first, last = runs.passes(recipe)
    if recipe not in ("orpo", "reward"):  # these have no reference, whose equal the model is before its first step
        assert first[0]["rewards/margins"] == 0.0
    assert mean(last, "rewards/margins") > 0
    if recipe != "kto":  # single answers are not compared
        assert mean(last, "rewards/accuracies") > runs.least_accuracy


@pytest.mark.slow
@pytest.mark.parametrize("recipe", each(["sft", "orpo"]))
def test_what_is_learned_from_answers_helps_with_others(runs_with: Callable[[str], Runs], recipe: str) -> None:
    first, last = runs_with(recipe).passes(recipe)
    assert last[-1]["eval_loss"] < first[-1]["eval_loss"] - 0.1  # about a third of what was measured
    assert last[-1]["eval_loss"] < first[0]["loss"] - 0.5


@pytest.mark.slow
def test_dpo_goes_on_from_what_sft_exported(runs_with: Callable[[str], Runs]) -> None:
    runs = runs_with("dpo")
    settings = yaml.safe_load((runs.output / "dpo" / "config.yaml").read_text(encoding="utf-8"))
    assert settings["model"]["path"] == settings["reference"]["path"] == str(runs.output / "sft" / "hf")
    start, sft, dpo = (runs.weights(name) for name in ("start", "sft/hf", "dpo/hf"))
    assert 0 < (dpo - sft).norm() < (dpo - start).norm() / 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", each(["dpo_zh", "kto", "orpo", "listwise"]))
def test_what_is_exported_loads_in_transformers(runs_with: Callable[[str], Runs], recipe: str) -> None:
    runs = runs_with(recipe)
    from transformers import AutoTokenizer

    assert runs.weights(f"{recipe}/hf").isfinite().all()
    assert AutoTokenizer.from_pretrained(runs.output / recipe / "hf").chat_template


@pytest.mark.exhaustive
def test_the_exported_reward_model_ranks_its_training_pairs_in_transformers(runs_with: Callable[[str], Runs]) -> None:
    runs = runs_with("reward")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = runs.output / "reward" / "hf"
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def reward(text: str) -> float:
        ids_T = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            (logits_1,) = model(torch.tensor([ids_T])).logits
        return float(logits_1)

    lines = (runs.output / "data" / "hh.train.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[: NUM_ROWS // 2]]
    right = [reward(pair["chosen"]) > reward(pair["rejected"]) for pair in pairs]
    assert len(right) == NUM_ROWS // 2 and sum(right) / len(right) > runs.least_accuracy


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_says_the_command_that_runs_it(recipe: Path) -> None:
    load_config(recipe).require_for_training()
    commands = [line.lstrip("# ") for line in recipe.read_text(encoding="utf-8").splitlines() if "megadpo train" in line]
    file, *overrides = shlex.split(commands[-1].removeprefix("megadpo train "))
    assert file == f"examples/{recipe.name}"
    config = load_config(recipe, overrides)
    assert config.model.path != load_config(recipe).model.path or recipe.name == "dpo.yaml"
    assert config.output_dir == f"runs/{recipe.stem}"


def test_a_data_directory_without_the_files_is_one_sentence(tmp_path: Path) -> None:
    status, said = real_data(tmp_path, "--data", tmp_path, "--output", tmp_path / "out", "--recipes", "kto", "listwise")
    assert status == 2 and "Traceback" not in said
    assert f"{tmp_path} has no {KTO}, {HH}; name the directory" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_earlier_runs_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    for name in FILES.values():
        (tmp_path / name).touch()
    status, said = real_data(tmp_path, "--data", tmp_path, "--output", tmp_path)
    assert status == 2 and "holds such runs already" in said
