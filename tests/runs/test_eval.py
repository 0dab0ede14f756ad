"""`megadpo eval` as it is used: on a run, on RewardBench's rows, with tasks of lm-evaluation-harness; wrong input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadpo.cli import main
from megadpo.errors import UserError
from megadpo.evaluation.tables import console, tables
from tests.helpers.evaluations import evaluate_each, write_rows
from tests.helpers.models import hh_rows, save_model, save_reward_model
from tests.helpers.runs import run_settings, save_files, train_run
from tests.helpers.worlds import run_world

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTIONS = [("the sky is", [" blue", " a question that nobody asks"]), ("one and one are", [" two", " three"])]
DOCUMENTS = [
    {"question": text, "choices": choices, "answer": number % 2} for number, (text, choices) in enumerate(QUESTIONS * 3)
]
TASK = {
    "task": "TASK",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "DATA"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    save_files(directory, "llama", 24, num_hidden_layers=2)
    (directory / "template.jinja").write_text(TEMPLATE)
    rows = [
        {
            "prompt": f"Say {number}.",
            "chosen": f"It is {number}",
            "rejected": "No",
            "subset": subset,
            "chosen_model": "a model",
        }
        for number, subset in enumerate(("alpacaeval-easy", "hep-go", "hep-go"))
    ]
    write_rows(directory / "bench.jsonl", rows)
    return directory


def train_and_evaluate(settings: dict[str, Any], commands: list[list[str]], cache: str) -> tuple[Any, Any]:
    """Metrics of the run, and what each command says after it."""
    return train_run(settings), evaluate_each(commands, cache)


@pytest.fixture(scope="module")
def of_run(files: Path) -> tuple[list[dict[str, float]], list[Any]]:
    """A run's metrics; its evaluation, by its directory and by its YAML file; of a checkpoint; of the model with itself."""
    run, held_out = files / "run", {"eval": str(files / "eval.jsonl"), "chat_template": str(files / "template.jinja")}
    settings = run_settings(files, run, data=held_out, objective={"beta": 0.5}, train={"steps": 2})
    (files / "run.yaml").write_text(yaml.safe_dump(settings))
    bench = ["--data", str(files / "bench.jsonl"), "--generate", "2", "--max-new-tokens", "4", "--reference", "none"]
    commands = [
        [str(run)],
        [
            str(files / "run.yaml"),
            "--model",
            str(run / "checkpoints" / "step_00000002"),
            "--generate",
            "1",
            "--max-new-tokens",
            "2",
        ],
        ["--model", str(run / "hf"), *bench, "data.max_length=64"],
        ["--model", str(files / "model"), "--reference", str(files / "model"), "--data", str(files / "eval.jsonl")],
        [str(run), "--data", str(files / "bench.jsonl"), "--chat", "no"],
    ]
    return run_world(1, train_and_evaluate, settings, commands, str(files / "cache"))[0]


@pytest.mark.slow
def test_a_run_s_evaluation_is_the_one_that_training_did_after_its_last_step(
    files: Path, of_run: tuple[list[dict[str, float]], list[Any]]
) -> None:
    last, report = of_run[0][-1], of_run[1][0]
    assert (report["score"], report["beta"], report["reference"]) == ("log_ratio", 0.5, str(files / "model"))
    assert report["all"]["accuracy"] == last["eval_rewards/accuracies"]
    assert report["all"]["margin"] == pytest.approx(last["eval_rewards/margins"], rel=1e-5, abs=1e-6)
    assert report["all"]["chosen_logp"] == pytest.approx(last["eval_logps/chosen"], rel=1e-6)
    assert [record["name"] for record in report["subsets"]] == ["eval"]
    written = json.loads((files / "run" / "eval" / "eval.json").read_text())
    assert written == of_run[1][4], "the last evaluation replaces the first"


