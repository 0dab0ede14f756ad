"""The commands: what they accept, what they answer, and their exit status; launch.sh around them."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadpo import __version__, cli
from megadpo.errors import UserError
from megadpo.launch.launchers import Request, is_worker

ROOT = Path(__file__).parents[2]


def megadpo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    command = [sys.executable, "-m", "megadpo", *arguments]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], "the following arguments are required: CONFIG; see megadpo train --help"),
        (["train", "no.yaml"], "configuration file 'no.yaml' does not exist"),
        (["train", str(ROOT / "configs/dpo.yaml"), "train.stepz=3"], "did you mean train.steps?"),
        (["train", str(ROOT / "configs/dpo.yaml"), "--nproc", "0"], "--nproc must be at least 1"),
        (["train", str(ROOT / "configs/dpo.yaml"), "--steps", "3"], "unrecognized arguments: --steps"),
        (["train", str(ROOT / "configs/dpo.yaml"), "output_dir="], "output_dir must be text, got null"),
        (["trian"], "invalid choice: 'trian'"),
        (
            ["train", str(ROOT / "configs/dpo.yaml"), "--train.steps=3"],
            "option of the configuration is written train.steps=3,",
        ),
        (["plan", "c.yaml"], "--devices, --layouts or --schedule is missing; for example megadpo plan run.yaml --devices 8"),
        (["plan", "--layouts", "4"], "plan needs the configuration file CONFIG"),
        (["plan", "--schedule"], "plan needs the configuration file CONFIG"),
        (["plan", "--layouts", "4", "no.yaml", "8"], "configuration file 'no.yaml' does not exist"),
        (["plan", str(ROOT / "configs/dpo.yaml"), "--layouts", "two"], "--layouts takes numbers of processes, got 'two'"),
        (["inspect"], "the following arguments are required: CONFIG; see megadpo inspect --help"),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
        (["doctor", "--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["convert", "import", "a", "b", "context=2"], "unknown layout 'context=2'"),
        (["convert", "import", "a", "b", "tensor=0"], "parallel.tensor must be at least 1"),
        (["convert", "export", "a", "b", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["convert", "export", "a", "b", "--format", "torch_dist", "--processes", "2"], "--processes is for --format hf"),
        (["convert", "verify", "a"], "the following arguments are required: OTHER"),
        (["convert", "inspect", "no-such-directory"], "no-such-directory is no directory"),
        (["logprobs", "--model", "m"], "the following arguments are required: --data, --out"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence_and_status_2(arguments: list[str], sentence: str) -> None:
    result = megadpo(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    said = [line for line in result.stderr.splitlines() if "at work" not in line]  # as a busy machine has it say
    assert len(said) == 1 and said[0].startswith("megadpo: error: ")
    assert sentence in result.stderr


def test_a_wrong_configuration_is_refused_before_any_worker_starts() -> None:
    result = megadpo("train", str(ROOT / "configs/dpo.yaml"), "train.seed=x", "--nproc", "2")
    assert result.returncode == 2 and result.stderr.startswith("megadpo: error: command line: train.seed must be")


def test_nproc_inside_torchrun_has_to_agree_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_worker(Request(nproc=2))
    for request in (Request(nproc=4), Request("torchrun", nproc=2)):
        with pytest.raises(UserError, match="already one of 2"):
            is_worker(request)


def test_overrides_may_stand_on_both_sides_of_nproc() -> None:
    parse = cli.parser().parse_args
    for line in ("train c.yaml a=1 b=2 --nproc 2", "train --nproc 2 c.yaml a=1 b=2", "train c.yaml a=1 --nproc 2 b=2"):
        arguments = parse(line.split())
        assert (arguments.config, arguments.override, arguments.nproc) == ("c.yaml", ["a=1", "b=2"], 2)


def test_help_and_version_answer_without_importing_torch() -> None:
    assert megadpo("--version").stdout == f"megadpo {__version__}\n"
    for command in (["--help"], ["train", "--help"], ["convert", "import", "--help"]):
        assert megadpo(*command).returncode == 0
    code = "import sys, megadpo, megadpo.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_command_says_what_it_is() -> None:
    page = megadpo("--help").stdout
    for name, command in cli.COMMANDS.items():
        assert f"    {name}" in page and command.HELP in " ".join(page.split())


def test_megadpo_train_is_a_function_even_after_its_module_is_imported() -> None:
    code = "import megadpo; from megadpo.training.trainer import run_training; assert callable(megadpo.train)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def launch_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch.sh with a fresh environment in which nothing is installed or run."""
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        [str(ROOT / "launch.sh"), *arguments],
        env={**clean, "MEGADPO_DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("quickstart", "python {root}/examples/quickstart/run.py"),
        ("test -k name", "python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -k name"),
        ("train c.yaml a=1", "python -m megadpo train c.yaml a=1"),
        (
            "train --nproc 4 c.yaml a=1",
            "python -m torch.distributed.run --nproc-per-node=4 --standalone -m megadpo train c.yaml a=1",
        ),
        (
            "train c.yaml --nnodes=2 --node-rank 1 --master head:4000 --nproc=8",
            "python -m megadpo train c.yaml --nproc 8 --nnodes 2 --node-rank 1 --master head:4000",
        ),
        ("logprobs --model m", "python -m megadpo logprobs --model m"),
        ("convert export a b", "python -m megadpo convert export a b"),
    ],
)
def test_launch_sh_turns_its_arguments_into_one_command(arguments: str, command: str) -> None:
    result = launch_sh(*arguments.split())
    assert result.stdout.rstrip().partition(".venv/bin/")[2] == command.format(root=ROOT), result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train c.yaml --nnodes 2", "--nnodes 2 needs --master HOST[:PORT]"),
        ("train c.yaml --nnodes 2 --master a", "needs --node-rank, from 0 to 1"),
        ("train c.yaml --nnodes 2 --master a --node-rank 2", "--node-rank 2 is not below --nnodes 2"),
        ("train c.yaml --nproc", "--nproc needs a value"),
        ("train c.yaml --nproc many", "--nproc must be a whole number above 0, got many"),
        ("train c.yaml --node-rank 1", "--node-rank 1 needs --nnodes > 1"),
        ("exec", "exec needs a command"),
    ],
)
def test_launch_sh_refuses_half_a_description_of_machines(arguments: str, sentence: str) -> None:
    result = launch_sh(*arguments.split())
    assert result.returncode == 2 and sentence in result.stderr


