"""Every check of `megadpo doctor` says what is wrong where something is, and how to put it right."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megadpo import cli
from megadpo.commands import doctor
from megadpo.config.schema import Config
from megadpo.doctor import machine, ranks
from megadpo.doctor.check import Check, has_failed
from megadpo.doctor.examine import examine_ranks
from megadpo.doctor.files import bytes_needed, check_directories, check_directory, check_disk
from megadpo.doctor.model import check_model
from megadpo.doctor.ranks import Rank, check_ranks, judge_all_reduce, judge_output_dir, judge_versions
from megadpo.doctor.versions import check_package, requirements
from megadpo.model.attention.base import AttentionNeeds
from megadpo.platform import native
from megadpo.validation.load import load_config
from tests.helpers.models import save_model
from tests.helpers.worlds import run_world

GIB = 1 << 30
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def by_name(checks: Iterable[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# Versions


@pytest.mark.parametrize(
    ("requirement", "found", "fix"),
    [
        ("no-such-package-of-megadpo>=1", "not installed", 'pip install "no-such-package-of-megadpo>=1"'),
        ("packaging<1", "which is not <1", 'pip install "packaging<1"'),
    ],
)
def test_a_package_that_is_missing_or_too_new_is_named_with_the_command(requirement: str, found: str, fix: str) -> None:
    check = check_package(requirement)
    assert check.status == "failed" and check.found.endswith(found) and check.fix == fix


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(f'{{name}}: libcudart.so.12: cannot open shared object file')
sys.meta_path.insert(0, Block())
from megadpo.cli import main
sys.exit(main(['doctor', *{arguments!r}]))
"""


def blocked(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=packages, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_package_that_cannot_be_imported_ends_it_with_status_1_and_one_json_object() -> None:
    result = blocked(["torch", "rich", "transformers", "datasets", "megatron", "tensorboard"], "--json")
    assert result.returncode == 1, result.stderr
    checks = {one["name"]: one for one in json.loads(result.stdout)["checks"]}
    assert checks["package torch"]["status"] == "failed" and "libcudart.so.12" in checks["package torch"]["found"]
    assert checks["package torch"]["fix"].startswith("Install it anew: pip install --force-reinstall")
    assert {"package rich", "python", "packages"} <= checks.keys() and "device" not in checks


def test_without_rich_the_checks_are_printed_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "megadpo.doctor.terminal", None)
    doctor._show([Check("python", "ok", "3.11"), Check("package rich", "failed", "not installed", "pip install rich")])
    assert capsys.readouterr().out == "ok python: 3.11\nfailed package rich: not installed  pip install rich\n"


def test_on_a_terminal_what_is_wrong_has_its_fix_under_it() -> None:
    from megadpo.doctor.terminal import show

    stream = io.StringIO()
    show([Check("python", "ok", "3.11"), Check("disk", "failed", "1 GiB [red]free", "Make room.")], stream)
    lines = ["ok      python: 3.11", "FAILED  disk: 1 GiB [red]free", "        Make room.", "1 ok, 0 warnings, 1 failed"]
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == lines


def test_the_ranges_are_those_of_setup_py() -> None:
    needed, extras = requirements()
    assert any(text.startswith("megatron-core>=0.16") for text in needed) and "deepspeed" in extras
    assert all(
        check_package(text).status == "ok" for text in needed if not text.startswith(("torch", "mega", "trans", "data"))
    )


# The machine


