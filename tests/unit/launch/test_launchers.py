"""Who starts the processes: hostfiles, ranks under mpirun and deepspeed, and the launchers' command lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megadpo.errors import UserError
from megadpo.launch import launchers, mpi
from megadpo.launch import supervisor as launch
from megadpo.launch.hostfile import number_of_this_machine, read_hostfile
from megadpo.launch.launchers import Request, machines
from tests.helpers.models import save_model, write_hh
from tests.helpers.worlds import path_with_mpirun

ROOT = Path(__file__).parents[3]
ME = socket.gethostname()


def hostfile(directory: Path, text: str) -> Path:
    path = directory / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_says_how_many_machines_there_are_and_which_this_one_is(tmp_path: Path) -> None:
    path = hostfile(tmp_path, f"# ours\n\n10.255.1.2 slots=4  # far\n{ME} slots=4\n")
    found = machines(Request(hostfile=path))
    assert (found.node, found.nproc) == (launch.Node(1, 2, "10.255.1.2:29500"), 4)


def test_plain_host_names_take_the_number_of_processes_from_nproc(tmp_path: Path) -> None:
    path = hostfile(tmp_path, f"{ME}\n10.255.1.2\n")
    assert machines(Request(hostfile=path, nproc=3, port=4000)) == launchers.Machines(
        launch.Node(0, 2, f"{ME}:4000"), 3, tuple(read_hostfile(path)), path
    )


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", ME])
def test_a_machine_is_known_by_its_names_and_addresses(tmp_path: Path, name: str) -> None:
    assert number_of_this_machine(read_hostfile(hostfile(tmp_path, f"{name} slots=2\n"))) == 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a slots=4\nb slots=four\n", "hosts:2: 'b slots=four' is not `HOST` or `HOST slots=N`"),
        (
            "fd00::7 slots=4\n",
            "hosts:1: 'fd00::7 slots=4' is not `HOST` or `HOST slots=N`; give a host name in place of an IPv6",
        ),
        ("a slots=4 max-slots=8\n", "hosts:1: 'a slots=4 max-slots=8' is not"),
        ("a slots=0\n", "hosts:1: slots=0 is not above 0"),
        ("a slots=4\n# b\na slots=4\n", "hosts:3: host a is already in "),
        ("a slots=4\nb slots=2\n", "hosts:2: host b has slots=2, but a has slots=4 ("),
        ("a slots=4\nb\n", "hosts:2: host b has no slots=N, but a has slots=4 ("),
        ("# nobody\n", "hosts names no host"),
        ("a slots=1\nlocalhost slots=1\n", "hosts:2: localhost is another machine on each of several"),
        ("10.255.1.2 slots=2\n10.255.1.3 slots=2\n", f"this machine ({ME}) is not in --hostfile"),
        (f"{ME}\n127.0.1.9x\n", "hosts:1 gives no slots=N; say how many processes a machine takes with --nproc N"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_file_and_line(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        machines(Request(hostfile=hostfile(tmp_path, text)))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(nnodes=2), "--hostfile {path} both say which machines there are; leave --nnodes out"),
        (Request(master="a"), "leave --master out"),
        (Request(nproc=3), "--nproc 3 contradicts slots=2 ({path}:1)"),
        (Request(node_rank=2), "--node-rank 2 is not from 0 to 1"),
        (Request("srun"), "--hostfile is not for --launcher srun"),
        (Request("mpirun", node_rank=0), "--node-rank is not for --launcher mpirun"),
    ],
)
def test_options_that_contradict_the_hostfile_are_refused(tmp_path: Path, request_: Request, sentence: str) -> None:
    path = hostfile(tmp_path, f"{ME} slots=2\nother.invalid slots=2\n")
    with pytest.raises(UserError) as caught:
        machines(Request(**{**vars(request_), "hostfile": path}))
    assert sentence.format(path=path) in str(caught.value)


@pytest.mark.parametrize("master", ["fd00::7", "[fd00::7]:4000", "::1"])
def test_an_ipv6_address_of_the_first_machine_is_refused(master: str) -> None:
    with pytest.raises(UserError, match=r"is not HOST or HOST:PORT; give a host name in place of an IPv6 address"):
        machines(Request(nnodes=2, node_rank=0, master=master))


def test_deepspeed_does_not_read_plain_host_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hosts:1: deepspeed wants `a slots=N`"):
        machines(Request("deepspeed", nproc=2, hostfile=hostfile(tmp_path, "a\nb\n")))


@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_some_launchers_need_a_hostfile_for_several_machines(launcher: str) -> None:
    with pytest.raises(UserError, match=f"--launcher {launcher} on several machines needs --hostfile"):
        machines(Request(launcher, nproc=2, nnodes=2))


def test_torchrun_and_deepspeed_are_told_of_all_machines(tmp_path: Path) -> None:
    path = hostfile(tmp_path, f"{ME} slots=2\n10.255.1.2 slots=2\n")
    found = machines(Request(hostfile=path, port=4000))
    line = launchers.command("torchrun", found, ["train", "c.yaml"], {})
    # A signal that this torchrun cannot hand on would end it, and not its processes.
    signals = [word for word in line if word.startswith("--signals-to-handle=") and word.endswith(",SIGUSR1")]
    assert [word for word in line[3:] if word not in signals] == [
        *("--nproc-per-node=2", "--nnodes=2", "--node-rank=0", f"--master-addr={ME}", "--master-port=4000"),
        *("-m", "megadpo", "train", "c.yaml"),
    ]
    line = launchers.command("deepspeed", found, ["train", "c.yaml"], {})
    assert line[3:] == [
        *("--hostfile", str(path), "--no_ssh", "--node_rank", "0", "--master_addr", ME, "--master_port", "4000"),
        *("--module", "megadpo", "train", "c.yaml"),
    ]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("mpirun (Open MPI) 5.0.3", f"--bind-to none --host {ME}:2,b:2 -x MASTER_ADDR -x MASTER_PORT"),
        ("HYDRA build details:", f"-hosts {ME}:2,b:2"),
    ],
)
def test_mpirun_starts_all_machines_in_the_words_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, words: str
) -> None:
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    environ: dict[str, str] = {}
    found = machines(Request("mpirun", hostfile=hostfile(tmp_path, f"{ME} slots=2\nb slots=2\n")))
    line = launchers.command("mpirun", found, ["train", "c.yaml"], environ)
    assert line == [str(program), "-np", "4", *words.split(), sys.executable, "-m", "megadpo", "train", "c.yaml"]
    assert environ == {"MASTER_ADDR": ME, "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("launcher", "what"), [("mpirun", "MPI (Open MPI, MPICH or Intel MPI)"), ("srun", "SLURM")])
def test_a_launcher_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, launcher: str, what: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as caught:
        launchers.command(launcher, machines(Request(launcher, nproc=2)), ["train"], {})
    assert str(caught.value) == f"--launcher {launcher}: {what} is not installed here: there is no {launcher} in PATH"


def test_a_port_that_is_taken_is_named_before_anything_starts() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for request in (Request(nproc=2, port=port), Request(nnodes=2, node_rank=0, master=f"{ME}:{port}")):
            with pytest.raises(UserError, match=rf"port {port} on this machine .* choose another with --port"):
                launch.start_workers(2, ["/nowhere"], machines(request).node)


def test_only_the_first_machine_needs_the_port() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        launch.Node(1, 2, f"far:{other.getsockname()[1]}").require_free_port()


OPEN_MPI = {f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MEETING = {"MASTER_ADDR": "head", "MASTER_PORT": "4000"}
RANKS = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize("given", [OPEN_MPI, HYDRA])
def test_under_mpirun_the_rank_comes_from_its_variables(given: dict[str, str]) -> None:
    environ = {**given, **MEETING, "SLURM_PROCID": "0"}
    mpi.adopt_mpi_environment(environ)
    assert environ == {**given, **MEETING, **RANKS, "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environ",
    [
        {**OPEN_MPI, "RANK": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3"},
        {},
    ],
)
def test_torchrun_srun_and_a_single_process_are_not_taken_for_mpirun(environ: dict[str, str]) -> None:
    before = dict(environ)
    mpi.adopt_mpi_environment(environ)
    assert environ == before


def test_a_variable_of_mpirun_that_is_no_number_is_named() -> None:
    with pytest.raises(UserError, match="PMI_RANK is 'x', not a number"):
        mpi.adopt_mpi_environment({**HYDRA, "PMI_RANK": "x"})


class World:
    """mpi4py's COMM_WORLD for ranks that take turns: what MPI itself would carry lies in a shared list."""

    def __init__(self, rank: int, hosts: list[str], told: list[object], size: int = 2) -> None:
        self.rank, self.hosts, self.told, self.size = rank, hosts, told, size

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def allgather(self, value: str) -> list[str]:
        return self.hosts

    def bcast(self, value: object, root: int) -> object:
        if self.rank == root:
            self.told.append(value)
        return self.told[0]


