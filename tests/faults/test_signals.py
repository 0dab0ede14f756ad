"""Signals at every moment of a run, to the launcher and to a rank: the documented status, and a state to go on from.

SIGTERM, SIGUSR1 and SIGINT are sent while the run starts, in a step, in an evaluation, in a save and in the export. A run
that was stopped and goes on is, bit for bit, the one that was left alone.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from megadpo.errors import UserError
from megadpo.launch.signals import EXIT_FINISHED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from megadpo.training.stop import slurm_end
from tests.helpers.launched import Moment, finish, start
from tests.helpers.runs import assert_same_weights, read_metrics, run_settings, save_files
from tests.helpers.worlds import path_with_mpirun, run_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGTERM: EXIT_PREEMPTED, signal.SIGUSR1: EXIT_PREEMPTED, signal.SIGINT: EXIT_INTERRUPTED}
MOMENTS = {
    "start": ("megadpo.training.setup:prepare_groups", 1),
    "step": ("megadpo.training.trainer:training_step", 3),
    "evaluation": ("megadpo.training.global_batch:pack_global_batch", 4),
    "save": ("megadpo.training.saving:write_shard_file", 1),
    "export": ("megadpo.training.export_files:write_export_files", 1),
}
"""What is called when: the evaluation packs its batches itself, and steps 1 and 2 pack one each before the first of them."""
FAST = {("step", signal.SIGTERM, True), ("save", signal.SIGUSR1, False)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"), "llama", 40, num_hidden_layers=2)


def settings(files: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """Four steps with an evaluation after the second and the last, and a save after the third."""
    usual: dict[str, Any] = {"train": {"steps": 4}, "eval": {"every": 2}, "checkpoint": {"every": 3}}
    usual["data"] = {"eval": str(files / "eval.jsonl")}
    for section, values in changes.items():
        usual[section] = usual.get(section, {}) | values
    return run_settings(files, output_dir, **usual)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes that nobody disturbs."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    status, output = finish(settings(files, output_dir), 2)
    assert status == EXIT_FINISHED, output
    return output_dir


def merged(output_dir: Path) -> dict[int, dict[str, float]]:
    """The metrics of each step: an evaluation that was made up for has a record of its own."""
    found: dict[int, dict[str, float]] = {}
    for record in read_metrics(output_dir):
        found[int(record["step"])] = found.get(int(record["step"]), {}) | record
    return found


def assert_went_on(output_dir: Path, whole: Path) -> None:
    assert merged(output_dir) == merged(whole)
    assert_same_weights(output_dir, whole)
    assert sorted(path.name for path in output_dir.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(
    ("moment", "number", "to_launcher"),
    [
        pytest.param(
            moment, number, to_launcher, marks=[] if (moment, number, to_launcher) in FAST else pytest.mark.exhaustive
        )
        for moment in MOMENTS
        for number in STATUS
        for to_launcher in (True, False)
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_run_that_is_sent_a_signal_ends_with_its_status_and_goes_on_bit_for_bit(
    files: Path, whole: Path, tmp_path: Path, moment: str, number: signal.Signals, to_launcher: bool
) -> None:
    function, count = MOMENTS[moment]
    # The export's writer is rank 0; otherwise rank 1 hears it, so that it has to tell rank 0.
    heard_by = 0 if moment == "export" else 1
    when = Moment(function, count, heard_by, number=number, to_launcher=to_launcher, after=0.005)
    status, output = finish(settings(files, tmp_path / "run"), 2, when)
    assert "Traceback" not in output, output
    if moment == "export":
        assert status == EXIT_FINISHED, f"all was saved, and what was left to do was done: {output}"
    else:
        assert status == STATUS[number], output
        assert not (tmp_path / "run" / "hf").exists()
        assert not (tmp_path / "run" / "run.lock").exists() or moment == "start"
    if moment in ("step", "evaluation", "save"):
        saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
        # Rank 1 may be a step further when the launcher has handed the signal on; a save that was being written behind the
        # loop is there too.
        assert len(saved) in ((1, 2) if moment == "save" else (1,)), output
        assert all(re.fullmatch(r"step_0000000[234]", name) for name in saved), output
        assert re.search(r"megadpo: (preempted|interrupted) after step \d of 4: saved", output), output
    status, output = finish(settings(files, tmp_path / "run"), 2)
    assert status == EXIT_FINISHED, output
    assert_went_on(tmp_path / "run", whole)


def test_an_evaluation_is_broken_off_saved_before_and_made_up_for(files: Path, whole: Path, tmp_path: Path) -> None:
    function, count = MOMENTS["evaluation"]
    when = Moment(function, count, 1, number=signal.SIGINT)
    assert finish(settings(files, tmp_path / "run"), 2, when)[0] == EXIT_INTERRUPTED
    (line,) = [record for record in read_metrics(tmp_path / "run") if record["step"] == 2]
    assert "eval_loss" not in line
    assert finish(settings(files, tmp_path / "run"), 2)[0] == EXIT_FINISHED
    assert merged(tmp_path / "run") == merged(whole)


@pytest.mark.exhaustive
def test_a_single_process_is_ended_at_once_by_the_second_ctrl_c(files: Path, tmp_path: Path) -> None:
    long = settings(files, tmp_path / "run", train={"steps": 10**6, "pairs_per_step": 40}, eval={"every": 0})
    run = start(long, 1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    run.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
    run.send(signal.SIGINT)
    run.wait_for(lambda: "once more ends it at once" in run.output())
    run.send(signal.SIGINT)
    assert run.wait() == EXIT_INTERRUPTED
    assert run.output().endswith("megadpo: interrupted\n") and "Traceback" not in run.output()


def test_without_periodic_saves_a_run_saves_at_its_end_and_goes_on_from_there(files: Path, tmp_path: Path) -> None:
    def of(steps: int) -> dict[str, Any]:
        return settings(files, tmp_path / "run", checkpoint={"every": 0}, train={"steps": steps, "schedule": "constant"})

    assert finish(of(3), 1)[0] == EXIT_FINISHED
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003"]
    status, output = finish(of(4), 1)
    assert status == EXIT_FINISHED and "resuming from" in output and "step 1/4" not in output, output


@pytest.mark.exhaustive
def test_the_save_at_the_end_can_be_left_out_and_then_what_is_lost_is_said(files: Path, tmp_path: Path) -> None:
    unsaved = settings(files, tmp_path / "run", checkpoint={"every": 0, "at_end": False})
    status, output = finish(unsaved, 1, Moment("megadpo.training.trainer:training_step", 2, number=signal.SIGTERM))
    assert status == EXIT_PREEMPTED
    assert "preempted after step 2 of 4: not saved (checkpoint.at_end is false)" in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.exhaustive
def test_a_run_stops_before_its_deadline_saved_and_takes_the_save_into_account(files: Path, tmp_path: Path) -> None:
    long = settings(files, tmp_path / "run", train={"steps": 10**6}, checkpoint={"before_deadline": 8}, eval={"every": 0})
    began = time.monotonic()
    status, output = finish(long, 1)
    assert status == EXIT_PREEMPTED and re.search(r"preempted after step \d+ of 1000000: saved", output), output
    last = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert last and time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("1-02:03:04", 93784), ("02:03:04", 7384), ("03:04", 184), ("INVALID", None), ("UNLIMITED", None)],
)
def test_the_end_of_a_slurm_job_is_asked_of_squeue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, seconds: int | None
) -> None:
    program(tmp_path, "squeue", f"echo {left}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if seconds is None:
        with pytest.raises(UserError, match=r"before_deadline is slurm, but SLURM gives job 7 no end"):
            slurm_end({"SLURM_JOB_ID": "7"})
    else:
        assert slurm_end({"SLURM_JOB_ID": "7"}) == pytest.approx(time.time() + seconds, abs=5)
    assert slurm_end({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1790000000"}) == 1790000000
    with pytest.raises(UserError, match="this is no SLURM job; give seconds"):
        slurm_end({})


def program(directory: Path, name: str, script: str) -> None:
    """A program of this name that a test looks at the calls of."""
    path = directory / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{directory}/calls"\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_the_slurm_example_requeues_a_job_that_was_preempted_and_no_other(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    for name, script in (("srun", f"exit {status}"), ("scontrol", 'if [ "$1" = show ]; then echo node1; fi')):
        program(tmp_path, name, script)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    environment |= {"SLURM_JOB_NODELIST": "node1"}
    template = ROOT / "examples" / "slurm_requeue.sbatch"
    result = subprocess.run(
        ["bash", str(template), "run.yaml", "output_dir=out"], env=environment, capture_output=True, text=True, timeout=60
    )
    calls = (tmp_path / "calls").read_text()
    assert ("scontrol requeue 4711" in calls) == requeued, calls + result.stderr
    assert result.returncode == (0 if requeued else status)
    assert f"{ROOT}/launch.sh train run.yaml output_dir=out checkpoint.before_deadline=slurm" in calls
    directives = template.read_text()
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=USR1@" in directives


def test_the_vote_changes_no_metric(files: Path, whole: Path) -> None:
    """The reduction that carries the votes gives the sums that it gave without them."""
    for one, other in run_world(3, _reduced_with_and_without_a_vote):
        assert one == other


def _reduced_with_and_without_a_vote() -> tuple[dict[str, float], dict[str, float]]:
    from megadpo.config.schema import ObjectiveConfig
    from megadpo.objectives.objective import Objective
    from megadpo.parallel.layout import Layout
    from megadpo.parallel.world import joined_world, rank
    from megadpo.training.step import reduce_metrics
    from megadpo.training.stop import Stopping

    objective = Objective.of(ObjectiveConfig())
    with joined_world(Layout(1, 1, 1, 3), 0):
        sums = torch.rand(
            2 * len(objective.metric_names), generator=torch.Generator().manual_seed(rank()), dtype=torch.float64
        )
        return reduce_metrics(sums.clone(), objective), reduce_metrics(sums.clone(), objective, stopping=Stopping())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("launcher", "kind", "number", "status"),
    [
        ("torchrun", None, signal.SIGTERM, 1),
        ("torchrun", None, signal.SIGUSR1, 1),
        ("torchrun", None, signal.SIGKILL, -signal.SIGKILL),
        ("mpirun", "openmpi", signal.SIGUSR1, EXIT_PREEMPTED),
        ("mpirun", "mpich", signal.SIGTERM, EXIT_PREEMPTED),
        ("deepspeed", None, signal.SIGTERM, -signal.SIGTERM),
    ],
)
def test_with_other_launchers_the_run_saves_too_and_no_rank_trains_on(
    files: Path, tmp_path: Path, launcher: str, kind: str | None, number: signal.Signals, status: int
) -> None:
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    path = path_with_mpirun(tmp_path, kind) if kind else os.environ["PATH"]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(files, tmp_path / "run", train={"steps": 10**6}, eval={"every": 0})))
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [sys.executable, "-m", "megadpo", "train", str(config), "--launcher", launcher, "--nproc", "2"]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, env={**os.environ, **own}, stdout=log, stderr=log)
        deadline, metrics = time.monotonic() + 240, tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert time.monotonic() < deadline and run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        started = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        assert run.wait(100) == status, (tmp_path / "log").read_text()
        _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive and re.search(r"preempted after step \d+ of 1000000: saved", (tmp_path / "log").read_text())
