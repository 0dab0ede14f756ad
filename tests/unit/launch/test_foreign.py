"""The ranks that SLURM and deepspeed give."""

from __future__ import annotations

import pytest

from megadpo.errors import UserError
from megadpo.launch.foreign import adopt_deepspeed_arguments, adopt_slurm_environment, first_host


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]-node[03-04]", "rack1-node03"),
        ("a-b[001-128].cluster", "a-b001.cluster"),
    ],
)
def test_the_first_host_of_a_slurm_node_list_is_found(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_NODELIST": "n[2-3]",
}


def test_an_srun_task_takes_its_rank_from_slurm() -> None:
    environ = dict(SRUN)
    adopt_slurm_environment(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("5", "8", "1")
    assert environ["MASTER_ADDR"] == "n2" and 20000 <= int(environ["MASTER_PORT"]) < 32000


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0"},
        {"SLURM_STEP_ID": "4294967291"},
        {"SLURM_STEP_ID": ""},
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_torchrun_a_batch_script_and_a_single_task_keep_their_environment(change: dict[str, str]) -> None:
    environ = {**SRUN, **change}
    adopt_slurm_environment(environ)
    assert environ == {**SRUN, **change}


def test_the_local_rank_argument_of_deepspeed_is_taken_off() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"}
    assert adopt_deepspeed_arguments(["--local_rank=1", "train", "c.yaml"], environ) == ["train", "c.yaml"]
    assert (environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize(
    ("argument", "environ", "sentence"),
    [
        ("--local_rank=x", {"RANK": "3", "WORLD_SIZE": "4"}, "is not a number"),
        ("--local_rank=0", {}, "RANK is not set; leave it out"),
    ],
)
def test_a_local_rank_that_no_launcher_gave_is_refused(argument: str, environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        adopt_deepspeed_arguments([argument, "train"], dict(environ))
