"""A real two-node Slurm cluster, both nodes on this host, without systemd or cgroups, and jobs on it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.train.launched import ROOT

NEEDED = ("sbatch", "srun", "scontrol", "sinfo", "squeue", "slurmctld", "slurmd", "munged")

HERE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=10")
"""Options of sbatch for a job on both nodes."""

SLURM_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=300
SwitchType=switch/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2 RealMemory=1000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running cluster of the nodes n1 and n2; skips where there can be none."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a private Slurm cluster needs root")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)  # munge trusts no socket below a folder that others could not enter
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    ports = [free_port() for _ in range(4)]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=socket.gethostname(), folder=folder, ports=ports))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    env = {**os.environ, "PATH": path, "SLURM_CONF": str(conf)}
    munge = {name: f"{folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    daemons = [
        ["munged", "--force", f"--key-file={folder}/munge.key", f"--socket={munge['socket']}",
         f"--pid-file={munge['pid']}", f"--log-file={munge['log']}", f"--seed-file={munge['seed']}"],
        ["slurmctld", "-c", "-f", str(conf)],
        ["slurmd", "-c", "-N", "n1", "-f", str(conf)],
        ["slurmd", "-c", "-N", "n2", "-f", str(conf)],
    ]  # fmt: skip
    try:
        for daemon in daemons:
            done = subprocess.run(daemon, env=env, capture_output=True, text=True, timeout=30)
            if done.returncode:
                pytest.skip(f"{daemon[0]} does not start here: {done.stderr.strip()[-300:]}")
        deadline = time.monotonic() + 20
        while (idle := ask(env, "sinfo", "-h", "-t", "idle", "-o", "%D")) != "2":
            if time.monotonic() > deadline:
                pytest.skip(f"the two nodes did not come up (idle: {idle or 0}), see {folder}")
            time.sleep(0.3)
        yield env
    finally:
        for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge.pid"):
            file = folder / name
            if file.exists():
                subprocess.run(["kill", file.read_text().strip()], timeout=10)


def ask(env: dict[str, str], *command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout.strip()


def submit(env: dict[str, str], log: Path, *words: object, options: Sequence[str] = ()) -> str:
    """The number of a job of pretrain.sbatch on two nodes, one task each, if the options do not say otherwise."""
    # The script as shipped; what this cluster lacks, GPUs above all, is taken back by sbatch's own options.
    done = subprocess.run(
        ["sbatch", "--parsable", *HERE, f"--output={log}", *options, "launch/pretrain.sbatch", *map(str, words)],
        cwd=ROOT, env={"PYTHON": sys.executable, **env}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def facts(env: dict[str, str], job: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    return dict(word.split("=", 1) for word in ask(env, "scontrol", "show", "job", job).split() if "=" in word)


def wait(env: dict[str, str], job: str, log: Path, ready: Callable[[], bool]) -> None:
    """Until it is so; else the job is cancelled and the test fails with its log."""
    deadline = time.monotonic() + 200
    while not ready():
        if time.monotonic() > deadline:
            subprocess.run(["scancel", job], env=env, timeout=30)
            pytest.fail(f"the job took over 200 s:\n{log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.3)


def finish(env: dict[str, str], job: str, log: Path) -> tuple[str, str]:
    """(state as Slurm knows it, log) of a job that has ended."""
    alive = "PENDING,RUNNING,COMPLETING,CONFIGURING"
    wait(env, job, log, lambda: not ask(env, "squeue", "-h", "-j", job, "-t", alive))
    return facts(env, job)["JobState"], log.read_text()