def stand_in(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    package, module = ModuleType("mpi4py"), ModuleType("mpi4py.MPI")
    package.MPI, module.COMM_WORLD = module, world  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)


@pytest.mark.parametrize(("hosts", "local"), [(["a", "a"], ("1", "2")), (["a", "b"], ("0", "1"))])
def test_without_an_address_rank_0_tells_it_through_mpi(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], local: tuple[str, str]
) -> None:
    told: list[object] = []
    environs = [{"PMI_RANK": str(rank), "PMI_SIZE": "2"} for rank in range(2)]
    for rank, environ in enumerate(environs):
        stand_in(monkeypatch, World(rank, hosts, told))
        mpi.adopt_mpi_environment(environ)
    first, second = environs
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (second["MASTER_ADDR"], second["MASTER_PORT"])
    assert (first["MASTER_ADDR"] == "127.0.0.1") == (hosts == ["a", "a"]) and len(told) == 1
    assert (second["RANK"], second["LOCAL_RANK"], second["LOCAL_WORLD_SIZE"]) == ("1", *local)


def test_an_mpi4py_of_another_mpi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, World(0, ["a"], [], size=1))
    with pytest.raises(UserError, match="mpi4py uses another MPI than this mpirun"):
        mpi.adopt_mpi_environment(dict(OPEN_MPI))