@pytest.mark.parametrize(
    ("options", "reference", "mode", "remark"),
    [
        (
            {"model": {"quantization": "nf4", "quantization_block_size": 128}, "adapter": {"kind": "lora"}},
            "model",
            "precomputed",
            "the run held its frozen weights in 4 bits (model.quantization nf4); here they are not quantised",
        ),
        ({"objective": {"loss_type": "kto", "desirable_weight": 1.5}}, "model", "resident", None),
        ({"objective": {"loss_type": ["bco", "kto"]}, "reference": {"path": "other"}}, "other", "resident", None),
        ({"objective": {"loss_type": "simpo"}}, None, "none", None),
    ],
    ids=["QLoRA", "KTO", "KTO beside another loss", "SimPO"],
)
def test_a_run_is_evaluated_whatever_it_was_trained_with(
    options: dict[str, Any], reference: str | None, mode: str, remark: str | None, tmp_path: Path
) -> None:
    from megadpo.evaluation.request import open_run

    settings = {"output_dir": str(tmp_path / "run"), **options}
    settings["model"] = {"path": str(tmp_path / "model")} | options.get("model", {})
    if "reference" in options:
        settings["reference"] = {"path": str(tmp_path / reference)}
    settings["data"] = {"train": str(tmp_path / "train.jsonl")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    found = open_run(str(tmp_path / "run.yaml"), [])
    assert found.reference == (None if reference is None else str(tmp_path / reference))
    assert found.config.reference.mode == mode and found.config.model.quantization == "none"
    assert found.remarks == (() if remark is None else (remark,))


def test_a_checkpoint_of_a_run_is_evaluated_as_its_export_is(of_run: tuple[list[dict[str, float]], list[Any]]) -> None:
    export, checkpoint, *_ = of_run[1]
    assert checkpoint["subsets"] == export["subsets"]
    assert checkpoint["generations"][0]["policy_ids"] and checkpoint["kl"]["num_answers"] == 1


def test_prompts_of_reward_bench_are_messages_to_the_template_as_trained(
    files: Path, of_run: tuple[list[dict[str, float]], list[Any]]
) -> None:
    report, plain = of_run[1][2], of_run[1][4]
    assert [record["prompt"] for record in report["generations"]] == [f"user:Say {n}.\nassistant:" for n in (0, 1)]
    assert report["score"] == "log_prob" and report["reference"] is None
    assert [(one["name"], one["num_subsets"]) for one in report["sections"]] == [("Chat", 1), ("Reasoning", 1)]
    tokenizer = AutoTokenizer.from_pretrained(files / "run" / "hf")
    assert tokenizer.chat_template == TEMPLATE
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Say 0."}], add_generation_prompt=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(files / "run" / "hf", dtype=torch.float32)
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)[0, len(ids) :].tolist()
    assert report["generations"][0]["policy_ids"] == answer
    assert plain["all"]["chosen_logp"] != report["all"]["chosen_logp"], "--chat no: the text as it is"


def test_a_model_against_itself_is_all_ties_and_that_is_said(of_run: tuple[list[dict[str, float]], list[Any]]) -> None:
    report = of_run[1][3]
    assert (report["all"]["num_ties"], report["all"]["accuracy"]) == (report["all"]["num_pairs"], 0)
    assert "12 of 12 pairs are ties, which count as not won (model and reference are the same)" in report["remarks"]


