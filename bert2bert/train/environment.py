"""Which of the variables that steer a run reached which host: a line for the head of a job's log.

A launcher hands some of them on and drops others without a word, and a run then differs from host to host in speed, or
hangs. Values of secrets are never shown. Refuses nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bert2bert.ranks.distributed import RANKS

_STEERING = re.compile(r"(NCCL|GLOO|DS|OMP|MKL|TOKENIZERS|TORCH_NCCL|UCX|CUDA|HF|PYTORCH)_\w+")
_OF_A_RANK = ("CUDA_VISIBLE_DEVICES", "CUDA_VERSION", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What launchers, images and `ranks.interfaces` set for each host or rank by itself."""
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def listed(environ: Mapping[str, str] = os.environ) -> set[str]:
    """Names in the file from which the deepspeed launcher takes variables for all hosts: the user's own list."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: set[str] = set()
    for folder in (Path(environ.get("HOME") or "."), Path(".")):
        try:
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        found |= {line.partition("=")[0].strip() for line in lines if "=" in line}
    return found


def shown(environ: Mapping[str, str], names: set[str]) -> dict[str, str]:
    """The steering variables of one process and those of ``names``, in the order of the alphabet. Of a secret, only
    that it is set."""
    return {
        name: "is set" if _SECRET.search(name) else value
        for name, value in sorted(environ.items())
        if name in names or (_STEERING.fullmatch(name) and name not in _OF_A_RANK)
    }


def line(hosts: Sequence[str]) -> str:
    """What all hosts have alike, and what differs. Collective. ``hosts``: of every rank."""
    names = set().union(*RANKS.allgather(listed()))
    found = RANKS.allgather(shown(os.environ, names))
    first = found[0]
    alike = [f"{name}={value}" for name, value in first.items() if all(other.get(name) == value for other in found)]
    text = ", ".join(alike) or "none of NCCL_*, GLOO_*, DS_*, OMP_NUM_THREADS set"
    if odd := sorted({name for own in found for name in own if any(other.get(name) != own[name] for other in found)}):
        text += "; NOT ALIKE: " + "; ".join(_odd(name, found, hosts) for name in odd[:8])
        text += f"; and {len(odd) - 8} more" if len(odd) > 8 else ""
    return text


def _odd(name: str, found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Where a variable has which value."""
    parts = [f"{value} on {on}" for value, on in where([own.get(name, "not set") for own in found], hosts, 3).items()]
    return f"{name}: {', '.join(parts[:4])}"


def where(values: Sequence[str], hosts: Sequence[str], most: int) -> dict[str, str]:
    """Value -> the hosts that have it, at most so many of them named. values, hosts: of every rank."""
    found: dict[str, list[str]] = {}
    for value, host in dict.fromkeys(zip(values, hosts, strict=True)):
        found.setdefault(value, []).append(host)
    return {value: ", ".join(on[:most]) + (" …" if len(on) > most else "") for value, on in found.items()}
