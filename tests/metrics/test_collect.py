"""Metrics: TRL's numbers, whatever way a batch is cut into micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megadpo.metrics import collect
from megadpo.objectives.statistics import ResponseStatistics

BETA = 0.3


def unused(num_responses: int) -> dict[str, torch.Tensor]:
    """What objectives read and metrics do not."""
    names = ("token_logps_R", "prompt_logps_R", "log_square_R", "num_completion_tokens_R")
    return dict.fromkeys(names, torch.zeros(num_responses))


def statistics_of(num_pairs: int, seed: int = 0) -> ResponseStatistics:
    generator = torch.Generator().manual_seed(seed)

    def random_R() -> torch.Tensor:
        return torch.randn(2 * num_pairs, generator=generator)

    return ResponseStatistics(
        logps_R=random_R().requires_grad_(),
        reference_logps_R=random_R(),
        num_tokens_R=torch.randint(1, 9, (2 * num_pairs,), generator=generator).float(),
        entropy_R=random_R(),
        num_correct_R=random_R(),
        mean_logit_R=random_R(),
        weight_R=torch.ones(2 * num_pairs),
        chosen_P=torch.arange(0, 2 * num_pairs, 2),
        rejected_P=torch.arange(1, 2 * num_pairs, 2),
        **unused(2 * num_pairs),
    )


def pairs(statistics: ResponseStatistics, numbers: list[int]) -> ResponseStatistics:
    """The statistics of some pairs alone."""
    rows = torch.tensor([row for number in numbers for row in (2 * number, 2 * number + 1)])
    fields = {name: value[rows] for name, value in vars(statistics).items() if name.endswith("_R")}
    of_pairs = torch.arange(len(numbers)) * 2
    return replace(statistics, **fields, chosen_P=of_pairs, rejected_P=of_pairs + 1)


def rewards_of(statistics: ResponseStatistics) -> torch.Tensor:
    return BETA * (statistics.logps_R - statistics.reference_logps_R)


def losses_of(statistics: ResponseStatistics) -> torch.Tensor:
    log_ratio_R = statistics.logps_R - statistics.reference_logps_R
    return -torch.nn.functional.logsigmoid(BETA * (log_ratio_R[statistics.chosen_P] - log_ratio_R[statistics.rejected_P]))


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[0], [1, 2, 3, 4]], [[4, 2], [0], [1, 3]]])
def test_metrics_do_not_depend_on_how_a_batch_is_cut(parts: list[list[int]]) -> None:
    whole = statistics_of(5)
    expected = collect.reduce(collect.sums(whole, losses_of(whole), rewards_of(whole)))
    total = collect.empty_vector()
    for part in parts:
        some = pairs(whole, part)
        total += collect.sum_vector(some, losses_of(some), rewards_of(some))
    assert collect.reduce(collect.from_vector(total)) == pytest.approx(expected, rel=1e-12)


def test_adding_sums_equals_adding_their_vectors() -> None:
    first, second = statistics_of(2, seed=1), statistics_of(3, seed=2)
    left, right = (collect.sums(each, losses_of(each), rewards_of(each)) for each in (first, second))
    added = collect.to_vector(left) + collect.to_vector(right)
    assert collect.from_vector(added) == collect.add(left, right)
    assert collect.from_vector(collect.to_vector(left)) == left


def test_a_pair_of_weight_zero_counts_nowhere_even_with_nan_in_it() -> None:
    whole = statistics_of(3)
    expected = collect.sums(pairs(whole, [0, 1]), losses_of(pairs(whole, [0, 1])), rewards_of(pairs(whole, [0, 1])))
    logps_R = whole.logps_R.detach().clone()
    logps_R[4:] = math.nan
    filled = replace(whole, logps_R=logps_R, weight_R=torch.tensor([1.0, 1, 1, 1, 0, 0]))
    assert collect.sums(filled, losses_of(filled), rewards_of(filled)) == expected


def test_an_nan_that_counts_shows() -> None:
    statistics = statistics_of(2)
    metrics = collect.reduce(collect.sums(statistics, torch.tensor([0.5, math.nan]), rewards_of(statistics)))
    assert math.isnan(metrics["loss"])
    assert math.isfinite(metrics["entropy"])


def test_equal_rewards_are_not_an_accurate_preference() -> None:
    statistics = statistics_of(4)
    statistics = replace(statistics, logps_R=statistics.reference_logps_R)
    metrics = collect.reduce(collect.sums(statistics, losses_of(statistics), rewards_of(statistics)))
    assert metrics["rewards/accuracies"] == 0.0
    assert metrics["rewards/margins"] == 0.0
    assert metrics["loss"] == pytest.approx(math.log(2))


def test_metrics_over_nothing_are_nan() -> None:
    metrics = collect.reduce(collect.from_vector(collect.empty_vector()), prefix="eval_")
    assert set(metrics) == {f"eval_{name}" for name in collect.METRIC_SLOTS}
    assert all(math.isnan(value) for value in metrics.values())


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
    of_pairs = torch.arange(len(rows)) * 2
    return ResponseStatistics(
        **{f"{name}_R": torch.tensor(values) for name, values in columns.items()},
        weight_R=torch.ones(2 * len(rows)),
        chosen_P=of_pairs,
        rejected_P=of_pairs + 1,
        **unused(2 * len(rows)),
    )


def test_names_and_values_are_those_of_trl(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "ab", "chosen": "cde", "rejected": "h"},
        {"prompt": "bcd", "chosen": "a", "rejected": "gfedc"},
        {"prompt": "h", "chosen": "gg", "rejected": "ab"},
    ]
    policy, reference = tiny_llama(1), tiny_llama(2)
    statistics = statistics_by_transformers(policy, reference, rows)
    ours = collect.reduce(collect.sums(statistics, losses_of(statistics), rewards_of(statistics)), prefix="eval_")
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
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4, abs=1e-5)
