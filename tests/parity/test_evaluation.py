"""`megadpo eval` against plain transformers: log-probs, rewards and answers, of models and adapters, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.evaluations import evaluate_each, write_rows
from tests.helpers.models import hh_rows, save_model, save_reward_model
from tests.helpers.peft_oracle import adapted_model
from tests.helpers.worlds import run_world

SUBSETS = ("harmless", "hep-cpp", "hep-rust")
BETA = 0.3
WHOLE = ["data.max_length=null", "model.dtype=fp32", "train.tokens_per_micro_batch=2048"]
TO_ANSWER = 3


def logps_of(model: Any, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """[R]: the log-prob of each (prompt, answer)'s answer, in float64."""
    sums = []
    with torch.no_grad():
        for prompt, answer in sequences:
            logps = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            sums.append(logps[places, torch.tensor(answer)].sum())
    return torch.stack(sums)


class Plain:
    """The same by transformers alone: the rows' texts, the tokenizer, the model."""

    def __init__(self, files: Path, rows: list[dict[str, Any]]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(files / "model")
        self.subsets = [row["subset"] for row in rows]
        self.sequences = [self.sequence(row[side]) for row in rows for side in ("chosen", "rejected")]
        self.num_tokens_P2 = torch.tensor([float(len(answer)) for _, answer in self.sequences]).view(-1, 2)

    def sequence(self, text: str) -> tuple[list[int], list[int]]:
        cut = text.rindex("\n\nAssistant:") + len("\n\nAssistant:")
        prompt = self.tokenizer(text[:cut])["input_ids"]
        whole = self.tokenizer(text + self.tokenizer.eos_token)["input_ids"]
        assert whole[: len(prompt)] == prompt
        return prompt, whole[len(prompt) :]

    def logps(self, model: Any) -> Tensor:
        """[P, 2]"""
        return logps_of(model, self.sequences).view(-1, 2)

    def check(self, report: dict[str, Any], scores_P2: Tensor) -> None:
        """Every subset of the report has these scores' accuracy, exactly, and margin."""
        assert [record["name"] for record in report["subsets"]] == list(SUBSETS)
        margins_P = scores_P2[:, 0] - scores_P2[:, 1]
        for record in [*report["subsets"], report["all"] | {"name": None}]:
            places = [record["name"] in (None, subset) for subset in self.subsets]
            own = margins_P[torch.tensor(places)]
            assert (record["num_pairs"], record["num_ties"]) == (len(own), 0)
            assert record["accuracy"] == int((own > 0).sum()) / len(own)
            assert record["margin"] == pytest.approx(own.mean().item(), rel=1e-5, abs=1e-5)
            assert record["chosen_score"] == pytest.approx(
                scores_P2[torch.tensor(places), 0].mean().item(), rel=1e-5, abs=1e-5
            )


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row | {"subset": SUBSETS[number % 3], "id": number} for number, row in enumerate(hh_rows(21))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", num_hidden_layers=2)
    save_model(directory / "reference", num_hidden_layers=2, seed=1)
    save_reward_model(directory / "reward", num_hidden_layers=2)
    adapted_model(directory / "model", r=4, target_modules=["q_proj", "down_proj"]).save_pretrained(directory / "adapter")
    write_rows(directory / "pairs.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def plain(files: Path, rows: list[dict[str, Any]]) -> Plain:
    return Plain(files, rows)


def language_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def commands(files: Path) -> list[list[str]]:
    """Model against reference with greedy answers; the adapter against its base with drawn ones; the reward model."""
    data = ["--data", str(files / "pairs.jsonl"), *WHOLE, "--beta", str(BETA)]
    answers = ["--generate", str(TO_ANSWER), "--max-new-tokens", "12"]
    model = ["--model", str(files / "model"), "--reference", str(files / "reference")]
    return [
        [*model, *data, *answers, "--out", str(files / "out")],
        ["--model", str(files / "adapter"), *data, *answers, "--temperature", "1", "--seed", "7"],
        ["--model", str(files / "reward"), *data],
    ]


@pytest.fixture(scope="module")
def reports(files: Path) -> list[dict[str, Any]]:
    return run_world(1, evaluate_each, commands(files), str(files / "cache"))[0]


def test_accuracy_and_margin_by_subset_are_those_of_plain_transformers(
    files: Path, plain: Plain, reports: list[dict[str, Any]]
) -> None:
    logps_P2, reference_P2 = (plain.logps(language_model(files / name)) for name in ("model", "reference"))
    report = reports[0]
    assert report["score"] == "log_ratio"
    plain.check(report, BETA * (logps_P2 - reference_P2))
    for kind, scores_P2 in {
        "mean_log_ratio": (logps_P2 - reference_P2) / plain.num_tokens_P2,
        "log_prob": logps_P2,
        "mean_log_prob": logps_P2 / plain.num_tokens_P2,
        "reference_log_prob": reference_P2,
    }.items():
        assert report["kinds"][kind]["accuracy"] == (scores_P2[:, 0] > scores_P2[:, 1]).double().mean().item(), kind
    assert report["all"]["chosen_win_rate"] == (logps_P2 > reference_P2)[:, 0].double().mean().item()
    lines = [json.loads(line) for line in (files / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [line["subset"] for line in lines] == plain.subsets
    written_P2 = torch.tensor([[line["chosen_logp"], line["rejected_logp"]] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(written_P2, logps_P2, rtol=1e-5, atol=1e-5)
    assert json.loads((files / "out" / "eval.json").read_text()) == report


def test_an_adapter_is_scored_against_its_base(files: Path, plain: Plain, reports: list[dict[str, Any]]) -> None:
    import peft

    assert reports[1]["reference"] == str(files / "model")
    model = peft.PeftModel.from_pretrained(language_model(files / "model"), files / "adapter")
    plain.check(reports[1], BETA * (plain.logps(model) - plain.logps(language_model(files / "model"))))


def test_a_reward_model_s_scores_are_those_of_its_classifier(
    files: Path, plain: Plain, reports: list[dict[str, Any]]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(files / "reward", dtype=torch.float32)
    with torch.no_grad():
        rewards = [model(torch.tensor([prompt + answer])).logits[0, 0].double() for prompt, answer in plain.sequences]
    assert reports[2]["score"] == "reward" and reports[2]["reference"] is None
    plain.check(reports[2], torch.stack(rewards).view(-1, 2))


def answers_of(model: Any, prompts: list[list[int]], seed: int = 0, **options: Any) -> list[list[int]]:
    """transformers' own answers."""
    answers = []
    for number, prompt in enumerate(prompts):
        torch.manual_seed(seed + number)
        answers.append(model.generate(torch.tensor([prompt]), max_new_tokens=12, **options)[0, len(prompt) :].tolist())
    return answers


def test_greedy_answers_are_transformers_own_token_for_token(
    files: Path, plain: Plain, reports: list[dict[str, Any]]
) -> None:
    prompts = [prompt for prompt, _ in plain.sequences[::2]][:TO_ANSWER]
    expected = {
        side: answers_of(language_model(files / name), prompts, do_sample=False)
        for side, name in (("policy", "model"), ("reference", "reference"))
    }
    assert len(reports[0]["generations"]) == TO_ANSWER
    for number, record in enumerate(reports[0]["generations"]):
        for side in expected:
            assert record[f"{side}_ids"] == expected[side][number]
            assert record[side] == plain.tokenizer.decode(expected[side][number], skip_special_tokens=True)
        assert record["prompt"] == plain.tokenizer.decode(prompts[number], skip_special_tokens=True)
    assert reports[0]["kl"]["is_estimate"] is False


def test_drawn_answers_are_transformers_own_and_give_the_kl_divergence(
    files: Path, plain: Plain, reports: list[dict[str, Any]]
) -> None:
    from megadpo.checkpoint.convert import merge_adapter

    merge_adapter(files / "adapter", files / "merged", dtype=torch.float32)
    model, base = language_model(files / "merged"), language_model(files / "model")
    prompts = [prompt for prompt, _ in plain.sequences[::2]][:TO_ANSWER]
    drawn = answers_of(model, prompts, seed=7, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    assert [record["policy_ids"] for record in reports[1]["generations"]] == drawn
    sequences = list(zip(prompts, drawn, strict=True))
    ratios_S = logps_of(model, sequences) - logps_of(base, sequences)
    kl = reports[1]["kl"]
    assert kl["is_estimate"] is True and kl["num_answers"] == TO_ANSWER
    assert kl["estimate"] == pytest.approx(ratios_S.mean().item(), rel=1e-4, abs=1e-5)
    assert kl["per_token"] == pytest.approx(ratios_S.sum().item() / sum(map(len, drawn)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", pytest.param("parallel.tensor=1", marks=pytest.mark.slow)])
def test_two_processes_say_the_same(files: Path, layout: str, reports: list[dict[str, Any]]) -> None:
    again, other = run_world(
        2,
        evaluate_each,
        [[*c[:-2], layout] if "--out" in c else [*c, layout] for c in commands(files)],
        str(files / "cache"),
    )
    assert other == [None] * len(reports)
    for one, two in zip(reports, again, strict=True):
        assert two["layout"] != one["layout"]
        for ours, theirs in zip([*one["subsets"], one["all"]], [*two["subsets"], two["all"]], strict=True):
            exactly = ("name", "num_pairs", "accuracy", "num_ties")
            assert {name: ours.get(name) for name in exactly} == {name: theirs.get(name) for name in exactly}
            numbers = {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in ours.items() if name != "name"}
            assert {name: value for name, value in theirs.items() if name != "name"} == numbers
        assert two.get("generations") == one.get("generations")
