"""Which rank of how many this process is, whatever started it, in the variables that torch and DeepSpeed read.

Understood: deepspeed and torchrun (RANK, ...), Open MPI's mpirun (OMPI_COMM_WORLD_*), MPICH's and PMI's (PMI_*), srun
(SLURM_*), and a plain start as one rank. An mpirun inside a Slurm job counts as mpirun. Refused: half-set variables,
and several ranks on several hosts without an address of the first. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from bert2bert.errors import InvalidConfig

GRACE_SECONDS = 5.0
"""How long a rank that has nothing new to say waits before it fails: a launcher ends all ranks with the first."""

LAUNCHED = "deepspeed or torchrun"
_OUTER = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_LOCAL = " (the rank's number on its host: 0 where every rank has a host or container of its own)"
_LONGEST = 30 * 24 * 3600.0
_PORTS = range(20000, 30000)


@dataclass(frozen=True)
class Ranks:
    """``launcher``: what the variables were taken from; ``local``: the rank's number on its host; ``local_size``: how
    many ranks this host has, None where the launcher does not say."""

    launcher: str
    rank: int
    local: int
    world: int
    local_size: int | None


def set_up(environ: MutableMapping[str, str] = os.environ) -> Ranks:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in ``environ`` and return what was found.

    MASTER_ADDR and MASTER_PORT are kept when set. Raises InvalidConfig, naming the variable to set.
    """
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: its traces of what is retried
    ranks = discover(environ)
    if port := environ.get("MASTER_PORT"):
        _check_port(port)
    environ["MASTER_ADDR"] = environ.get("MASTER_ADDR") or _address(ranks, environ)
    environ["MASTER_PORT"] = environ.get("MASTER_PORT") or str(_port(ranks, environ))
    environ.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local), WORLD_SIZE=str(ranks.world))
    if ranks.local_size is not None:  # DeepSpeed's CPU accelerator and torch read one each
        environ.setdefault("LOCAL_SIZE", str(ranks.local_size))
        environ.setdefault("LOCAL_WORLD_SIZE", str(ranks.local_size))
    return ranks


def timeout(seconds: float | None, environ: Mapping[str, str] = os.environ) -> float:
    """How long a rank waits for another: ``seconds``, or DeepSpeed's own DEEPSPEED_TIMEOUT (minutes), or 10 minutes."""
    minutes = environ.get("DEEPSPEED_TIMEOUT", "10")
    if not minutes.isdecimal() or int(minutes) == 0:
        raise InvalidConfig(f"the environment variable DEEPSPEED_TIMEOUT is {minutes!r}; expected whole minutes")
    if seconds is not None and not 0 < seconds <= _LONGEST:
        raise InvalidConfig(f"--timeout is {seconds:g}; expected seconds, more than 0 and at most {_LONGEST:.0f}")
    return min(60.0 * int(minutes), _LONGEST) if seconds is None else seconds


def _check_port(text: str) -> None:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise InvalidConfig(
            f"MASTER_PORT is {text!r}; expected a port's number, 1 to 65535, the same for every rank (deepspeed and "
            "torchrun: --master_port N)"
        )


