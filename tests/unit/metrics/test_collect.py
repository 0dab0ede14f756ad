"""Metrics: TRL's numbers, whatever way a batch is cut into micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megadpo.config.schema import ObjectiveConfig
from megadpo.metrics import collect
from megadpo.objectives.objective import BY_LENGTH, Objective
from megadpo.objectives.statistics import ResponseStatistics
from megadpo.objectives.terms import Normalisers
from tests.helpers.statistics import evaluate, random_statistics

BETA = 0.3
DPO = ObjectiveConfig(beta=BETA)


def metrics_of(statistics: ResponseStatistics, options: ObjectiveConfig = DPO, prefix: str = "") -> dict[str, float]:
    return collect.reduce(vector_of(statistics, options), Objective.of(options), prefix)


def vector_of(statistics: ResponseStatistics, options: ObjectiveConfig = DPO) -> torch.Tensor:
    return collect.sum_vector(statistics, evaluate(statistics, Normalisers(5, 100), options), Objective.of(options))


def some_groups(statistics: ResponseStatistics, numbers: list[int], size: int = 2) -> ResponseStatistics:
    """The statistics of some groups of `size` responses alone."""
    rows = torch.tensor([size * number + place for number in numbers for place in range(size)])
    fields = {name: value[rows] for name, value in vars(statistics).items() if name.endswith("_R")}
    return replace(statistics, **fields, first_G=torch.arange(len(numbers)) * size)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[0], [1, 2, 3, 4]], [[4, 2], [0], [1, 3]]])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        (DPO, 2),
        (ObjectiveConfig(loss_type=["sigmoid", "ipo"], nll_coef=0.1), 2),
        (ObjectiveConfig(loss_type="plackett_luce"), 4),
        (ObjectiveConfig(loss_type="kto"), 1),
        (ObjectiveConfig(loss_type="sft"), 1),
        (ObjectiveConfig(loss_type="reward"), 2),
    ],
    ids=lambda value: "+".join(value.loss_types) if isinstance(value, ObjectiveConfig) else "",
)
def test_metrics_do_not_depend_on_how_a_batch_is_cut(parts: list[list[int]], options: ObjectiveConfig, size: int) -> None:
    whole = random_statistics(5, size=size)
    total = collect.empty_vector("cpu", Objective.of(options))
    for part in parts:
        total += vector_of(some_groups(whole, part, size), options)
    assert collect.reduce(total, Objective.of(options)) == pytest.approx(metrics_of(whole, options), rel=1e-12, nan_ok=True)


def test_an_nan_that_counts_shows() -> None:
    statistics = random_statistics(2)
    logps_R = statistics.logps_R.clone()
    logps_R[3] = math.nan
    metrics = metrics_of(replace(statistics, logps_R=logps_R))
    assert math.isnan(metrics["loss"])
    assert math.isfinite(metrics["entropy"])


def test_equal_rewards_are_not_an_accurate_preference() -> None:
    statistics = random_statistics(4)
    metrics = metrics_of(replace(statistics, logps_R=statistics.reference_logps_R))
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["rewards/margins"] == 0.0
    assert metrics["loss"] == pytest.approx(math.log(2))


def test_a_list_is_its_best_answer_against_the_mean_of_the_others() -> None:
    statistics, options = random_statistics(6, size=4), ObjectiveConfig(loss_type="best_vs_rest", beta=BETA)
    rewards_G4 = BETA * (statistics.logps_R - statistics.reference_logps_R).view(6, 4)
    metrics = metrics_of(statistics, options)
    others_G3 = rewards_G4[:, 1:]
    assert metrics["rewards/chosen"] == pytest.approx(float(rewards_G4[:, 0].mean()))
    assert metrics["rewards/rejected"] == pytest.approx(float(others_G3.mean()))
    assert metrics["rewards/margins"] == pytest.approx(float(rewards_G4[:, 0].mean() - others_G3.mean()))
    assert metrics["rewards/accuracies"] == float((rewards_G4[:, 0] > others_G3.amax(1)).double().mean())
    assert 0 < metrics["rewards/accuracies"] < 1


def test_labelled_answers_are_averaged_by_label() -> None:
    statistics, options = random_statistics(9, size=1), ObjectiveConfig(loss_type="kto", beta=BETA)
    desirable = statistics.label_R > 0
    rewards_R = BETA * (statistics.logps_R - statistics.reference_logps_R)
    metrics = metrics_of(statistics, options)
    assert metrics["rewards/chosen"] == pytest.approx(float(rewards_R[desirable].mean()))
    assert metrics["rewards/rejected"] == pytest.approx(float(rewards_R[~desirable].mean()))
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["logps/rejected"] == pytest.approx(float(statistics.logps_R[~desirable].mean()))


def test_a_batch_of_one_label_has_no_number_for_the_other() -> None:
    statistics = random_statistics(3, size=1)
    statistics = replace(statistics, label_R=torch.ones(3))
    metrics = metrics_of(statistics, ObjectiveConfig(loss_type="kto"))
    assert math.isnan(metrics["rewards/rejected"]) and math.isfinite(metrics["rewards/chosen"])


def test_metrics_over_nothing_are_nan() -> None:
    objective = Objective.of(DPO)
    metrics = collect.reduce(collect.empty_vector("cpu", objective), objective, prefix="eval_")
    assert set(metrics) == {f"eval_{name}" for name in objective.metric_names if name not in BY_LENGTH}
    assert all(math.isnan(value) for value in metrics.values())


def test_the_margin_is_told_apart_by_which_answer_is_longer() -> None:
    statistics = random_statistics(6)
    lengths = torch.tensor([5, 3, 4, 4, 2, 9, 8, 1, 3, 7, 6, 6], dtype=torch.float64)
    metrics = metrics_of(replace(statistics, num_tokens_R=lengths, num_completion_tokens_R=lengths))
    margin_P = BETA * (statistics.logps_R - statistics.reference_logps_R).view(-1, 2) @ torch.tensor([1.0, -1.0]).double()
    assert metrics["rewards/margins_chosen_longer"] == pytest.approx(float(margin_P[[0, 3]].mean()))
    assert metrics["rewards/margins_chosen_shorter"] == pytest.approx(float(margin_P[[2, 4]].mean()))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=10,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    )


def statistics_by_transformers(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, rows: list[dict[str, str]]
) -> ResponseStatistics:
    """Per-response statistics worked out one response at a time, without padding."""
    tokenizer = tiny_tokenizer()
    columns: dict[str, list[float]] = {
        name: [] for name in ("logps", "reference_logps", "num_tokens", "entropy", "num_correct", "mean_logit")
    }
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
            tokens = torch.tensor([prompt + answer])
            targets = torch.tensor(answer)
            logits, reference_logits = (
                model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].detach() for model in (policy, reference)
            )
            log_probs, reference_log_probs = logits.log_softmax(-1), reference_logits.log_softmax(-1)
            columns["logps"].append(log_probs.gather(1, targets[:, None]).sum().item())
            columns["reference_logps"].append(reference_log_probs.gather(1, targets[:, None]).sum().item())
            columns["num_tokens"].append(len(answer))
            columns["entropy"].append(-(log_probs.exp() * log_probs).sum().item())
            columns["num_correct"].append((logits.argmax(-1) == targets).sum().item())
            columns["mean_logit"].append(logits.mean(-1).sum().item())
    found = {f"{name}_R": torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    return replace(random_statistics(len(rows)), **found)


def test_names_and_values_are_those_of_trl(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "ab", "chosen": "cde", "rejected": "h"},
        {"prompt": "bcd", "chosen": "a", "rejected": "gfedc"},
        {"prompt": "h", "chosen": "gg", "rejected": "ab"},
    ]
    policy, reference = tiny_llama(1), tiny_llama(2)
    statistics = statistics_by_transformers(policy, reference, rows)
    ours = metrics_of(statistics, prefix="eval_")
    options = DPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        per_device_eval_batch_size=len(rows),
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    data = Dataset.from_list(rows)
    theirs = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=options,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    ).evaluate()
    ours = {name: value for name, value in ours.items() if name.removeprefix("eval_") not in BY_LENGTH}
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4, abs=1e-5)
