"""Several processes behave as one: when a worker fails, all end soon and the reason is told exactly once."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megadpo.errors import UserError
from megadpo.launch.supervisor import free_port, start_workers
from megadpo.launch.worker import FAILURE_FILE
from tests.helpers.launched import finish_workers
from tests.helpers.worlds import forked

LIMIT_SECONDS = 30
ROOT = Path(__file__).parents[3]

WORKER = """
import os, signal, sys, time
from megadpo.errors import UserError
from megadpo.launch.worker import run_as_one

rank, case = int(os.environ["RANK"]), sys.argv[1]

def main():
    if case == "all": raise UserError("model directory is missing")
    if case == "one":
        from tests.unit.launch.test_supervisor import work
        return work("user")
    if case == "omp": os.write(1, (os.environ["OMP_NUM_THREADS"] + "\\n").encode())
    if case in ("sleep", "busy"):
        import subprocess
        if case == "busy":
            signal.signal(signal.SIGINT, lambda number, frame: None)
        child = subprocess.Popen(["sleep", "600"])
        open(f"{sys.argv[2]}/{rank}", "w").write(f"{os.getpid()} {child.pid}\\n")
        time.sleep(600)
    return 0

sys.exit(run_as_one(main))
"""


def work(case: str) -> int:
    """Two workers meet, and rank 1 fails in one way or another while rank 0 waits for it."""
    import datetime

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    dist.barrier()
    if os.environ["RANK"] == "1":
        if case == "user":
            raise UserError("row 7 has no field 'chosen'")
        if case == "bug":
            raise KeyError("weight")
        if case in ("segv", "kill"):
            os.kill(os.getpid(), signal.SIGSEGV if case == "segv" else signal.SIGKILL)
        if case == "silent":
            os._exit(7)
    dist.all_reduce(torch.ones(1))
    # A process that ends with threads of gloo is aborted now and then; a run of ours leaves none (platform/world.py).
    dist.destroy_process_group()
    return 0


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


def run(command: list[str], **environment: str) -> tuple[int, str, float]:
    """Exit status, everything printed, and the seconds it took."""
    start = time.monotonic()
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", FAILURE_FILE)}
    result = subprocess.run(
        command,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * LIMIT_SECONDS,
    )
    return result.returncode, result.stdout, time.monotonic() - start


def our_launcher(nproc: int, worker: Path, *arguments: str) -> list[str]:
    code = (
        "import sys; from megadpo.launch.supervisor import start_workers; "
        "sys.exit(start_workers(int(sys.argv[1]), sys.argv[2:]))"
    )
    return [sys.executable, "-c", code, str(nproc), sys.executable, str(worker), *arguments]


@pytest.mark.parametrize(
    ("case", "status", "reason"),
    [
        ("user", 2, "[rank 1] megadpo: error: row 7 has no field 'chosen'"),
        ("bug", 1, "megadpo: rank 1 failed: KeyError: 'weight'"),
        ("segv", 1, "megadpo: rank 1 was killed by SIGSEGV"),
        ("kill", 1, "megadpo: rank 1 was killed by SIGKILL; usually the machine ran out of memory"),
        ("silent", 7, "megadpo: rank 1 left with exit status 7"),
    ],
)
def test_a_rank_that_dies_ends_all_while_the_others_wait_for_it(tmp_path: Path, case: str, status: int, reason: str) -> None:
    forked(abs, 0).join()  # the server is there
    began = time.monotonic()
    code, output = finish_workers(2, tmp_path / "log", work, case)
    seconds = time.monotonic() - began
    assert code == status
    assert output.count(reason) == 1 and output.count("megadpo: ") == 1, output
    assert ("Traceback" in output) == (case == "bug") and output.count("Traceback") <= 1
    assert "rank 0" not in output and "onnection" not in output, output
    assert seconds < LIMIT_SECONDS


@pytest.mark.slow
def test_a_mistake_that_every_rank_meets_is_told_once(worker: Path) -> None:
    code, output, _ = run(our_launcher(4, worker, "all"))
    assert code == 2
    assert output.count("megadpo: error: model directory is missing") == 1 and len(output.splitlines()) == 1, output


def test_workers_that_end_well_give_status_0_and_print_nothing_more(tmp_path: Path) -> None:
    assert finish_workers(2, tmp_path / "log", work, "fine") == (0, "")


@pytest.mark.slow
def test_under_torchrun_the_reason_is_told_once_too_and_a_second_run_is_not_silenced_by_it(
    worker: Path, tmp_path: Path
) -> None:
    options = ["--nproc-per-node=2", f"--master-port={free_port()}"]
    for case, reason in (
        ("one", "[rank 1] megadpo: error: row 7 has no field 'chosen'"),
        ("all", "model directory is missing"),
    ):
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(worker), case]
        code, output, seconds = run(command, TMPDIR=str(tmp_path), PYTHONPATH=str(ROOT))
        assert code != 0 and seconds < LIMIT_SECONDS
        assert output.count(reason) == 1, output
        assert case == "all" or ("[rank 0] megadpo" not in output and "rank 0 failed" not in output), output


@pytest.mark.slow
def test_threads_are_shared_out_among_the_workers(worker: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    command = ["env", "-u", "OMP_NUM_THREADS", *our_launcher(2, worker, "omp")]
    assert run(command)[1].split() == [str(max(1, cores // 2))] * 2
    assert run(our_launcher(2, worker, "omp"), OMP_NUM_THREADS="3")[1].split() == ["3", "3"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)], ids=lambda value: str(value)
)
def test_a_signal_to_the_launcher_ends_the_workers_and_what_they_started_with_its_status(
    worker: Path, tmp_path: Path, number: int, status: int
) -> None:
    pids_dir = tmp_path / "pids"
    pids_dir.mkdir()
    launcher = subprocess.Popen(our_launcher(2, worker, "sleep", str(pids_dir)), stderr=subprocess.PIPE, text=True)
    pids = started(pids_dir)
    launcher.send_signal(number)
    assert launcher.wait(LIMIT_SECONDS) == status
    assert launcher.stderr is not None
    said, *more = launcher.stderr.read().splitlines()
    more_of_it = "; once more ends it at once" if number == signal.SIGINT else ""
    assert said == f"megadpo: {signal.Signals(number).name}: the run ends once its step is done and saved{more_of_it}"
    assert more == ([] if status == 130 else ["megadpo: preempted before there was anything to save"])
    assert gone(pids)


def test_workers_that_are_still_busy_are_killed_by_the_second_ctrl_c_and_not_by_the_first(
    worker: Path, tmp_path: Path
) -> None:
    pids_dir = tmp_path / "pids"
    pids_dir.mkdir()
    launcher = subprocess.Popen(our_launcher(2, worker, "busy", str(pids_dir)), stderr=subprocess.PIPE, text=True)
    pids = started(pids_dir)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    assert launcher.poll() is None and all(psutil.pid_exists(pid) for pid in pids)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(LIMIT_SECONDS) == 130
    assert launcher.stderr is not None and "for the second time: ended at once" in launcher.stderr.read()
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells workers of their parent's end only on Linux")
def test_workers_do_not_outlive_a_launcher_that_is_killed(worker: Path, tmp_path: Path) -> None:
    pids_dir = tmp_path / "pids"
    pids_dir.mkdir()
    launcher = subprocess.Popen(our_launcher(2, worker, "sleep", str(pids_dir)))
    pids = started(pids_dir)
    launcher.kill()
    launcher.wait()
    workers, children = pids[0::2], pids[1::2]
    assert gone(workers)
    for child in children:
        os.kill(child, signal.SIGKILL)


def _start_sleepers(seconds: str, directory: str) -> None:
    tempfile.tempdir = directory
    start_workers(4, ["sleep", seconds])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells workers of their parent's end only on Linux")
def test_none_outlives_a_launcher_that_is_killed_in_its_first_moments_and_no_file_stays(tmp_path: Path) -> None:
    for number in range(20):
        seconds = f"612.{os.getpid()}{number:02d}"
        launcher = forked(_start_sleepers, seconds, str(tmp_path))
        time.sleep(number * 0.002)
        launcher.kill()
        launcher.join()
        deadline = time.monotonic() + 2
        while alive := [p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", seconds]]:
            assert time.monotonic() < deadline, f"killed after {number * 2} ms, it left {alive}"
            time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def started(directory: Path) -> list[int]:
    """Process ids of two workers and of what each has started, once they have told them."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in directory.iterdir()]
        if len(texts) == 2 and all(text.endswith("\n") for text in texts):
            return [int(pid) for text in texts for pid in text.split()]
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.05)
    return False
