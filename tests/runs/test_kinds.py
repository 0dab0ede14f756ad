"""Training on labelled answers, ranked lists and examples: the same numbers in every layout, resumed and unpaired."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.errors import UserError
from tests.helpers.models import hh_rows, save_model
from tests.helpers.runs import assert_same_weights, resumed_and_whole, run_settings, train_each, train_run
from tests.helpers.worlds import run_world

ASSISTANT = "\n\nAssistant:"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model and the same answers as pairs, as labelled rows and, three by three, as ranked lists."""
    directory = tmp_path_factory.mktemp("files")
    save_model(directory / "model", "llama", num_hidden_layers=2)
    # A random model that finds mismatched answers more likely than the other does: KTO's KL is above its floor of 0.
    save_model(directory / "other", "llama", seed=5, num_hidden_layers=2)
    pairs = [pair for row in hh_rows(120) if (pair := _pair(row))][:48]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    lists = [
        {
            "prompt": pair["prompt"],
            "responses": [pair["rejected"], pair["chosen"], other["chosen"], other["rejected"]][: 2 + i % 3],
            "scores": [0.2, 0.9, 0.1, 0.0][: 2 + i % 3],
        }
        for i, (pair, other) in enumerate(itertools.pairwise(pairs))
    ]
    for name, rows in {"pairs": pairs, "labelled": labelled, "lists": lists}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def _pair(row: dict[str, str]) -> dict[str, str] | None:
    prompt, other = (row[side][: row[side].rindex(ASSISTANT) + len(ASSISTANT)] for side in ("chosen", "rejected"))
    chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(other) :]
    usable = prompt == other and chosen.strip() and rejected.strip() and chosen != rejected and len(row["chosen"]) < 250
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} if usable else None


