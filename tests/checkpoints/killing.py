"""Small growths that kill their own process at a moment one names.

Run under mpirun: python -m tests.checkpoints.killing TARGET FORM RANK CALL
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from bert2bert.checkpoints.commit import journal, threads
from bert2bert.commands import writing
from bert2bert.ranks.comm import ALONE, world
from tests.checkpoints.engines import hf_config
from tests.checkpoints.targets import make_spec, make_tensors, reader
from tests.doors import grow, write_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "zero": {"format": "zero", "stage": 2, "world_size": 5},
    "universal": {"format": "universal"},
    "hub": {"format": "hub", "shard_size": "20KB"},
}


def make_source(folder: Path) -> None:
    """A ZeRO-2 checkpoint of two ranks, ``folder/small``, and beside it ``big.json``, the config of a larger model."""
    spec = make_spec()
    values = reader(make_tensors(spec))
    write_checkpoint(
        folder / "small", spec, values, format="zero", stage=2, world_size=2, manifest_growth=None
    )  # fmt: skip
    sizes = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 3}
    (folder / "big.json").write_text(json.dumps({"model_type": "bert", **hf_config(**sizes)}))


def grow_small(
    target: Path, form: str, *, at: int = 0, comm: Any = ALONE, say: Callable[[str], None] = lambda text: None
) -> int:
    """Grow the source beside ``target``; SIGKILL this process at the ``at``-th call that Python makes, in any thread,
    since the writing began (0: never). Returns how many calls there were."""
    calls, write = itertools.count(1), writing.write_checkpoint

    def tick(frame: Any, event: str, what: Any) -> None:
        if event in ("call", "c_call") and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*given: Any, **more: Any) -> Path:
        threading.setprofile(tick)
        sys.setprofile(tick)
        try:
            return write(*given, **more)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    with (
        mock.patch.object(writing, "write_checkpoint", counted),
        mock.patch.object(journal, "_PAUSE", 0),  # else files wait for company as long as a small growth takes
        mock.patch.object(threads, "THREADS", min(threads.THREADS, 3)),  # else most of the few files end together
    ):
        grow(
            target.parent / "small", target, target.parent / "big.json", width="aki", lossy=True, measure=False,
            comm=comm, say=say, **FORMS[form],
        )  # fmt: skip
    return next(calls)


if __name__ == "__main__":
    ranks = world()
    target, form, rank, call = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    print("calls", grow_small(target, form, at=call if ranks.rank == rank else 0, comm=ranks, say=print))
