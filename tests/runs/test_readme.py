"""What README, CONTRIBUTING and the pages say can be done can be done.

The README's commands are run as they stand, on a small model, with only the processes and steps cut down; the others' are
held to what the tools they name take. Links and paths lead somewhere.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megadpo.validation.load import load_config
from tests.helpers.launched import finish_command
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
    """What a command prints. Those of megadpo are forked with their workers, but for `doctor`, which starts processes."""
    if command[0] == "megadpo" and command[1] != "doctor":
        status, output = finish_command(command[1:], workplace, MEGADPO_CACHE=str(workplace / "cache"))
        assert status == 0, f"{command}: {output}"
        return output
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


def test_the_eval_command_judges_what_was_trained(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo eval"))
    if not (workplace / "runs" / "first" / "hf").is_dir():
        test_the_train_command_leaves_a_model_that_transformers_loads(workplace)
    assert "Reward accuracy by log_ratio" in run(command.split(), workplace)
    (subset,) = json.loads((workplace / "runs" / "first" / "eval" / "eval.json").read_text())["subsets"]
    assert subset["name"] == "pairs" and subset["num_pairs"] > 0


@pytest.mark.slow
def test_the_report_command_writes_the_page_of_the_run_that_the_train_command_has_left(workplace: Path) -> None:
    if not (workplace / "runs" / "first").is_dir():  # the fast tests were left out
        test_the_train_command_leaves_a_model_that_transformers_loads(workplace)
    command = next(command for command in commands() if command.startswith("megadpo report"))
    (workplace / "runs" / "first" / "report.html").unlink()
    assert "finished" in run(command.split(), workplace)
    assert "Findings" in (workplace / "runs" / "first" / "report.html").read_text()


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


@pytest.mark.slow
def test_the_plan_command_lists_layouts_for_each_number_of_processes(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo plan"))
    printed = run(command.split(), workplace)
    assert [line.split()[0] for line in printed.splitlines() if " processes: " in line] == command.split()[-2:]


@pytest.mark.slow
def test_the_plan_command_draws_the_schedule(workplace: Path) -> None:
    command = next(command for command in commands() if command.startswith("megadpo plan") and "--schedule" in command)
    assert "idle" in run(command.split(), workplace)
    assert (workplace / command.split()[-1]).read_text().startswith("<svg")


@pytest.mark.slow
def test_the_inspect_and_doctor_commands_find_nothing_that_stops_a_run(workplace: Path) -> None:
    found = [command for command in commands() if command.startswith(("megadpo inspect", "megadpo doctor"))]
    assert found == [
        command
        for name in ("inspect", "doctor")
        for command in shell_lines(ROOT / "docs" / f"{name}.md")
        if command != "megadpo doctor"
    ]
    alone = [f"{command.partition(' --nproc')[0]} output_dir=runs/looked" for command in found]
    inspected, examined = (run(command.split(), workplace) for command in alone)
    assert "8 of 8 pairs kept" in inspected and (workplace / found[0].split()[-1]).read_text().startswith("<!DOCTYPE html>")
    assert examined.endswith(" 0 failed\n") and "ok      disk: " in examined
    assert not (workplace / "runs" / "looked").exists()


PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "csrc" / "README.md",
    ROOT / "benchmarks" / "results.md",
]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FOLDERS = ("megadpo", "tests", "tools", "benchmarks", "docs", "csrc", "examples", "configs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for target, _, section in links:
        file = page.parent / target if target else page
        assert file.is_file(), target
        if section:
            assert section in sections(file), f"{target}#{section}"
    for path in re.findall(r"`([a-z]+/[\w./-]*)`", text):
        is_ours = path.partition("/")[0] in FOLDERS or path.endswith(".py")
        if is_ours and not re.search("NAME|FOLDER|FILE", path):
            # The list of every file names those of a folder as they are inside it.
            found = [ROOT / path, ROOT / "megadpo" / path, *(ROOT / "megadpo").glob(f"*/{path}")]
            assert any(file.exists() for file in found), path


def test_the_manual_s_order_names_every_page() -> None:
    order = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name}" in order for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def sections(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_lines(page: Path) -> list[str]:
    found = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.partition(" #")[0].strip() for block in found for line in block.splitlines() if line]


def test_the_commands_of_contributing_are_known_to_launch_sh_or_write_a_page() -> None:
    for line in shell_lines(ROOT / "CONTRIBUTING.md"):
        words = shlex.split(line)
        if words[0] == "./launch.sh":
            environment = {**os.environ, "MEGADPO_DRY_RUN": "1"}
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and (words[1] == "install" or words[-1] in done.stdout.replace("\\", "")), line
        else:
            assert words[:2] == ["python", "-m"] and words[3:] == ["--write"], line
            assert "--write" in (ROOT / f"{words[2].replace('.', '/')}.py").read_text(encoding="utf-8"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_take_the_arguments_and_the_keys_that_it_gives_them(page: Path) -> None:
    from megadpo.cli import parser

    for line in shell_lines(page):
        words = shlex.split(line)
        if words[0] == "megadpo":
            arguments = parser().parse_args(words[1:])
            overrides = [word for word in words[2:] if re.fullmatch(r"[a-z_]+\.\w+=.*|output_dir=.*", word)]
            files = [ROOT / word for word in words if word.startswith(("configs/", "examples/"))]
            load_config(files[0] if files else {}, [word for word in overrides if arguments.command != "convert"])


@pytest.mark.parametrize(
    "page",
    [ROOT / "docs" / "performance.md", ROOT / "docs" / "many_gpus.md", ROOT / "benchmarks" / "results.md"],
    ids=lambda p: p.name,
)
def test_the_benchmarks_take_the_options_that_the_pages_give_them(page: Path) -> None:
    from benchmarks.__main__ import BENCHMARKS, parser_of

    lines = [shlex.split(line) for line in shell_lines(page)]
    named = [words for words in lines if words[:3] == ["python", "-m", "benchmarks"] and words[3] != "--list"]
    assert named
    for words in named:
        assert words[3] in BENCHMARKS
        parser_of(words[3], importlib.import_module(f"benchmarks.{words[3]}")).parse_args(words[4:])


def test_pre_commit_runs_what_ci_runs_before_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is fetched"
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    checks = [line for line in lines if line.startswith("./launch.sh exec")]
    assert checks == [hook["entry"] for hook in hooks[0]["hooks"]]
    contributing = shell_lines(ROOT / "CONTRIBUTING.md")
    assert set(checks) <= set(contributing)