def started_as(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank before anything is set up, as far as the environment says it; else 0."""
    try:
        return discover(environ).rank
    except InvalidConfig:
        names = (*(rank for rank, _ in _OUTER), "RANK", *(["SLURM_PROCID"] if "SLURM_STEP_ID" in environ else []))
        return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), 0)


@contextlib.contextmanager
def first_speaks(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """While words are parsed that every rank was given alike: rank 0 alone prints usage, help and what is wrong."""
    if started_as(environ) == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit as end:
            if end.code:
                time.sleep(GRACE_SECONDS)
            raise


def device_number(count: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """Which of the ``count`` devices that this process sees is its own: number LOCAL_RANK.

    A launcher may show each rank its own device alone (srun --gpus-per-task): then it is number 0 whatever the rank,
    and LOCAL_RANK, which DeepSpeed takes for the device's number, is set so. InvalidConfig for too few devices.
    """
    local = int(environ.get("LOCAL_RANK", "0"))
    if local < count:
        return local
    if count > 1:
        raise InvalidConfig(
            f"the rank with LOCAL_RANK {local} sees {count} devices, numbered from 0; start at most as many ranks on a "
            "host as it has devices"
        )
    environ.update({name: "0" for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK") if name in environ})
    return 0


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that the launcher's variables describe. Raises InvalidConfig where they are broken."""
    ranks = _find(environ)
    if not (ranks.rank < ranks.world and ranks.local < ranks.world):
        raise InvalidConfig(
            f"{ranks.launcher} says rank {ranks.rank} (local {ranks.local}) of {ranks.world}; expected "
            + (f"ranks below {ranks.world}" if ranks.world else "at least one rank")
        )
    if ranks.local_size is not None and not ranks.local < ranks.local_size <= ranks.world:
        raise InvalidConfig(
            f"{ranks.launcher} says local rank {ranks.local} of {ranks.local_size} on this host and {ranks.world} "
            "ranks in all; expected local ranks below their number, and no more of them than ranks"
        )
    _check_outer(ranks, environ)
    return ranks


def _check_outer(ranks: Ranks, environ: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that mpirun contradicts: exported by hand, they make one rank of many processes.

    An mpirun that starts launchers starts fewer than there will be ranks, and torchrun leaves a mark of its own.
    (Slurm's variables reach an interactive shell and all that is launched there, so they contradict nothing.)
    """
    if ranks.launcher != LAUNCHED or "TORCHELASTIC_RUN_ID" in environ:
        return
    for rank_name, world_name in _OUTER:
        rank, world = environ.get(rank_name, ""), environ.get(world_name, "")
        if not (rank.isdecimal() and world.isdecimal()):
            continue
        if int(world) > ranks.world or (int(world) == ranks.world and int(rank) != ranks.rank):
            raise InvalidConfig(
                f"RANK is {ranks.rank} and WORLD_SIZE {ranks.world}, but mpirun started this process as rank {rank} "
                f"of {world} ({rank_name}, {world_name}); unset RANK, LOCAL_RANK and WORLD_SIZE, or set them as mpirun "
                "does"
            )


def _find(environ: Mapping[str, str]) -> Ranks:
    def number(name: str, more: str = "") -> int:
        text = environ.get(name)
        if text is None or not text.isdecimal():
            raise InvalidConfig(
                f"the environment variable {name} is {'not set' if text is None else repr(text)}; expected a whole "
                f"number, as {launcher} sets it{more}. Start with deepspeed, torchrun, mpirun, srun, or plainly as one "
                "process (without RANK and WORLD_SIZE)"
            )
        return int(text)

    def optional(name: str) -> int | None:
        return number(name) if name in environ else None

    if "RANK" in environ or "WORLD_SIZE" in environ:
        launcher = LAUNCHED
        here = optional("LOCAL_WORLD_SIZE") or optional("LOCAL_SIZE")
        rank, world = number("RANK"), number("WORLD_SIZE")
        if "LOCAL_RANK" not in environ and world == 1:
            return Ranks(launcher, rank, 0, world, here)
        return Ranks(launcher, rank, number("LOCAL_RANK", _LOCAL), world, here)
    if "OMPI_COMM_WORLD_RANK" in environ:
        launcher = "mpirun"
        names = ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")
        return Ranks(launcher, *(number("OMPI_COMM_WORLD_" + name) for name in names))
    if "PMI_RANK" in environ:
        launcher = "mpirun"
        locals_ = [name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID") if name in environ]
        here = optional("MPI_LOCALNRANKS") or optional("PMI_LOCAL_SIZE")
        return Ranks(launcher, number("PMI_RANK"), number((*locals_, "LOCAL_RANK")[0]), number("PMI_SIZE"), here)
    if "SLURM_STEP_ID" in environ:  # inside srun; the batch script itself has SLURM_PROCID too, but no step
        launcher = "srun"
        world = number("SLURM_STEP_NUM_TASKS")
        here = world if environ.get("SLURM_STEP_NUM_NODES") == "1" else None
        return Ranks(launcher, number("SLURM_PROCID"), number("SLURM_LOCALID"), world, here)
    launcher = "sbatch"
    if "SLURM_JOB_ID" in environ and "SLURM_PROCID" in environ and (optional("SLURM_NTASKS") or 1) > 1:
        raise InvalidConfig(
            f"this Slurm job has {environ['SLURM_NTASKS']} tasks, but the process was started outside srun and would "
            "train alone; write `srun` before the command, as launch/pretrain.sbatch does"
        )
    return Ranks("one process", 0, 0, 1, 1)


def _address(ranks: Ranks, environ: Mapping[str, str]) -> str:
    if ranks.world == 1 or ranks.local_size == ranks.world:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") if ranks.launcher == "srun" else None
    nodes = nodes or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    raise InvalidConfig(
        f"{ranks.world} ranks run on several hosts ({ranks.launcher}) and MASTER_ADDR is not set; set it to the host "
        "of rank 0 for every rank, with mpirun: -x MASTER_ADDR=HOST (Open MPI) or -genv MASTER_ADDR HOST (MPICH)"
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: 'a[03-05,9],b' is 'a03'. InvalidConfig for anything else."""
    found = re.match(r"([^\[\],\s]+)(?:\[(\d+)[^\]]*\]([^\[\],\s]*))?", nodelist)
    if not found:
        raise InvalidConfig(f"the Slurm node list {nodelist!r} names no host; set MASTER_ADDR to the host of rank 0")
    return "".join(part for part in found.groups() if part)


def _port(ranks: Ranks, environ: Mapping[str, str]) -> int:
    """The same port on every rank of a job, another for another job on the same host."""
    if ranks.world == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    job = environ.get("PMIX_NAMESPACE") if ranks.launcher == "mpirun" else None
    if job is None and "SLURM_JOB_ID" in environ:
        job = environ["SLURM_JOB_ID"] + "." + environ.get("SLURM_STEP_ID", "")
    if job is None:
        return 29500  # torch's own default
    return _PORTS[int.from_bytes(hashlib.blake2b(job.encode(), digest_size=4).digest(), "big") % len(_PORTS)]
