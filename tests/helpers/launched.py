"""`megadpo train …`, or our launcher with workers of a test's own, with all of its processes forked from the server of
`worlds`: the real command, launcher and workers in a fraction of the seconds that new processes take; with signals and kills
at chosen moments."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.worlds import forked, pipe

LIMIT_SECONDS = 120.0
SCRIPT_SECONDS = 580.0
"""For what a script starts; the script itself may take as long before and after."""


@dataclass(frozen=True)
class Moment:
    """When something happens to a rank.

    Attributes:
        function: the module and name of what is called then, as `megadpo.training.run_state:save`; empty: right before a
            file operation below the output directory.
        count: the how manieth call or operation it is, from 1.
        operation: only those count in whose text, `os.rename checkpoints/step_00000001.tmp`, this regular expression is.
        rank: where that is counted.
        number: the signal that is sent.
        to_launcher: to the launcher in place of the rank.
        after: seconds from then on.
        sleep: in place of a signal, the rank's main thread sleeps for so many seconds right there.
    """

    function: str = ""
    count: int = 1
    rank: int = 0
    operation: str = ""
    number: int = signal.SIGKILL
    to_launcher: bool = False
    after: float = 0.0
    sleep: float = 0.0


class Launched:
    """A command under way.

    Attributes:
        process: the launcher's, or the only one's, id.
    """

    def __init__(self, process: Any, log: Path) -> None:
        self._process, self._log = process, log
        self.process: int = process.pid

    def wait(self, seconds: float = LIMIT_SECONDS) -> int:
        """The exit status, negative of a signal."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.output()}")
        return int(self._process.exitcode)

    def output(self) -> str:
        """All that was printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, what: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and self._process.is_alive(), self.output()
            time.sleep(0.01)

    def is_running(self) -> bool:
        return bool(self._process.is_alive())

    def send(self, number: int) -> None:
        os.kill(self.process, number)


def start(settings: dict[str, Any], nproc: int, *moments: Moment) -> Launched:
    """`megadpo train` with these settings on `nproc` processes."""
    directory = Path(settings["output_dir"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    names = (directory.with_name(f"{directory.name}-{time.monotonic_ns()}{end}") for end in (".yaml", ".log"))
    config, log = names
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    argv = ["train", str(config), *(["--nproc", str(nproc)] if nproc > 1 else [])]
    log.touch()
    return Launched(forked(_command, argv, str(log), moments, str(directory)), log)


def finish(settings: dict[str, Any], nproc: int, *moments: Moment) -> tuple[int, str]:
    """Exit status and output of `start`."""
    launched = start(settings, nproc, *moments)
    return launched.wait(), launched.output()


def finish_command(argv: list[str], directory: Path, **environment: str) -> tuple[int, str]:
    """Exit status and output of any `megadpo` command whose relative paths are below `directory`."""
    launched = start_command(argv, directory, **environment)
    return launched.wait(), launched.output()


def start_command(argv: list[str], directory: Path, network: Path | None = None, **environment: str) -> Launched:
    """Any `megadpo` command, whose workers are forked, too.

    Args:
        network: the file of a network namespace, in which it runs.
    """
    log = directory / f"{argv[0]}-{time.monotonic_ns()}.log"
    log.touch()
    return Launched(forked(_command_in, argv, str(log), str(directory), environment, network and str(network)), log)


def finish_script(script: Path, argv: list[str], directory: Path, **environment: str) -> tuple[int, str]:
    """Exit status and output of a Python script that starts `megadpo` by Popen and waits: both forked from the server."""
    log = directory / f"{script.stem}-{time.monotonic_ns()}.log"
    log.touch()
    ours, its = pipe()
    running = Launched(forked(_script, str(script), argv, str(log), str(directory), environment, its), log)
    its.close()
    try:
        while True:
            command, variables, cwd = ours.recv()
            ours.send(Launched(forked(_command_in, command, str(log), cwd, variables), log).wait(SCRIPT_SECONDS))
    except EOFError:  # the script is over
        return running.wait(), running.output()


def finish_workers(nproc: int, log: Path, main: Callable[..., int], *arguments: Any) -> tuple[int, str]:
    """Exit status and output of our launcher with `nproc` workers, each of which does `main(*arguments)`.

    Args:
        log: a file that is made.
        main: a module's function.
    """
    log.touch()
    launched = Launched(forked(_workers, nproc, str(log), main, arguments), log)
    return launched.wait(), launched.output()


def _workers(nproc: int, log: str, main: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    """In a process of its own: our launcher, whose workers are forked."""
    from megadpo.launch.supervisor import start_workers

    _print_to(log)
    _Worker.main = staticmethod(lambda: main(*arguments))
    subprocess.Popen = _Worker  # type: ignore[assignment,misc]
    _leave(start_workers(nproc, ["what the worker does"]))


def _command(argv: list[str], log: str, moments: tuple[Moment, ...], output_dir: str) -> None:
    """In a process of its own: the console's `megadpo`, whose workers are forked."""
    from megadpo.cli import main
    from megadpo.launch.worker import run_as_one

    _print_to(log)
    if _starts_workers(argv):

        def work() -> int:
            _arrange(moments, output_dir)
            return main(_as_worker(argv))

        _Worker.main = staticmethod(work)
        subprocess.Popen = _Worker  # type: ignore[assignment,misc]
    else:
        _arrange(moments, output_dir)
    _leave(run_as_one(lambda: main(argv)))


