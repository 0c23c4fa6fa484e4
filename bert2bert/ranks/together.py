"""What the ranks do together once their process group exists, with or without an engine. Every rank makes each call.

Refuses nothing itself: a UserError that rank 0 meets is raised on every rank, so that none waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bert2bert.errors import UserError
from bert2bert.files.disk import disk_errors
from bert2bert.ranks.stopping import SIGNALS, Stop


def first() -> bool:
    """Whether this is rank 0."""
    return bool(dist.get_rank() == 0)


def total(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over the ranks, exact for counts below 2**53."""
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return [float(value) for value in summed.tolist()]


def on_first(root: Path, *acts: Callable[[], Any]) -> Any:
    """Do things that touch ``root`` on rank 0 while the others wait; what the last one returns, on every rank."""
    box: list[Any] = [None, None]
    if first():
        try:
            with disk_errors(root):
                box[0] = [act() for act in acts][-1]
        except UserError as error:
            box[1] = error
        except OSError as error:
            box[1] = UserError(f"{root} cannot be written: {error}")
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def asked(stop: Stop) -> list[float]:
    """This rank's share in asking all to stop: numbers to be summed over the ranks, for `answer`."""
    return [float(stop.caught is number) for number in SIGNALS]


def answer(totals: list[float]) -> str | None:
    """The name of the signal that some rank got, from sums of what `asked` gave."""
    return next((number.name for number, ranks in zip(SIGNALS, totals, strict=True) if ranks), None)