def test_launch_sh_uses_the_active_environment_that_has_megadpo() -> None:
    result = launch_sh("train", "c.yaml", VIRTUAL_ENV=str(Path(sys.prefix)))
    expected = Path(sys.prefix) / "bin" / "python"
    assert result.stdout.split()[0] == str(expected)


def test_launch_sh_does_not_install_from_many_tasks_at_once(tmp_path: Path) -> None:
    for name in ("launch.sh", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "MEGADPO_DRY_RUN")}
    result = subprocess.run(
        [str(tmp_path / "launch.sh"), "train", "c.yaml"],
        env={**clean, "SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "run ./launch.sh install once before the job" in result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "script", ["launch.sh", ".ci/run", "configs/clusters/slurm.sbatch", "examples/slurm_requeue.sbatch"]
)
def test_shell_scripts_are_valid_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0


def test_slurm_template_starts_one_task_per_gpu_through_launch_sh(tmp_path: Path) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "scontrol").write_text("#!/bin/sh\necho n1\necho n2\n")
    (bin_dir / "srun").write_text('#!/bin/sh\necho "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS"\necho "$@"\n')
    for program in bin_dir.iterdir():
        program.chmod(0o755)
    environment = {
        "SLURM_SUBMIT_DIR": "/p",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "12",
    }
    result = subprocess.run(
        ["bash", str(ROOT / "configs/clusters/slurm.sbatch"), "c.yaml", "a=1"],
        env={**os.environ, **environment, "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    meeting, command = result.stdout.splitlines()
    assert meeting == "n1 20007 12"
    assert command == "--kill-on-bad-exit=1 --cpus-per-task=12 /p/launch.sh train c.yaml a=1"


@pytest.mark.alone
def test_the_command_line_starts_fast() -> None:
    start = time.monotonic()
    megadpo("--help")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("given", "found"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given: dict[str, str], found: str, tmp_path: Path) -> None:
    """As torch finds it, when it is loaded."""
    (tmp_path / "torch.py").write_text("import os\nraise ImportError('policy ' + os.environ['OMP_WAIT_POLICY'])")
    (tmp_path / "run.yaml").write_text("{model: {path: m}, data: {train: t.jsonl}, output_dir: o}")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "megadpo", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env={**clean, **path, **given}, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert f"policy {found}" in done.stderr