def test_without_an_address_and_without_mpi4py_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpi4py, .* does not work here .* set MASTER_ADDR, MASTER_PORT and LOCAL_RANK"):
        mpi.adopt_mpi_environment(dict(OPEN_MPI))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.exhaustive  # over two machines in tests/runs/test_two_nodes.py, which needs network namespaces
def test_a_launcher_really_trains_on_two_processes(files: Path, tmp_path: Path, launcher: str) -> None:
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra of its own")
    train_on_two(files, tmp_path, [str(ROOT / "launch.sh"), "train", "--launcher", launcher, "--nproc", "2"])


@pytest.mark.parametrize("kind", ["mpich", pytest.param("openmpi", marks=pytest.mark.exhaustive)])
@pytest.mark.slow  # Open MPI's over two machines in tests/runs/test_two_nodes.py
def test_mpirun_really_trains_on_two_processes(files: Path, tmp_path: Path, kind: str) -> None:
    path = path_with_mpirun(tmp_path, kind)
    train_on_two(files, tmp_path, [str(ROOT / "launch.sh"), "train", "--launcher", "mpirun", "--nproc", "2"], PATH=path)


@pytest.mark.slow
def test_the_ranks_of_a_plain_mpirun_meet_through_mpi4py(files: Path, tmp_path: Path) -> None:
    path = path_with_mpirun(tmp_path, "openmpi")
    probe = [sys.executable, "-c", "from mpi4py import MPI; assert 'Open MPI' in MPI.Get_library_version()"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mpi4py is not installed, or finds no Open MPI")
    train_on_two(files, tmp_path, ["mpirun", "-np", "2", sys.executable, "-m", "megadpo", "train"], PATH=path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and a configuration of one step on them."""
    directory = tmp_path_factory.mktemp("files")
    model, pairs = save_model(directory / "model", num_hidden_layers=1), write_hh(directory / "pairs.jsonl", 4)
    settings = {
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {"train": str(pairs), "cache_dir": str(directory / "cache"), "max_length": 64},
        "train": {"steps": 1, "pairs_per_step": 4},
        "logging": {"tensorboard": False},
        "checkpoint": {"at_end": False},
    }
    (directory / "run.yaml").write_text(json.dumps(settings))
    return directory


def train_on_two(files: Path, directory: Path, command: list[str], **environment: str) -> None:
    """One step of training by `command`, which must have started two replicas."""
    command = [*command, str(files / "run.yaml"), f"output_dir={directory / 'out'}"]
    own = {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **environment}
    # Open MPI asks a superuser, as in a container, to say so twice.
    own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "data 2," in result.stdout + result.stderr
    (line,) = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
