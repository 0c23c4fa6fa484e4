"""The ranks of a training run, once torch's process group exists, with or without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bert2bert.errors import UserError
from bert2bert.files.disk import disk_errors
from bert2bert.ranks.comm import T, on_first


class Distributed:
    """The ranks of torch's process group, as a `comm.Comm`."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    def allgather(self, item: T) -> list[T]:
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


RANKS = Distributed()


def total(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over the ranks, exact for counts below 2**53."""
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return [float(value) for value in summed.tolist()]


def write_on_first(root: Path, *acts: Callable[[], Any]) -> Any:
    """`on_first` for acts, in order, that write below ``root``: its disk's errors are UserErrors. The last result."""

    def act() -> Any:
        try:
            with disk_errors(root):
                return [act() for act in acts][-1]
        except OSError as error:
            raise UserError(f"{root} cannot be written: {error}") from error

    return on_first(RANKS, act)
