"""What the writers write, the readers read: every format, any world size, steps and hyper-parameters included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.job import TargetGroup, TargetSpec
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import STATES
from tests.doors import write_checkpoint

SHAPES = {"emb.weight": (61, 8), "a.weight": (8, 8), "a.bias": (8,), "scale": (), "tiny": (1,), "b.weight": (5, 8)}
VALUES = {
    (name, state): torch.randn(shape, generator=torch.Generator().manual_seed(i * 3 + j)) for i, (name, shape) in
    enumerate(SHAPES.items()) for j, state in enumerate(STATES)
}  # fmt: skip
GROUPS = [(("emb.weight", "a.weight"), 0.1, 7), (("a.bias", "tiny", "scale"), 0.0, 7), (("b.weight",), 0.1, 0)]


def values(name: str, state: str, start: int, stop: int) -> torch.Tensor:
    return VALUES[name, state] if not SHAPES[name] else VALUES[name, state][start:stop]


def spec(precision: str) -> TargetSpec:
    hyper = {"lr": 0.25, "betas": (0.9, 0.98), "eps": 1e-6}
    return TargetSpec(
        shapes=SHAPES,
        aliases={"head.weight": "emb.weight"},
        config={"model_type": "bert"},
        groups=tuple(
            TargetGroup("all", bool(d), names, {**hyper, "weight_decay": d}, step) for names, d, step in GROUPS
        ),
        group_layout="decay",
        precision=precision,
        states=STATES,
        counters={"global_steps": 7, "global_samples": 70, "skipped_steps": 1},
        lr_scheduler={"last_batch_iteration": 6},
        loss_scaler={"dynamic": True, "cur_scale": 1024.0, "cur_iter": 8},
        client_state={"epoch": 2},
        buffers={"tally": torch.arange(3.0)},
        extra_files={},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "how",
    [{"format": "zero", "stage": s, "world_size": w} for s in (1, 2, 3) for w in (1, 2, 5)] + [{"format": "universal"}],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_optimizer_checkpoints(tmp_path: Path, how: dict[str, Any], precision: str) -> None:
    write_checkpoint(tmp_path / "out", spec(precision), values, manifest_growth=None, **how)
    source = open_source(tmp_path / "out")
    assert (source.format, source.precision, source.states) == (how["format"], precision, STATES)
    assert (source.stage, source.world_size) == (how.get("stage"), how.get("world_size"))
    assert list(source.tensors) == list(SHAPES) and source.aliases == {"head.weight": "emb.weight"}
    for (name, state), want in VALUES.items():
        found = source.read(name, state, 0, want.shape[0] if want.dim() else 1)
        assert found.shape == want.shape and torch.equal(found, want), (name, state)
    assert [[source.step(n) for n in names] for names, _, _ in GROUPS] == [
        [step] * len(names) for names, _, step in GROUPS
    ]
    assert [(tuple(g["names"]), g["weight_decay"], g["lr"]) for g in source.groups] == [
        (n, d, 0.25) for n, d, _ in GROUPS
    ]
    assert source.counters == {"global_steps": 7, "global_samples": 70, "skipped_steps": 1}
    assert source.lr_scheduler == {"last_batch_iteration": 6} and source.client_state == {"epoch": 2}
    assert torch.equal(source.buffers["tally"], torch.arange(3.0)) and source.config == {"model_type": "bert"}
    if precision == "fp16":
        scaler = source.loss_scaler
        assert scaler is not None and (scaler["cur_scale"], scaler["cur_iter"], scaler["dynamic"]) == (1024.0, 8, True)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_hub_folder(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path / "out", spec(precision), values, format="hub", manifest_growth=None)
    source = open_source(tmp_path / "out")
    assert (source.format, source.precision, source.states) == ("hub", precision, ("fp32",))
    assert list(source.tensors) == list(SHAPES) and source.aliases == {"head.weight": "emb.weight"}
    for name, shape in SHAPES.items():
        found = source.read(name, "fp32", 0, shape[0] if shape else 1)
        assert torch.equal(found, VALUES[name, "fp32"].to(dtype))
