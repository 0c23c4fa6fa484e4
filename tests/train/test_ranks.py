"""Ranks from the environments that launchers really set (recorded), and clear refusals of broken ones."""

from __future__ import annotations

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.ranks.launcher import Ranks, device_number, first_host, set_up, timeout

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
            "MASTER_PORT": "29501"}  # fmt: skip
DEEPSPEED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29500"}  # fmt: skip
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-vm-9999@1"}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]"}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected", "address"),
    [
        (TORCHRUN, (3, 1, 4), "n1"),
        (DEEPSPEED, (1, 1, 2), "127.0.0.1"),
        (OPEN_MPI, (1, 1, 2), "127.0.0.1"),
        (MPICH, (1, 1, 2), "127.0.0.1"),
        (SRUN, (5, 1, 8), "gpu07"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu07"}, (5, 1, 8), "127.0.0.1"),
        ({}, (0, 0, 1), "127.0.0.1"),
        # mpirun starts its daemons with srun, so its ranks see the daemon's SLURM_PROCID too
        (SRUN | OPEN_MPI, (1, 1, 2), "127.0.0.1"),
        (SRUN | MPICH, (1, 1, 2), "127.0.0.1"),
        (SRUN | TORCHRUN, (3, 1, 4), "n1"),
        # an mpirun that starts a launcher on each of two hosts, and one that starts a torchrun for one process each
        (OPEN_MPI | TORCHRUN, (3, 1, 4), "n1"),
        (OPEN_MPI | ALONE | {"TORCHELASTIC_RUN_ID": "x"}, (0, 0, 1), "127.0.0.1"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1), "127.0.0.1"),
    ],
)
def test_every_launcher_is_understood(environ: dict, expected: tuple, address: str) -> None:
    environ = dict(environ)
    found = set_up(environ)
    assert (found.rank, found.local, found.world) == expected
    assert [int(environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == list(expected)
    assert environ["MASTER_ADDR"] == address
    assert 1024 < int(environ["MASTER_PORT"]) < 65536


def test_set_up_twice_finds_the_same() -> None:
    environ = dict(OPEN_MPI)
    first = set_up(environ)
    once = dict(environ)
    second = set_up(environ)
    assert environ == once and (first.rank, first.local, first.world) == (second.rank, second.local, second.world)


def test_what_the_user_sets_is_kept() -> None:
    environ = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4444"}
    set_up(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "4444")


def test_ranks_of_one_job_agree_on_a_port_and_jobs_differ() -> None:
    def port(environ: dict) -> str:
        environ = dict(environ)
        set_up(environ)
        return environ["MASTER_PORT"]

    assert port(OPEN_MPI) == port(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert port(OPEN_MPI) != port(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-vm-1234@1"})
    assert port(SRUN) == port(SRUN | {"SLURM_PROCID": "0"})
    assert port(SRUN) != port(SRUN | {"SLURM_JOB_ID": "78"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set; expected a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one'; expected a whole number, as deepspeed or torchrun sets it"),
        (TORCHRUN | {"RANK": "4"}, "says rank 4 (local 1) of 4; expected ranks below 4"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "-x MASTER_ADDR=HOST"),
        (MPICH | {"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}, "MASTER_ADDR is not set"),
        ({"SLURM_STEP_ID": "0"}, "SLURM_STEP_NUM_TASKS is not set"),
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "outside srun"),
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "4(x2)"}, "SLURM_NTASKS is '4(x2)'"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        (TORCHRUN | {"MASTER_PORT": "tcp"}, "MASTER_PORT is 'tcp'; expected a port's number, 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        (TORCHRUN | {"MASTER_PORT": "-1"}, "MASTER_PORT is '-1'"),
        (SRUN | {"MASTER_PORT": "29500 "}, "MASTER_PORT is '29500 '"),
        ({"MASTER_PORT": "29500,29501"}, "MASTER_PORT is '29500,29501'"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"},
            "0 where every rank has a host or container of its own",
        ),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "of 0; expected at least one rank"),
        ({"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK is ''"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "says local rank 2 of 2 on this host and 4 ranks in all"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "says local rank 1 of 8 on this host and 4 ranks in all"),
        (OPEN_MPI | ALONE, "but mpirun started this process as rank 1 of 2"),
        (OPEN_MPI | ALONE | {"WORLD_SIZE": "2"}, "unset RANK, LOCAL_RANK and WORLD_SIZE"),
        (MPICH | ALONE, "(PMI_RANK, PMI_SIZE)"),
    ],
)
def test_a_broken_environment_is_refused_with_the_variable(environ: dict, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        set_up(dict(environ))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],b", "gpu03"),
        ("a[1]-ib,b", "a1-ib"),
        ("rack-2-node[001-128]", "rack-2-node001"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_node_list_without_a_host_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="names no host"):
        first_host("[1-2]")


def test_one_process_is_rank_0_of_1() -> None:
    assert set_up({}) == Ranks("one process", 0, 0, 1, 1)


def test_the_time_to_wait() -> None:
    assert timeout(None, {}) == 600.0
    assert timeout(None, {"DEEPSPEED_TIMEOUT": "30"}) == 1800.0
    assert timeout(2.5, {"DEEPSPEED_TIMEOUT": "30"}) == 2.5
    for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e12):
        with pytest.raises(InvalidConfig, match="--timeout is"):
            timeout(wrong, {})
    for minutes in ("ten", "0", "1.5", ""):
        with pytest.raises(InvalidConfig, match="DEEPSPEED_TIMEOUT is"):
            timeout(None, {"DEEPSPEED_TIMEOUT": minutes})


def test_the_device_is_numbered_by_the_local_rank_or_is_the_only_one_seen() -> None:
    environ = dict(OPEN_MPI, LOCAL_RANK="1")
    assert device_number(8, environ) == 1 and environ["LOCAL_RANK"] == "1"
    assert device_number(1, environ) == 0
    assert environ["LOCAL_RANK"] == environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"  # DeepSpeed compares the two
    with pytest.raises(InvalidConfig, match="LOCAL_RANK 5 sees 4 devices"):
        device_number(4, {"LOCAL_RANK": "5"})
