"""How the tests are spread over processes: a file after the other to each, and a test that measures time alone.

`./launch.sh test` runs ``pytest -n auto --dist loadfile --no-loadscope-reorder``; the hooks here say how many processes that
is and in which order the files are handed out. Without pytest-xdist nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MOST_PROCESSES = 8

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a job in the background of a shell; what is started by the tests of interrupts has to hear them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is compiled is kept, also where an image says otherwise: some hundred processes import this project, a second each.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Of torch, where a tracker has brought that package along: what processes print is compared line by line.
os.environ.setdefault("PYTHONWARNINGS", "ignore:The pynvml package is deprecated:FutureWarning")

if not Path("/dev/nvidiactl").exists():
    # Triton's kernels run under its interpreter, which has to be known before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST_FIRST = (
    # Files of a minute and more (`pytest --durations=0` on 2 cores), and of those for a GPU what takes longest there: what
    # is long must not begin last.
    "gpu/test_several_ranks.py",
    "gpu/test_cuda.py::test_fp32",
    "gpu/test_cuda.py::test_a_run_that_goes_on",
    "gpu/test_deepspeed.py",
    "gpu/test_cuda.py::test_megadpo_train",
    "gpu/test_cuda.py",
    "gpu/test_small_ops.py::test_a_model",
    "gpu/test_attention_kernels.py::test_outputs_and_gradients_are_those_of_the_definition[flex",
    "parity/test_deepspeed.py",
    "parity/test_context_parallel.py",
    "parity/test_layouts.py",
    "parity/",
    "runs/",
    "faults/test_resharding.py",
    "unit/model/test_reward_training.py",
)

LOCKS = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="the tests that are marked exhaustive, too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes of ``-n auto``: one more than cores, for many tests wait for clocks or messages; none besides this one where
    single tests or a single file are asked for."""
    asked = [argument.partition("::")[0] for argument in config.args]
    if len(asked) == 1 and Path(asked[0]).is_file():
        return 0
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)) + 1)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[Any]:
    """Of all tests some will import Megatron: it is imported as a run of ours does it, in half the time (no compiler, no
    tracker); a process that only hands out tests needs none of it."""
    collects = "PYTEST_XDIST_WORKER" in os.environ or not session.config.getoption("numprocesses", None)
    if collects and any(Path(argument).name == "tests" for argument in session.config.args):
        from megadpo.platform.megatron_cpu import prepare_megatron
        from megadpo.platform.patches import patches_undone

        with patches_undone():
            prepare_megatron()
    return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest first; each file's tests keep their order. Exhaustive ones only where they are asked for."""

    def rank(item: pytest.Item) -> int:
        name = f"{item.path.as_posix()}::{item.nodeid.partition('::')[2]}"
        return next((n for n, part in enumerate(LONGEST_FIRST) if f"tests/{part}" in name), len(LONGEST_FIRST))

    items.sort(key=rank)
    if not config.getoption("exhaustive"):
        for item in items:
            if "exhaustive" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="only with --exhaustive"))


@pytest.fixture(scope="session", autouse=True)
def one_thread_each() -> None:
    """Where several processes run tests, torch has one thread in each, as in the processes of a world."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The process that hands out the tests tells the others where their locks are."""
    if LOCKS not in node.config.stash:
        directory = tempfile.TemporaryDirectory(prefix="megadpo-tests-")
        node.config.add_cleanup(directory.cleanup)
        node.config.stash[LOCKS] = Path(directory.name)
    node.workerinput["locks"] = str(node.config.stash[LOCKS])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout: waiting is no part of a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is marked `alone` waits for the tests of the other processes to end, and they for it."""
    told = getattr(item.config, "workerinput", {}).get("locks")
    with _turn(Path(told), item.get_closest_marker("alone") is not None) if told else contextlib.nullcontext():
        return (yield)


@contextlib.contextmanager
def _turn(locks: Path, alone: bool) -> Iterator[None]:
    # Whoever wants the room takes the door first: without it, tests that share the room could keep one out that does not.
    with open(locks / "door", "w") as door, open(locks / "room", "w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
