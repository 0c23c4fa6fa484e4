"""Buffers that ``data_types.keep_in_fp32_modules`` keeps in fp32: read, written and loaded again in their own dtype.

Of DeepSpeed's names only those of buffers count; parameters that match are trained in the low precision all the same,
and their masters are fp32 as ever.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.open import open_source
from tests.checkpoints.engines import Case, build, release, train
from tests.distributed import run_ranks
from tests.doors import reshard

SEED = 4097  # the buffer holds 4097, 4098, 4099, which bf16 rounds
TALLY = "bert.tally"
POOLER = "bert.pooler.dense.weight"
KEPT = {"buffer_dtype": "bf16", "keep_in_fp32_modules": ["tally", "pooler"]}
CAST = {"buffer_dtype": "bf16", "keep_in_fp32_modules": []}
DTYPES = {"kept": torch.float32, "cast": torch.bfloat16}
CASES = {
    f"{name}{stage}": Case(
        f"{name}{stage}", stage, "bf16", steps=1, buffer=True, seed=SEED, config={"data_types": types}
    )
    for name, types in (("kept", KEPT), ("cast", CAST))
    for stage in (2, 3)
}  # fmt: skip


def values(buffer: torch.Tensor) -> tuple[torch.dtype, list[float]]:
    return buffer.dtype, buffer.tolist()


def held(engine: Any) -> tuple[torch.dtype, list[float]]:
    return values(dict(engine.module.named_buffers())[TALLY])


def save_on_rank(folder: str) -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        engine = build(case)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{name}")
        found[name] = held(engine), dict(engine.module.named_parameters())[POOLER].dtype
        release(engine)
    return found


def load_on_rank(folder: str) -> dict[str, Any]:
    """What engines hold whose own buffer is another one, after a load of each resharded checkpoint."""
    found = {}
    for name, case in CASES.items():
        engine = build(replace(case, stage=2, seed=0))
        assert engine.load_checkpoint(f"{folder}/{name}.resharded")[0] is not None
        found[name] = held(engine)
        release(engine)
    return found


@pytest.mark.timeout(200)
def test_a_buffer_keeps_the_dtype_that_the_engine_holds(tmp_path: Path) -> None:
    live = run_ranks(save_on_rank, 2, str(tmp_path), timeout=120)[0]
    for name, (tally, parameter) in live.items():
        assert tally[0] == DTYPES[name[:-1]] and parameter == torch.bfloat16  # buffers alone are kept
        source = open_source(tmp_path / name)
        assert source.precision == "bf16" and source.tensors[POOLER].dtype == "float32"  # the master
        assert values(source.buffers[TALLY]) == tally
        reshard(tmp_path / name, tmp_path / f"{name}.resharded", format="zero", stage=2, world_size=1, say=print)
    assert live["kept2"][0][1] == [4097, 4098, 4099] != live["cast2"][0][1]
    for name, tally in run_ranks(load_on_rank, 1, str(tmp_path), timeout=120)[0].items():
        assert tally == live[name][0]
