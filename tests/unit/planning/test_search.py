"""The search for ways to run: all are valid, they fit, the fastest comes first; and what the command prints."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo import cli
from megadpo.errors import UserError
from megadpo.parallel.layout import choose_layout
from megadpo.planning.hardware import Rates, rates_of
from megadpo.planning.job import job_of
from megadpo.planning.search import Search, plan_of, search
from megadpo.planning.step_time import predict
from megadpo.validation.layout import check_layout
from megadpo.validation.load import load_config
from tests.helpers.models import save_tokenizer, write_hh

LLAMA_3_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16_384,
    "intermediate_size": 53_248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA_3_8B = LLAMA_3_405B | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MIXTRAL = LLAMA_3_8B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def write(directory: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """A configuration on a directory with a config.json and nothing else."""
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(model))
    sections["model"] = {"path": str(directory / "model"), **sections.get("model", {})}
    (directory / "run.yaml").write_text(yaml.safe_dump(sections))
    return directory / "run.yaml"


GIB = 2**30
EIGHT_B: dict[str, dict[str, Any]] = {"train": {"pairs_per_step": 128}}


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plan"), LLAMA_3_8B, **EIGHT_B)


@pytest.fixture(scope="module")
def found(run_yaml: Path) -> Search:
    return search(job_of(load_config(run_yaml), 16), Rates(), 72 * GIB, top=8)


@pytest.mark.slow
def test_llama_3_405b_on_4096_devices_takes_less_than_ten_seconds(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA_3_405B, train={"pairs_per_step": 4096})
    started = time.process_time()
    result = search(job_of(load_config(path), 4096), Rates(), 72 * GIB)
    assert time.process_time() - started < 10
    assert len(result.fits) == 5 and result.num_tried > 1000
    best = result.fits[0].step
    assert best.plan.layout.world_size == 4096 and best.gib < 72 and 0.2 < best.mfu < 0.7


def test_every_way_fits_is_valid_and_the_fastest_is_first(run_yaml: Path, found: Search) -> None:
    seconds = [each.step.seconds for each in found.fits]
    assert seconds == sorted(seconds) and len(found.fits) == 8
    for each in found.fits:
        assert each.step.memory.peak <= 72 * GIB
        config = load_config(run_yaml, [f"{name}={value}" for name, value in each.options.items()])
        layout = choose_layout(config.parallel, 16)
        check_layout(layout, each.step.plan.shape, 128)
        assert layout == each.step.plan.layout


def test_no_way_that_was_left_out_is_faster(run_yaml: Path, found: Search) -> None:
    config = load_config(run_yaml)
    job = job_of(config, 16)
    for tensor, pipeline, recompute in ((1, 1, "full"), (2, 1, "small"), (2, 2, "none"), (8, 2, "none"), (4, 4, "none")):
        for capacity in (2048, 4096, 8192, 16_384):
            sizes = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "train.recompute": recompute}
            sizes["train.tokens_per_micro_batch"] = capacity
            held = search(
                job_of(load_config(config, [f"{name}={value}" for name, value in sizes.items()]), 16, list(sizes)),
                Rates(),
                72 * GIB,
                top=1,
            )
            assert not held.fits or held.fits[0].step.seconds >= found.fits[0].step.seconds * (1 - 1e-9)
    assert job.num_devices == 16


def test_what_ways_are_sorted_by_is_never_more_than_what_they_take(run_yaml: Path) -> None:
    layouts = [(2, 1), (4, 1), (8, 1), (4, 2), (4, 4)]
    also = ["split_pairs=true", "zero_bubble=true", "reference=interleaved"]
    one_chunk = [(layout, f"schedule.{option}") for layout, option in itertools.product(layouts[:3], also)]
    for (pipeline, virtual), option in [*((layout, None) for layout in layouts), *one_chunk]:
        sizes = [f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={virtual}", "schedule.name=1f1b"]
        job = job_of(load_config(run_yaml, [*sizes, *([option] if option else [])]), 16)
        plan = plan_of(job.config, job.shape, 16)
        least, whole = (predict(plan, job.workload, Rates(), with_bubbles=each).seconds for each in (False, True))
        assert 0.7 * whole < least <= whole * (1 + 1e-9), (sizes, option, least / whole)


def test_what_the_command_line_names_is_held_to(run_yaml: Path) -> None:
    overrides = ["parallel.tensor=2", "parallel.pipeline=4", "train.recompute=full", "train.tokens_per_micro_batch=4096"]
    held = [text.partition("=")[0] for text in overrides]
    result = search(job_of(load_config(run_yaml, overrides), 16, held), Rates(), 72 * GIB)
    assert result.fits
    for each in result.fits:
        plan = each.step.plan
        assert (plan.layout.tensor, plan.layout.pipeline, plan.recompute, plan.capacity) == (2, 4, "full", 4096)


@pytest.mark.slow
def test_experts_are_spread_under_both_engines_and_over_context_ranks(tmp_path: Path) -> None:
    path = write(tmp_path, MIXTRAL, **EIGHT_B)
    result = search(job_of(load_config(path), 16), Rates(), 72 * GIB)
    spread = [each.step.plan for each in result.fits if each.step.plan.layout.expert > 1]
    assert any(plan.engine == "deepspeed" for plan in spread) and any(plan.layout.context > 1 for plan in spread)
    assert not any("experts" in reason for reason in result.refused)


def test_a_model_that_is_too_large_says_what_is(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(run_yaml), "--devices", "1", "--memory", "1GiB"]) == 1
    printed = capsys.readouterr().out
    assert "Nothing fits on 1 devices" in printed and re.search(r"needs \d+\.\d GiB of 0\.9: [a-z ]+ \d", printed)
    assert cli.main(["plan", str(run_yaml), "--devices", "1", "--memory", "1GiB", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] == [] and answer["does_not_fit"][0]["bytes"] > 0.9 * GIB


def test_the_command_tells_layout_memory_bottleneck_and_yaml(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(run_yaml), "--devices", "8", "--memory", "80GiB", "--top", "2"]) == 0
    printed = capsys.readouterr().out
    assert "8.03 B parameters" in printed and "lengths assumed" in printed and "there is no data.train" in printed
    assert "take" in printed and "GiB on the fullest rank" in printed and "optimizer" in printed
    pasted = yaml.safe_load("train:" + printed.partition("\ntrain:")[2].partition("\n\n")[0])
    assert pasted["train"]["recompute"] in ("none", "small", "full")
    assert cli.main(["plan", str(run_yaml), "--devices", "8", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    best = answer["fits"][0]
    assert sum(best["bytes_by"].values()) == pytest.approx(best["bytes"], abs=1)
    assert sum(best["seconds_by"].values()) == pytest.approx(best["seconds"])
    config = load_config(run_yaml, [f"{name}={value}" for name, value in best["options"].items()])
    merged = yaml.safe_load(best["yaml"])
    for section, values in merged.items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value


def test_lengths_are_those_of_the_data_where_it_is_there(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        LLAMA_3_8B,
        data={"train": str(write_hh(tmp_path / "pairs.jsonl", 40)), "cache_dir": str(tmp_path / "cache"), "num_workers": 1},
    )
    config = load_config(path)
    assert "assumed" in job_of(config, 1).workload.source, "there is no tokenizer"
    save_tokenizer(tmp_path / "model")
    own = job_of(config, 1).workload
    assert own.source.startswith("the first ") and "data.train" in own.source
    longer = job_of(config, 1, prompt_tokens=400, response_tokens=50).workload
    assert "400 and 50" in longer.source and longer.mix.scored < own.mix.scored < 1


def test_more_pairs_and_faster_links_never_make_it_slower_by_the_pair(run_yaml: Path, found: Search) -> None:
    job, best = job_of(load_config(run_yaml), 16), found.fits[0].step
    faster = predict(best.plan, job.workload, rates_of("B200"))
    assert faster.seconds < best.seconds


WRONG = [
    (["--devices", "0"], "--devices must be at least 1, got 0"),
    (["--devices", "8", "--memory", "much"], "--memory 'much' is no size"),
    (["--devices", "8", "--memory", "80"], "--memory '80' is no size"),
    (["--devices", "8", "--card", "H900"], "--card H900 is not known; use one of H100"),
    (["--devices", "8", "--share-of-peak", "2"], "--share-of-peak must be at most 1"),
    (["--devices", "8", "--inter-node", "0"], "--inter-node must be greater than 0"),
    (["--devices", "8", "--top", "0"], "--top must be at least 1"),
    (["--devices", "8", "--prompt-tokens", "0"], "--prompt-tokens must be at least 1"),
    (["--json", "--layouts", "2"], "--json has no effect without --devices"),
    (["--devices", "8", "--layouts", "2"], "not both"),
    (["train.tokens_per_micro_batch=64", "--devices", "8"], "more than train.tokens_per_micro_batch 64"),
    ([], "--devices, --layouts or --schedule is missing"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_wrong_input_is_one_sentence(run_yaml: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        cli.main(["plan", str(run_yaml), *arguments])


@pytest.mark.slow
def test_the_commands_of_the_page_work(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")
    commands = re.findall(r"^megadpo plan .*$", page, re.MULTILINE)
    assert len(commands) == 3
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    commands += re.findall(r"^megadpo plan .*--devices.*$", readme, re.MULTILINE)
    assert len(commands) == 4
    monkeypatch.chdir(run_yaml.parent)
    for command in commands:
        assert cli.main(command.split()[1:]) == 0
    assert capsys.readouterr().out