def test_cards_that_torch_cannot_use_are_seen(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert machine.check_device(tmp_path / "none").status == "ok"
    if torch.version.cuda is None:
        check = machine.check_device(tmp_path)
        assert check.status == "failed" and check.found.startswith("2 NVIDIA cards, but torch") and "for CUDA" in check.fix


def test_a_torch_without_nccl_is_no_torch_for_gpus() -> None:
    assert machine.check_communication("gloo").status == "ok"
    if not torch.distributed.is_nccl_available():
        check = machine.check_communication("nccl")
        assert (check.status, check.found) == ("failed", "nccl is missing; there is gloo")


def test_a_gpu_without_a_kernel_for_sequences_is_warned_of_and_the_faster_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = AttentionNeeds(torch.device("cuda", 0), torch.bfloat16, 128, has_windows=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("flash_attn", "flash_attn_interface", "transformer_engine", "triton"):
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    monkeypatch.setattr("megadpo.model.attention.varlen._why_not_this_torch", lambda has_windows: "this torch is older")
    check = machine.check_attention(needs)
    assert check.status == "warning" and check.found.startswith("buckets (before it would come cpu_flash: ")
    assert "flash_attn: " in check.found and check.fix.startswith("Install flash-attn, or torch 2.10 or later")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    assert machine.check_attention(needs).fix == "No installation helps: needs compute capability 8.0 and V100 has less."
    assert machine.check_attention(AttentionNeeds(torch.device("cpu"), torch.float32, 128)).status == "ok"


def test_without_a_compiler_and_without_sources_the_kernels_are_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert by_name(machine.check_native())["kernels head"].status in ("ok", "warning")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("MEGADPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PACKAGE", tmp_path / "megadpo")
    native.load.cache_clear()
    try:
        checks = by_name(machine.check_native())
    finally:
        native.load.cache_clear()
    assert checks["kernels head"].status == checks["compiler of head"].status == "warning"
    assert checks["kernels head"].found.endswith("head.cpp is missing") and "a C++ compiler" in checks["kernels head"].fix
    assert checks["compiler of head"].found == "there is no C++ compiler"


def test_mpi_is_optional_but_half_of_it_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def python(answer: str, status: int) -> str:
        file = tmp_path / f"python{status}{len(answer)}"
        file.write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
        file.chmod(0o755)
        return str(file)

    monkeypatch.setenv("PATH", "/bin:/usr/bin")
    broken = machine.check_mpi(python("RuntimeError: cannot load MPI library", 1))
    assert broken.status == "warning" and broken.found.endswith("cannot load MPI library") and "MPI4PY_LIBMPI" in broken.fix
    monkeypatch.setenv("PATH", str(tmp_path))
    half = machine.check_mpi(python("Open MPI v4", 0))
    assert half.status == "warning" and "no mpirun in PATH" in half.found
    assert machine.check_mpi(python("", 3)) == Check("MPI", "ok", "none: only --launcher mpirun needs it")


def test_shared_memory_that_is_missing_or_small_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.check_shared_memory(tmp_path).status == "ok"
    assert machine.check_shared_memory(tmp_path / "none").status == "warning"
    monkeypatch.setattr(machine, "LEAST_SHARED_MEMORY", 1 << 60)
    assert "--shm-size" in machine.check_shared_memory(tmp_path).fix


# Directories


def test_a_directory_that_cannot_be_written_is_refused_and_nothing_is_left_in_one_that_can(tmp_path: Path) -> None:
    (check,) = check_directory("output_dir", Path("/proc/megadpo/run"))
    assert check.status == "failed" and check.fix == "Open it to this user, or set output_dir to another directory."
    checks = list(check_directory("output_dir", tmp_path / "a" / "b"))
    assert [(one.name, one.status) for one in checks] == [("output_dir writable", "ok"), ("output_dir locks", "ok")]
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*unused: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert by_name(check_directory("output_dir", tmp_path))["output_dir locks"].status == "warning"
    monkeypatch.setattr("fcntl.flock", lambda *unused: None)  # as if it were held by both
    assert by_name(check_directory("output_dir", tmp_path))["output_dir locks"].status == "warning"


def test_an_output_dir_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    options = load_config({"output_dir": str(tmp_path), "data": {"cache_dir": str(tmp_path)}})
    assert "exists and is not a megadpo run" in by_name(check_directories(options))["output_dir"].found


def test_the_room_that_a_run_needs_is_that_of_its_checkpoints_and_its_export(tmp_path: Path) -> None:
    shapes = {"a": (10, 10), "b": (100,)}
    adapter = {"a.lora": (10,)}
    for dtype, moments, kind, needed in (
        ("fp32", "fp32", "none", 3 * 200 * 12 + 200 * 4),
        ("bf16", "bf16", "none", 3 * 200 * 8 + 200 * 2),
        ("fp32", "fp32", "lora", 3 * 10 * 12 + 10 * 4),
    ):
        options = Config()
        options.model.dtype, options.train.moments_dtype, options.adapter.kind = dtype, moments, kind
        assert bytes_needed(options, adapter if kind == "lora" else shapes, shapes) == needed
    for free, status in ((GIB - 1, "failed"), (GIB + 1, "warning"), (2 * GIB, "ok")):
        assert check_disk(tmp_path, GIB, 2, free).status == status
    assert check_disk(tmp_path / "run", 1 << 60, 2).status == "failed"


# Model and tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("doctor") / "model", num_hidden_layers=1)


def of_model(path: Path, **data: str) -> dict[str, Check]:
    return by_name(check_model(load_config({"model": {"path": str(path)}, "data": data})))


def test_a_model_whose_parts_go_together_is_fine(model: Path) -> None:
    checks = of_model(model, chat_template=TEMPLATE)
    assert list(checks) == ["model", "vocabulary", "special tokens", "chat template"]
    assert all(check.status == "ok" for check in checks.values()), checks
    assert of_model(model)["chat template"].found.startswith("the tokenizer has none")


def copied(model: Path, to: Path, **changes: object) -> Path:
    """A copy of which files have other contents (None: they are missing); JSON objects get the keys."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    for name, change in changes.items():
        file = next(to.glob(f"{name}*"))
        if change is None:
            file.unlink()
        else:
            assert isinstance(change, dict)
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return to


def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", num_hidden_layers=1, vocab_size=300, tokenizer=False)
    for file in model.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    check = of_model(small)["vocabulary"]
    assert (
        check.status == "failed" and check.found == "the tokenizer makes ids up to 498, the model's vocabulary has 300 rows"
    )


def test_missing_tensors_tokenizers_and_directories_are_refused(model: Path, tmp_path: Path) -> None:
    assert of_model(copied(model, tmp_path / "a", **{"model.safetensors": None}))["model"].status == "failed"
    without = copied(model, tmp_path / "b", **{"tokenizer.json": None})
    assert of_model(without)["tokenizer"].status == "failed"
    assert list(of_model(tmp_path / "none")) == ["model"]


def test_an_end_of_sequence_at_which_generation_does_not_stop_is_warned_of(model: Path, tmp_path: Path) -> None:
    other = of_model(copied(model, tmp_path / "a", generation_config={"eos_token_id": [5]}))["special tokens"]
    assert other.status == "warning" and "but generation stops at" in other.found and "(5)" in other.found
    none = of_model(copied(model, tmp_path / "b", tokenizer_config={"eos_token": None}))["special tokens"]
    assert none.status == "failed" and "no end-of-sequence token" in none.found


@pytest.mark.parametrize(
    ("template", "status", "found"),
    [
        (TEMPLATE.replace("</s>", "\n"), "warning", "which is no end-of-turn token"),
        (TEMPLATE.replace("{{ m.role }}", "<|im_start|>{{ m.role }}"), "warning", "it writes <|im_start|>, which"),
        ("{{ raise_exception('no') }}", "failed", "the chat template refuses the row"),
        ("{{ messages | length }}" + TEMPLATE, "failed", "renders the prompt differently with an answer than alone"),
    ],
)
def test_a_template_that_does_not_fit_is_told(model: Path, template: str, status: str, found: str) -> None:
    check = of_model(model, chat_template=template)["chat template"]
    assert check.status == status and found in check.found, check


# Processes


def test_two_processes_meet_add_up_and_see_the_same_directory(tmp_path: Path) -> None:
    first, second = run_world(2, check_ranks, str(tmp_path / "run"))
    assert second == [] and not has_failed(first)
    assert [check.name for check in first] == ["2 processes", "same versions", "all-reduce", "shared output_dir"]
    assert first[2].found.startswith("sums are right; ") and list(tmp_path.iterdir()) == []


def by_our_launcher(nproc: int, config: str) -> tuple[list[Check], list[Check]]:
    """What `doctor --nproc` has the launcher do, with forked workers; and with workers that die."""
    from tests.helpers.launched import _Worker

    class Forked(_Worker):
        def __init__(self, command: list[str], **options: Any) -> None:
            Forked.main = staticmethod(lambda: cli.main(command[3:]))
            super().__init__(command, **options)

    class Dying(_Worker):
        main = staticmethod(lambda: 7)

    found = []
    for workers in (Forked, Dying):
        subprocess.Popen = workers  # type: ignore[assignment,misc]
        found.append(examine_ranks(nproc, ["doctor", config, doctor.RANKS]))
    return found[0], found[1]


def test_nproc_has_our_launcher_start_the_processes_and_says_where_they_die(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}/run\n")
    ((found, died),) = run_world(1, by_our_launcher, 2, str(tmp_path / "run.yaml"), new=True)  # it forks: no threads yet
    names = ["2 processes", "same versions", "all-reduce", "shared output_dir"]
    assert [check.name for check in found] == names and not has_failed(found)
    words = "they ended with status 7 and said nothing"
    assert died == [Check("2 processes", "failed", words, "See what they printed above.")]


def test_the_command_prints_one_json_object_and_its_status_is_for_scripts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": {"path": str(model)}, "output_dir": str(tmp_path / "run"), "data": {"cache_dir": str(tmp_path)}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    assert cli.main(["doctor", str(tmp_path / "run.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert {"python", "packages", "device", "attention", "kernels head", "MPI", "model", "vocabulary", "disk"} <= {
        check["name"] for check in answer["checks"]
    }
    assert cli.main(["doctor", str(tmp_path / "run.yaml"), "output_dir=/proc/run", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    failed = [one["name"] for one in answer["checks"] if one["status"] == "failed"]
    assert not answer["ok"] and failed == ["output_dir writable", "disk"]


def alone_of_two() -> list[Check]:
    os.environ |= {"WORLD_SIZE": "2", "MEGADPO_RENDEZVOUS_TIMEOUT": "1"}
    return check_ranks()


def cannot_write() -> list[Check]:
    return check_ranks("/proc/megadpo")


def test_a_process_that_does_not_come_and_a_directory_that_rank_0_cannot_write_are_told() -> None:
    (checks,) = run_world(1, alone_of_two)
    assert [check.status for check in checks] == ["failed"] and "rank 1 of 2 did not come" in checks[0].found
    (checks,) = run_world(1, cannot_write)
    assert by_name(checks)["shared output_dir"].status == "failed"


def test_ranks_that_differ_are_told() -> None:
    one = Rank("a", "3.11.7", "2.13.0", "0.1.0", "CPU", True)
    other = Rank("b", "3.11.7", "2.12.0", "0.1.0", "CPU", False)
    assert judge_versions([one, one])[0].status == "ok" and judge_output_dir([one, one], "run").status == "ok"
    (check,) = judge_versions([one, other])
    assert check.status == "failed" and check.found.startswith("rank 1 on b has Python 3.11.7, torch 2.12.0")
    assert judge_versions([one, dataclasses.replace(one, code="0.1.1")])[0].status == "failed"
    assert judge_output_dir([one, other], "run").found == "b cannot see rank 0's run"


def test_wrong_sums_fail_and_slow_ones_are_warned_of_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_all_reduce(False, 1e-4, 1e9, 2, 1).status == "failed"
    assert judge_all_reduce(True, 1e-4, 1e8, 2, 1).status == "ok"
    monkeypatch.setattr(ranks, "communication_backend", lambda: "nccl")
    for num_machines, slow, fast in ((1, 5e9, 5e10), (2, 5e8, 5e9)):
        assert judge_all_reduce(True, 1e-4, slow, 16, num_machines).status == "warning"
        assert judge_all_reduce(True, 1e-4, fast, 16, num_machines).status == "ok"