def _of_kind(files: Path, output: Path, rows: str, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = run_settings(files, output, **{"train": {"steps": 3, "warmup_steps": 0}, "objective": objective, **changes})
    settings["data"] |= {"train": str(files / f"{rows}.jsonl")}
    return settings


WAYS: list[tuple[int, dict[str, Any]]] = [
    (1, {"train": {"steps": 3, "warmup_steps": 0, "tokens_per_micro_batch": 420}, "data": {"share_prompts": False}}),
    (2, {"parallel": {"tensor": 2}}),
    (2, {"parallel": {"pipeline": 2}}),
    (2, {}),
]
OBJECTIVES = {"kto": "labelled", "bco": "labelled", "plackett_luce": "lists", "sft": "labelled", "reward": "pairs"}


@pytest.fixture(scope="module")
def three_steps(files, tmp_path_factory) -> dict[str, list[list[dict[str, float]]]]:
    """By objective the records of one process, then of WAYS; runs on as many processes are trained by the same ones."""
    directory, runs = tmp_path_factory.mktemp("layouts"), []
    for loss, rows in OBJECTIVES.items():
        reference = {"mode": "none"} if loss in ("sft", "reward") else {"path": str(files / "model")}
        other = {"reference": reference, "model": {"path": str(files / "other")}}
        for number, (num_processes, changes) in enumerate([(1, {}), *WAYS]):
            output = directory / f"{loss} {number}"
            runs.append((num_processes, loss, _of_kind(files, output, rows, {"loss_type": loss}, **other, **changes)))
    records: dict[int, Any] = {
        size: iter(run_world(size, train_each, [made for number, _, made in runs if number == size])[0]) for size in (1, 2)
    }
    found: dict[str, list[list[dict[str, float]]]] = {loss: [] for loss in OBJECTIVES}
    for num_processes, loss, _ in runs:
        found[loss].append(next(records[num_processes]))
    return found


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.slow
def test_three_steps_are_the_same_in_every_layout(three_steps, loss):
    base, *found = three_steps[loss]
    names = {"kto": ["kl"], "bco": ["delta"], "sft": ["logps/chosen"]}.get(loss, ["rewards/margins"])
    assert all(abs(base[-1][name]) > 1e-4 for name in names)
    for (_, changes), records in zip(WAYS, found, strict=True):
        for ours, theirs in zip(records, base, strict=True):
            for name in ("loss", "grad_norm", *names):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (changes, ours["step"], name)


@pytest.mark.slow
def test_pairs_count_as_their_two_labelled_answers(files, tmp_path):
    objective = {"loss_type": "apo_zero_unpaired", "undesirable_weight": 1.5}
    order = {"shuffle": False, "max_length": None}
    from_pairs = _of_kind(files, tmp_path / "pairs", "pairs", objective, data=order)
    from_labels = _of_kind(files, tmp_path / "labelled", "labelled", objective, data=order)
    from_pairs["train"]["pairs_per_step"], from_labels["train"]["pairs_per_step"] = 4, 8
    from_pairs["train"]["tokens_per_micro_batch"] = from_labels["train"]["tokens_per_micro_batch"] = 1024
    ours, theirs = run_world(1, train_each, [from_pairs, from_labels])[0]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_lists_of_different_lengths_have_the_same_reference_computed_ahead(files, tmp_path):
    objective = {"loss_type": "all_pairs", "list_weights": "score"}
    modes = ("resident", "precomputed")
    runs = [_of_kind(files, tmp_path / mode, "lists", objective, reference={"mode": mode}) for mode in modes]
    resident, ahead = run_world(2, train_each, runs)[0]
    for a, b in zip(resident, ahead, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "rows", "extra"),
    [pytest.param("bco", "labelled", {}, marks=pytest.mark.exhaustive), ("bco_pair", "pairs", {"bco_running_delta": True})],
)
@pytest.mark.slow
def test_delta_is_the_running_mean_of_rewards_and_outlives_a_restart(files, tmp_path, loss, rows, extra):
    def settings(name: str) -> dict[str, Any]:
        changes = {"train": {"steps": 6, "warmup_steps": 0}, "checkpoint": {"every": 2}, "parallel": {"pipeline": 2}}
        return _of_kind(files, tmp_path / name, rows, {"loss_type": loss, **extra}, **changes)

    resumed, whole = resumed_and_whole(2, settings, 3)
    assert whole[0]["delta"] == 0 and abs(whole[-1]["delta"]) > 1e-3
    if loss == "bco_pair":  # equal numbers on both sides: the mean of both is the mean of all
        means = [(record["rewards/chosen"] + record["rewards/rejected"]) / 2 for record in whole]
        assert [record["delta"] for record in whole] == pytest.approx(
            [sum(means[: i + 1]) / (i + 1) for i in range(6)], rel=1e-6, abs=1e-9
        )
    assert resumed == whole
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


def test_equal_models_give_kto_one_half_and_no_kl(files, tmp_path):
    first = run_world(2, train_run, _of_kind(files, tmp_path / "run", "labelled", {"loss_type": "kto"}))[0][0]
    assert first["kl"] == 0.0 and first["loss"] == 0.5 and first["rewards/margins"] == 0.0


def test_prompts_that_may_not_fit_with_other_answers_are_refused(files, tmp_path):
    import megadpo

    settings = _of_kind(files, tmp_path / "run", "labelled", {"loss_type": "kto"})
    settings["train"]["tokens_per_micro_batch"] = 120
    settings["data"]["max_length"] = None
    with pytest.raises(UserError, match=r"tokens_per_micro_batch is 120, but .* tokens together; raise it"):
        megadpo.train(settings)
    assert not (tmp_path / "run").exists()


def test_an_answer_without_a_label_of_the_other_sort_is_refused(files, tmp_path):
    import megadpo

    rows = [line for line in (files / "labelled.jsonl").read_text().splitlines() if json.loads(line)["label"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    settings = _of_kind(files, tmp_path / "run", "labelled", {"loss_type": "kto"})
    settings["data"]["train"] = str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="desirable"):
        megadpo.train(settings)
