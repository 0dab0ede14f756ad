"""Two machines, here two network namespaces joined by a cable: one run over both, started as the README tells a user to.

Nothing but the cable connects them: each has a loopback of its own. Skipped where namespaces may not be made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.launched import Launched, finish_command, start_command
from tests.helpers.models import save_model, write_hh
from tests.helpers.worlds import path_with_mpirun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOSTS = ("10.203.77.1", "10.203.77.2")
LIMIT_SECONDS = 30


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them, their addresses HOSTS."""
    names = [f"megadpo-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"mdpo{os.getpid() % 100000}{letter}" for letter in "ab"]
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {cables[0]} type veth peer name {cables[1]}")
    for name, cable, host in zip(names, cables, HOSTS, strict=True):
        commands += [f"link set {cable} netns {name}", f"-n {name} addr add {host}/24 dev {cable}"]
        commands += [f"-n {name} link set {cable} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            try:
                result = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no ip command (iproute2) on this machine")
            if result.returncode:
                pytest.skip(f"this machine does not let us make network namespaces: ip {command}: {result.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and pairs, on the file system that both machines share."""
    directory = tmp_path_factory.mktemp("two-nodes")
    save_model(directory / "model", num_hidden_layers=2)
    write_hh(directory / "pairs.jsonl", 20)
    return directory


def readme_command(row: str = "several machines") -> str:
    """The README's line for several machines, or of another row of the same table."""
    (line,) = re.findall(rf"^\| {row}.* \| `([^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return line


def overrides(files: Path, output: str, **more: object) -> list[str]:
    options = {
        "model.path": files / "model",
        "model.dtype": "fp32",
        "data.train": files / "pairs.jsonl",
        "data.cache_dir": files / "cache",
        "data.max_length": 96,
        "train.steps": 3,
        "train.pairs_per_step": 4,
        "train.learning_rate": 1e-3,
        "logging.tensorboard": "false",
        "output_dir": files / output,
        **more,
    }
    return [f"{name}={value}" for name, value in options.items()]


def start(node: str | None, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """`command` in a session of its own, inside a namespace where one is given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "GLOO_", "RANK", "WORLD_SIZE"))}
    own = {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        ["ip", "netns", "exec", node, *command] if node else command,
        cwd=ROOT,
        env={**clean, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def fork(node: str, files: Path, command: list[str], **environment: str) -> Launched:
    """A command with ./launch.sh on one of the machines: what launch.sh makes of it, forked with its workers."""
    own = {"MEGADPO_DRY_RUN": "1", "VIRTUAL_ENV": sys.prefix}
    made = subprocess.run(command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=True)
    words = shlex.split(made.stdout)
    assert words[1:4] == ["-m", "megadpo", "train"], made.stdout
    return start_command(words[3:], files, Path("/run/netns", node), **environment)


def on_both(nodes: list[str], config: Path, options: list[str], **environment: str) -> list[Launched]:
    return [on_node(number, nodes, config, options, **environment) for number in range(2)]


def on_node(number: int, nodes: list[str], config: Path, options: list[str], **environment: str) -> Launched:
    """The README's command on one of the machines, with one process each."""
    command = readme_command()
    for placeholder, value in (
        ("--node-rank 0", f"--node-rank {number}"),
        ("HOST", HOSTS[0]),
        ("--nproc 8", "--nproc 1"),
        ("run.yaml", str(config)),
    ):
        assert command.count(placeholder) == 1, command
        command = command.replace(placeholder, value)
    return fork(nodes[number], config.parent, [*command.split(), *options], **environment)


def with_hostfile(row: str, files: Path, config: Path) -> list[str]:
    """The command of a row of the README's table that names a hostfile: both machines, by their addresses."""
    hosts = files / "hosts"
    hosts.write_text("".join(f"{host} slots=1  # a process each\n" for host in HOSTS))
    command = readme_command(row).split()
    assert command.count("hosts") == command.count("run.yaml") == 1, command
    return [{"hosts": str(hosts), "run.yaml": str(config)}.get(word, word) for word in command]


def finish(process: subprocess.Popen[str] | Launched, seconds: float = 200) -> tuple[int, str]:
    if isinstance(process, Launched):
        return process.wait(seconds), process.output()
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        stop(process.pid)
        output, _ = process.communicate()
        pytest.fail(f"still running after {seconds} s: {output}")
    return process.returncode, output


def stop(process: int) -> None:
    """Kill a process and everything it has started, as a machine that loses its power does."""
    family = [process, *(child.pid for child in psutil.Process(process).children(recursive=True))]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def config(files: Path) -> Path:
    path = files / "run.yaml"
    path.write_text("train:\n  tokens_per_micro_batch: 400\n")
    return path


def metrics(directory: Path) -> list[dict[str, float]]:
    names = ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in names} for line in lines]


@pytest.fixture(scope="module")
def alone(files: Path, config: Path) -> list[dict[str, float]]:
    """The metrics of one process."""
    status, output = finish_command(["train", str(config), *overrides(files, "alone")], files)
    assert status == 0, output
    return metrics(files / "alone")


def check(runs: Sequence[subprocess.Popen[str] | Launched], directory: Path, alone: list[dict[str, float]]) -> None:
    """All runs end well and leave the metrics of one process."""
    for status, output in [finish(run) for run in runs]:
        assert status == 0, output
    for ours, theirs in zip(metrics(directory), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("pipeline", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_run_over_two_machines_gives_the_metrics_of_one_process(nodes, files, config, alone, pipeline):
    name = f"pipeline {pipeline}"
    runs = on_both(nodes, config, overrides(files, name, **{"parallel.pipeline": pipeline}))
    check(runs, files / name, alone)


@pytest.mark.parametrize(
    "launcher", ["megadpo", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("torchrun", "deepspeed"))]
)
def test_so_does_a_run_over_the_machines_of_a_hostfile(nodes, files, config, alone, launcher):
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    command = [*with_hostfile("… listed in a file", files, config), "--launcher", launcher, *overrides(files, launcher)]
    if launcher == "megadpo":
        check([fork(node, files, command) for node in nodes], files / launcher, alone)
    else:
        check([start(node, command) for node in nodes], files / launcher, alone)


@pytest.mark.parametrize(
    ("kind", "shell"),
    [
        ("openmpi", "OMPI_MCA_plm_rsh_agent"),
        pytest.param("mpich", "HYDRA_LAUNCHER_EXEC", marks=pytest.mark.exhaustive),  # on one machine in test_launchers.py
    ],
)
def test_so_does_mpirun_which_is_started_once_and_reaches_the_other_machine_itself(
    nodes, files, config, alone, tmp_path, kind, shell
):
    """With a remote shell that enters the namespace of an address, where there would be ssh."""
    path, remote = path_with_mpirun(tmp_path, kind), tmp_path / "remote"
    cases = "".join(f"{host}) node={node} ;; " for host, node in zip(HOSTS, nodes, strict=True))
    loop = f'while :; do case "$1" in {cases}-*) shift; continue ;; *) exit 1 ;; esac; shift; break; done'
    remote.write_text(f'#!/bin/sh\n{loop}\nexec ip netns exec "$node" sh -c "$*"\n')
    remote.chmod(0o755)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [*with_hostfile("MPI", files, config), *overrides(files, kind)]
    check([start(nodes[0], command, PATH=path, **{shell: str(remote)}, **root)], files / kind, alone)


@pytest.mark.alone
def test_when_a_machine_dies_the_other_stops_and_says_so(nodes, files, config):
    survivor, victim = on_both(nodes, config, overrides(files, "dying", **{"train.steps": 100000}))
    records, deadline = files / "dying" / "metrics.jsonl", time.monotonic() + 200
    while not records.exists() or not records.read_text():
        assert time.monotonic() < deadline and survivor.is_running(), survivor.output()
        time.sleep(0.1)
    stop(victim.process)
    started = time.monotonic()
    status, output = finish(survivor, LIMIT_SECONDS)
    assert status == 1 and time.monotonic() - started < LIMIT_SECONDS
    assert output.count("megadpo: rank 0 lost another rank of the run") == 1, output
    assert HOSTS[1] in output, "the reason names the machine that has gone"


def test_a_machine_that_does_not_come_is_named_when_the_time_is_over(nodes, files, config):
    waiting = on_node(0, nodes, config, overrides(files, "waiting"), MEGADPO_RENDEZVOUS_TIMEOUT="3")
    status, output = finish(waiting)
    assert status == 2, output
    assert f"rank 1 (node 1) of 2 did not come to {HOSTS[0]}:29500 within 3 s" in output, output
    assert output.count("megadpo: error") == 1 and "Traceback" not in output


def test_a_first_machine_that_does_not_answer_is_named_too(nodes, files, config):
    waiting = on_node(1, nodes, config, overrides(files, "waiting"), MEGADPO_RENDEZVOUS_TIMEOUT="3")
    status, output = finish(waiting)
    assert status == 2, output
    assert f"rank 1: no answer from rank 0 at {HOSTS[0]}:29500 within 3 s" in output, output
