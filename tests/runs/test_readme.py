"""The README's commands are run as they stand, on a small model, with only the processes and steps cut down."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megadpo.validation.load import load_config
from tests.helpers.models import save_model, write_hh

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = "train.pairs_per_step=2 train.steps=1 train.epochs=null data.max_length=128"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the README's examples name."""
    directory = tmp_path_factory.mktemp("readme")
    save_model(directory / "MODEL_DIR")
    (directory / "models").mkdir()
    (directory / "models" / "Qwen2.5-0.5B-Instruct").symlink_to(directory / "MODEL_DIR")
    write_hh(directory / "pairs.jsonl", 8)
    (directory / "configs").symlink_to(ROOT / "configs")
    (directory / "run.yaml").write_text(blocks("yaml")[0])
    return directory


def run(command: list[str], workplace: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEGADPO_CACHE": str(workplace / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


def test_the_set_up_commands_are_known_to_launch_sh() -> None:
    found = [command for command in commands() if command.startswith("./launch.sh")]
    assert found == ["./launch.sh quickstart", "./launch.sh test"]
    for command in found:
        environment = {**os.environ, "MEGADPO_DRY_RUN": "1"}
        assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True).returncode == 0


def test_the_minimal_configuration_is_complete(workplace: Path) -> None:
    load_config(workplace / "run.yaml").require_for_training()
    assert set(yaml.safe_load(blocks("yaml")[0])) == {"model", "data", "train", "checkpoint", "output_dir"}


def test_the_train_command_leaves_a_model_that_transformers_loads(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo train configs/dpo.yaml"))
    run(f"{command} {SMALLER} train.warmup_steps=0".split(), workplace)
    output = workplace / "runs" / "first"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "hf"} <= {path.name for path in output.iterdir()}
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(output / "hf")


@pytest.mark.slow
def test_the_python_example_trains_and_reports(workplace: Path) -> None:
    code = blocks("python")[0]
    overrides = f", overrides={SMALLER.split()!r})\nprint("
    assert code.count(")\nprint(") == 1
    output = run([sys.executable, "-c", code.replace(")\nprint(", overrides)], workplace)
    assert "runs/py/hf" in output


@pytest.mark.slow
def test_the_logprobs_and_convert_commands_work_one_after_the_other(workplace: Path) -> None:
    block = next(block for block in blocks("bash") if "megadpo logprobs" in block)
    for line in block.splitlines():
        run(line.split(), workplace)
    lines = [json.loads(line) for line in (workplace / "logprobs.jsonl").read_text().splitlines()]
    assert lines and set(lines[0]) == {"index", "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"}
    assert (workplace / "exported" / "config.json").is_file()


def test_the_plan_command_lists_layouts_for_each_number_of_processes(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo plan"))
    printed = run(command.split(), workplace)
    assert [line.split()[0] for line in printed.splitlines() if " processes: " in line] == command.split()[-2:]


def test_the_plan_command_draws_the_schedule(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo plan") and "--schedule" in command)
    assert "idle" in run(command.split(), workplace)
    assert (workplace / command.split()[-1]).read_text().startswith("<svg")


def test_every_page_that_the_readme_points_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and all((ROOT / target).is_file() for target in targets)