def test_the_tables_show_what_there_is(
    of_run: tuple[list[dict[str, float]], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for report in of_run[1]:
        console().print(tables(report))
        shown = capsys.readouterr().out
        for record in report["subsets"]:
            assert f"{100 * record['accuracy']:.1f} %" in shown and record["name"] in shown
        assert all(remark.split()[0] in shown for remark in report["remarks"])
        assert ("Answers (greedy)" in shown) is ("generations" in report)


@pytest.fixture(scope="module")
def workplace(files: Path, of_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the manual's commands name."""
    directory = tmp_path_factory.mktemp("workplace")
    (directory / "runs").mkdir()
    named = {"MODEL_DIR": "model", "REFERENCE_DIR": "run/hf", "runs/first": "run"}
    named |= {"pairs.jsonl": "eval.jsonl", "more.jsonl": "train.jsonl"}
    for name, target in named.items():
        (directory / name).symlink_to(files / target)
    (directory / "TASK_DIR").mkdir()
    documents = write_rows(directory / "TASK_DIR" / "documents.jsonl", DOCUMENTS)
    (directory / "TASK_DIR" / "task.yaml").write_text(yaml.safe_dump(TASK).replace("DATA", str(documents)))
    return directory


def manual_s_commands() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "eval.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]


@pytest.mark.parametrize("command", manual_s_commands()[:-1])
@pytest.mark.slow
def test_the_manual_s_commands_do_what_it_says(
    workplace: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("MEGADPO_CACHE", str(workplace / "cache"))
    program, *arguments = command.split()
    assert program == "megadpo" and main(arguments) == 0
    printed = capsys.readouterr().out
    if "--json" in arguments:
        report = json.loads(printed)
        assert [record["name"] for record in report["subsets"]] == ["easy", "hard"] and len(report["generations"]) == 2
        return
    assert "Reward accuracy by log_ratio" in printed and "Calibration" in printed
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "runs/first/eval"
    assert {path.name for path in (workplace / out).iterdir()} == {"eval.json", "pairs.jsonl"}


def test_tasks_of_the_harness_run_on_the_export(
    files: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(workplace)
    arguments = [*manual_s_commands()[-1].split()[1:], "--json", "model.dtype=fp32"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    right = []
    for document in DOCUMENTS:
        question = tokenizer(document["question"], add_special_tokens=False)["input_ids"]
        scores = []
        for choice in document["choices"]:
            ids = tokenizer(document["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logps[place - 1, ids[place]].item() for place in range(len(question), len(ids))))
        right.append(scores[document["answer"]] == max(scores))
    assert report["harness"]["TASK"]["acc,none"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("has_template", [False, True])
def test_questions_of_the_harness_are_messages_where_that_is_asked_for_and_can_be(
    wrong: Path, tmp_path: Path, has_template: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(wrong / "model", tmp_path / "model")
    if has_template:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    asked: list[Any] = []
    monkeypatch.setattr("megadpo.evaluation.evaluate.require_harness", lambda options: None)
    monkeypatch.setattr("megadpo.evaluation.evaluate.run_harness", lambda *arguments: asked.append(arguments[2]) or {})
    arguments = ["eval", "--model", str(model), "--harness", "task"]
    assert main(arguments) == 0 and not asked.pop().apply_chat_template
    if has_template:
        assert main([*arguments, "--harness-chat"]) == 0 and asked.pop().apply_chat_template
    else:
        with pytest.raises(UserError, match=r"--harness-chat: the tokenizer in .* has no chat template"):
            main([*arguments, "--harness-chat"])


@pytest.mark.exhaustive  # the harness looks through all of its tasks, which takes it ten seconds
def test_a_task_that_the_harness_does_not_have_is_named() -> None:
    pytest.importorskip("lm_eval")
    from megadpo.evaluation.harness import run_harness
    from megadpo.evaluation.request import Harness

    with pytest.raises(UserError, match="--harness: lm-evaluation-harness has no task no_such_task; `lm_eval ls tasks`"):
        run_harness("model", "model", Harness(("no_such_task",)), torch.float32, seed=0)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wrong")
    save_model(directory / "model", num_hidden_layers=1)
    save_reward_model(directory / "reward", num_hidden_layers=1)
    write_rows(directory / "pairs.jsonl", hh_rows(2))
    write_rows(directory / "answers.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    write_rows(directory / "nothing.jsonl", [{"text": "a"}])
    (directory / "empty").mkdir()
    return directory


DATA = "--data pairs.jsonl"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "eval needs a model: megadpo eval --model DIR --data FILE, or megadpo eval RUN"),
        ("one two", "eval takes one run, got one and two; data is given as --data FILE"),
        ("model", "model is not the directory of a run; a model is given as --model DIR"),
        ("empty", "empty is not the directory of a run; a run has a config.yaml"),
        ("--model nowhere --data pairs.jsonl", "--model: there is no directory nowhere"),
        ("--model model", "there is nothing to evaluate on: give pairs with --data FILE"),
        ("--model model --data nothing.json", "data: nothing.json does not exist"),
        ("--model model --data answers.jsonl", "answers.jsonl:1: the row is one labelled answer"),
        (
            f"--model model {DATA} --subset-column kind",
            "--subset-column kind: no row has it; the rows have chosen, rejected",
        ),
        (f"--model model {DATA} --reference nowhere", "--reference: there is no directory nowhere"),
        (f"--model model {DATA} --score log_ratio", "--score log_ratio needs a reference"),
        (f"--model model {DATA} --score margin", "--score 'margin' must be one of log_ratio, mean_log_ratio"),
        (f"--model model {DATA} --score reward", "--score reward: the model has no scalar head"),
        (f"--model model {DATA} --chat yes", "--chat yes: the tokenizer has no chat template"),
        (f"--model model {DATA} --beta 0", "objective.beta must be greater than 0"),
        (f"--model model {DATA} --top-p 0.5", "--top-p has no effect without --generate N"),
        (f"--model model {DATA} --harness-limit 3", "--harness-limit has no effect without --harness TASK"),
        (f"--model model {DATA} --harness-chat", "--harness-chat has no effect without --harness TASK"),
        (f"--model model {DATA} --generate 0", "--generate must be a number of prompts from 1 up or a file, got 0"),
        (f"--model model {DATA} --generate 2 --temperature -1", "--temperature must be 0 (greedy) or more, got -1.0"),
        (f"--model model {DATA} --generate 2 --top-p 0.5", "--top-p 0.5 is for sampling"),
        (f"--model model {DATA} --generate nothing.jsonl", "nothing.jsonl:1: the row has no `prompt` and no `messages`"),
        (f"--model model {DATA} --generate 2 --generator vllm", "--generator vllm: vllm is not installed here"),
        (f"--model model {DATA} --harness , ", "--harness names no task"),
        (f"--model reward {DATA} --reference model", "--reference is for language models, and the model is a reward model"),
        (f"--model reward {DATA} --generate 2", "--generate: reward is a reward model, which writes nothing"),
        ("--model model --generate 2", "--generate 2 takes prompts of --data, and there is none"),
        (f"--model model {DATA} --out pairs.jsonl", "--out: pairs.jsonl cannot be made"),
        (f"--model model {DATA} parallel.tensor=2", "parallel"),
    ],
)
def test_wrong_input_is_one_sentence(wrong: Path, line: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("MEGADPO_CACHE", str(wrong / "cache"))
    with pytest.raises(UserError) as refused:
        main(["eval", *line.split()])
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
