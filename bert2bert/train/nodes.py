"""Whether all ranks of a job are of one mind before the first step: the same program, packages, recipe, ds_config, data
and checkpoint, and one output folder that all see.

Refuses (`InvalidConfig`) ranks that differ, and names the odd hosts, what they have and what rank 0 has.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from bert2bert.checkpoints.facts import versions
from bert2bert.errors import InvalidConfig
from bert2bert.ranks.distributed import RANKS, write_on_first
from bert2bert.recipe import Recipe
from bert2bert.train import environment

_REMEDIES = {
    "program": "Let all nodes run one checkout (PROJECT in launch/pretrain.sbatch), or install the same one on each",
    "packages": "Let all nodes use one environment (PYTHON in launch/pretrain.sbatch), or install the same versions",
    "recipe": "Give every rank the same recipe and the same options",
    "ds_config": "Give every rank the same ds_config",
    "data": "Let --bins lie on a file system that all nodes see, or copy the same bins to each",
    "checkpoint": "Let --resume lie on a file system that all nodes see",
}


def facts(recipe: Recipe, ds_config: Mapping[str, Any], data: Mapping[str, Any], source: Path | None) -> dict[str, str]:
    """What must be the same on all ranks, in words or digests."""
    found = {**versions("deepspeed", "transformers"), "Python": platform.python_version()}
    newest = source / "latest" if source is not None else None
    tag = newest.read_text(encoding="utf-8").strip() if newest is not None and newest.is_file() else ""
    return {
        "program": _program(),
        "packages": ", ".join(f"{name} {version}" for name, version in found.items()),
        "recipe": _digest(recipe.to_dict()),
        "ds_config": _digest(dict(ds_config)),
        "data": f"{data['digest']}, tokenizer {data['tokenizer_digest']}",
        "checkpoint": "none" if source is None else f"{source} {tag}".strip(),
    }


def check(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    data: Mapping[str, Any],
    source: Path | None,
    output: Path,
    device: torch.device,
) -> dict[str, str]:
    """Lines for the head of a job's log, once all ranks were found to be of one mind. Collective; rank 0 has made
    ``output``. ``data``: digests of the bins; ``source``: what the run begins with. Raises InvalidConfig."""
    check_shared(output)
    return table(hosts(facts(recipe, ds_config, data, source)), device)


def hosts(own: Mapping[str, str]) -> list[str]:
    """The host of every rank, once all were found to have the same facts. Collective. Raises InvalidConfig."""
    found = RANKS.allgather((socket.gethostname(), dict(own)))
    names = [host for host, _ in found]
    for key, first in found[0][1].items():
        odd = {host: theirs[key] for host, theirs in found if theirs[key] != first}
        if odd:
            named = "; ".join(f"{host} has {value}" for host, value in list(odd.items())[:4])
            raise InvalidConfig(
                f"the ranks do not have the same {key}: {names[0]} (rank 0) has {first}; {named}"
                + (f"; and {len(odd) - 4} hosts more" if len(odd) > 4 else "")
                + f". {_REMEDIES[key]}"
            )
    return names


def check_shared(output: Path) -> None:
    """Raise InvalidConfig on every rank unless all see the folder. Collective; rank 0 has made it."""
    (token,) = RANKS.allgather(uuid.uuid4().hex)[:1]
    mark = output / f".seen-{token}"
    write_on_first(output, mark.touch)
    try:
        seen = RANKS.allgather((socket.gethostname(), _sees(mark)))
    finally:
        write_on_first(output, lambda: mark.unlink(missing_ok=True))
    if blind := sorted({host for host, sees in seen if not sees}):
        raise InvalidConfig(
            f"--output {output} is another folder on {', '.join(blind[:8])} than on {seen[0][0]}, where rank 0 runs: "
            "let it lie on a file system that all nodes see"
        )


def table(names: list[str], device: torch.device) -> dict[str, str]:
    """Which nodes, how they talk, which versions. names: the host of every rank. Collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    devices = RANKS.allgather(name)
    counts = Counter(zip(names, devices, strict=True))
    nodes = [f"{host}: {count} x {device}" for (host, device), count in counts.items()]
    backend = torch.distributed.get_backend()
    variable = f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
    used = RANKS.allgather(os.environ.get(variable, "").removeprefix("="))
    kinds = {"Python": platform.python_version(), **versions("deepspeed", "transformers")}
    if device.type == "cuda":
        kinds |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return {
        "nodes": "; ".join(nodes[:16]) + (f"; and {len(nodes) - 16} more" if len(nodes) > 16 else ""),
        "network": f"{backend} over {_over(names, used)} ({variable}), first node {os.environ['MASTER_ADDR']}",
        "versions": ", ".join(f"{key} {value}" for key, value in kinds.items()),
        "environ": environment.line(names),
    }


def _over(names: list[str], used: list[str]) -> str:
    """Which interface, and on which hosts if there are several."""
    found = environment.where([interface or "an interface of its choice" for interface in used], names, 4)
    return next(iter(found)) if len(found) == 1 else "; ".join(f"{key} on {on}" for key, on in found.items())


def _sees(mark: Path) -> bool:
    """Whether a file is there; network file systems may need a look at its folder first."""
    try:
        return mark.exists() or mark.name in os.listdir(mark.parent)
    except OSError:
        return False


@cache
def _program() -> str:
    """Digest of this package's source files."""
    root, total = Path(__file__).resolve().parents[1], xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def _digest(value: Any) -> str:
    return xxhash.xxh3_64(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