LAUNCH_OPTIONS = {"--nproc", "--nnodes", "--node-rank", "--master", "--launcher", "--hostfile", "--port"}


def _starts_workers(argv: list[str]) -> bool:
    is_alone = "--nproc" not in argv or argv[argv.index("--nproc") + 1] == "1"
    return not is_alone or "--nnodes" in argv or "--hostfile" in argv


def _as_worker(argv: list[str]) -> list[str]:
    """A launcher's arguments without what says which processes there are: a word and its value each."""
    return [word for number, word in enumerate(argv) if not {word, argv[number - 1]} & LAUNCH_OPTIONS]


def _command_in(argv: list[str], log: str, directory: str, environment: dict[str, str], network: str | None = None) -> None:
    if network is not None:
        _enter(network)
    os.chdir(directory)
    os.environ.update(environment)
    _command(argv, log, (), directory)


def _enter(network: str) -> None:
    import ctypes

    with open(network, "rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {network}")


def _script(script: str, argv: list[str], log: str, directory: str, environment: dict[str, str], asked: Any) -> None:
    """In a process of its own: a script, as `python SCRIPT …`."""
    _print_to(log)
    os.chdir(directory)
    os.environ.update(environment)
    sys.argv = [script, *argv]
    sys.path.insert(0, str(Path(script).parent))
    _Asked.of = asked
    subprocess.Popen = _popen_or_asked  # type: ignore[assignment,misc]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    _leave(status)


def _popen_or_asked(command: Any, *arguments: Any, **options: Any) -> Any:
    """Popen, which `subprocess.run` calls, too."""
    if command[1:3] == ["-m", "megadpo"]:
        return _Asked(command[3:], options["env"], options.get("cwd") or os.getcwd())
    return _popen(command, *arguments, **options)


class _Asked:
    """What a script asks of Popen. It has computed, so that nothing can be forked from it: the test's process is asked."""

    of: Any

    def __init__(self, argv: list[str], env: dict[str, str], cwd: Any) -> None:
        sys.stdout.flush()
        self.of.send((argv, env, str(cwd)))

    def wait(self) -> int:
        return int(self.of.recv())

    def terminate(self) -> None:
        pass  # it has ended


def _print_to(log: str) -> None:
    """What this process and its workers print goes to a file; none of them takes more than a thread."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Worker:
    """What the supervisor asks of Popen, by fork."""

    main: Callable[[], int]

    def __init__(self, command: Any, env: dict[str, str], preexec_fn: Callable[[], None], **options: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._work(env, preexec_fn)

    def _work(self, env: dict[str, str], prepare: Callable[[], None]) -> None:
        import torch

        from megadpo.launch.worker import run_as_one

        try:
            os.setsid()
            prepare()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            subprocess.Popen = _popen  # type: ignore[misc]
            os.environ.clear()
            os.environ.update(env)
            torch.set_num_threads(1)
            status = run_as_one(self.main)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status if "status" in locals() else 99)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


_popen = subprocess.Popen


def _arrange(moments: tuple[Moment, ...], output_dir: str) -> None:
    """Have happen in this process what is this one's."""
    for moment in moments:
        if int(os.environ.get("RANK", "0")) != moment.rank:
            continue
        if moment.function:
            _arrange_call(moment)
        else:
            _arrange_operation(moment, output_dir)


def _arrange_call(moment: Moment) -> None:
    import importlib

    module_name, _, name = moment.function.partition(":")
    module = importlib.import_module(module_name)
    called, count = getattr(module, name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment.count:
            _happen(moment)
        return called(*arguments, **options)

    setattr(module, name, call)


def _arrange_operation(moment: Moment, output_dir: str) -> None:
    count = 0

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and isinstance(arguments[0], (str, os.PathLike)):
            path = _path(event, arguments)
            if path.startswith(output_dir + os.sep) and (event != "open" or _writes(arguments)):
                count += re.search(moment.operation, f"{event} {path[len(output_dir) + 1 :]}") is not None
                if count == moment.count:
                    count += 1  # once only
                    _happen(moment)

    sys.addaudithook(hear)


OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "shutil.copyfile"}
"""Audit events of Python that change a file system. What safetensors writes is not among them, what surrounds it is."""


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """What an operation is done to, also where it is named by its directory's descriptor, as in `shutil.rmtree`."""
    path = os.fspath(arguments[0])
    place = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2}.get(event)
    if place is None or arguments[place] == -1:
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{arguments[place]}"), path)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _happen(moment: Moment) -> None:
    import threading

    if moment.sleep:
        time.sleep(moment.sleep)
        return
    target = os.getppid() if moment.to_launcher else os.getpid()
    if moment.after:
        threading.Timer(moment.after, os.kill, (target, moment.number)).start()
    else:
        os.kill(target, moment.number)
