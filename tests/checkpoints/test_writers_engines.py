"""What is written, loaded by real, unmodified DeepSpeed engines: every value, step and hyper-parameter bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.job import TargetSpec
from tests.checkpoints.engines import STATES, Case, build, release, train, truth
from tests.checkpoints.targets import BETAS, DECAY, EPS, LR, make_spec, make_tensors, reader
from tests.distributed import run_ranks
from tests.doors import write_checkpoint

SCALER = {"cur_scale": 2048.0, "cur_iter": 11, "last_overflow_iter": 4, "scale_window": 500, "cur_hysteresis": 1}
SMALL = {"sub_group_size": 5000}  # several sub-groups in stage 3
UNIVERSAL = {"checkpoint": {"load_universal": True}}


@dataclass(frozen=True)
class Load:
    """A checkpoint folder and the engine that must be able to resume it; ``fresh``: it holds no moments."""

    folder: str
    case: Case
    fresh: bool = False


def spec_of(case: Case, **over: Any) -> TargetSpec:
    if case.precision == "fp16":
        over["loss_scaler"] = SCALER
    if case.buffer:
        over["buffers"] = {"bert.tally": torch.tensor([5.0, 6.0, 7.0])}
    return make_spec(case.precision, case.layout, **over)


def steps_in(engine: Any) -> list[float]:
    """The live optimizer's step of each group (stages 1, 2) or sub-group (stage 3), in order."""
    inner = engine.optimizer.optimizer
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return [float(inner.state[flat]["step"]) for flat in engine.optimizer.fp32_partitioned_groups_flat]
    return [float(inner.state[group["params"][0]]["step"]) for group in inner.param_groups]


def mend_universal_stage3(engine: Any) -> None:
    """DeepSpeed shares one step tensor among sub-groups; the other defect of its loader the writer avoids."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


def check(load: Load) -> None:
    """Runs on every rank: resume, compare with what was written, train on."""
    case, universal = load.case, "checkpoint" in load.case.config
    spec = spec_of(case)
    engine = build(case)
    path, client = engine.load_checkpoint(load.folder)
    assert path is not None and client["note"] == {"epoch": 3}
    expected = make_tensors(spec)
    if universal and case.stage == 3:
        mend_universal_stage3(engine)
    found = truth(engine, case)
    assert found["tensors"].keys() == expected.keys()
    for name, states in found["tensors"].items():
        for state in STATES:
            wanted = torch.zeros(()) if load.fresh and state != "fp32" else expected[name][state]
            assert torch.equal(states[state], wanted.expand(states[state].shape)), (load, name, state)
    for group, target in zip(found["groups"], spec.groups, strict=True):
        assert group["names"] == list(target.names)
        assert (group["lr"], group["weight_decay"]) == (LR, DECAY if target.decay else 0.0), load
        assert (tuple(group["betas"]), group["eps"]) == (BETAS, EPS), load
    steps = steps_in(engine)
    if case.stage < 3:
        assert steps == [0 if load.fresh else g.step for g in spec.groups], load
    elif universal or load.fresh:  # stage 3 loads one step for all
        assert set(steps) == {0 if load.fresh else max(g.step for g in spec.groups)}, load
    else:
        assert [s for s, prior in zip(steps, [None, *steps], strict=False) if s != prior] == (
            [g.step for g in spec.groups] if case.layout == "layers" else [7.0]
        ), load
    assert found["counters"] == spec.counters and found["lr_scheduler"] == spec.lr_scheduler
    if case.precision == "fp16":
        assert {key: found["loss_scaler"][key] for key in SCALER} == SCALER, load
        assert found["loss_scaler"]["min_scale"] == 1 and engine.optimizer.overflow is False
    assert engine.gradient_clipping() == 1.0 and getattr(engine.optimizer, "clip_grad", 1.0) == 1.0
    if case.stage < 3:  # the weights that the next forward uses
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter.data, expected[name]["fp32"].to(parameter.dtype)), (load, name)
    if case.buffer and not universal:
        assert torch.equal(found["buffers"]["bert.tally"].float(), torch.tensor([5.0, 6.0, 7.0]))
    losses = train(engine, case, 2)
    assert all(math.isfinite(loss) for loss in losses)
    if case.precision != "fp16":  # whose first steps may overflow
        assert steps_in(engine) == [step + 2 for step in steps], load
    release(engine)


def check_all(loads: list[Load]) -> None:
    for load in loads:
        check(load)


def native_cases(world: int) -> list[Case]:
    layouts = ["decay", "layers", "single"]
    cases = [Case(f"z{s}", s, layout=layouts[(s + world) % 3], buffer=s == world) for s in (1, 2, 3)]
    if world == 2:
        cases += [
            Case("z1bf16", 1, "bf16", layout="layers"),
            Case("z2bf16", 2, "bf16"),
            Case("z3bf16", 3, "bf16"),
            Case("z2fp16", 2, "fp16"),
            Case("z3fp16", 3, "fp16", layout="layers"),
            Case("z3sub", 3, zero=SMALL),
        ]
    return cases


@pytest.mark.parametrize("world", [1, 2, 3])
def test_native_checkpoints_resume_in_unmodified_engines(tmp_path: Path, world: int) -> None:
    loads = []
    for case in native_cases(world):
        spec = spec_of(case)
        folder = tmp_path / case.name
        write_checkpoint(
            folder, spec, reader(make_tensors(spec)), format="zero", stage=case.stage, world_size=world,
            manifest_growth=None, **case.zero,
        )  # fmt: skip
        loads.append(Load(str(folder), case))
    run_ranks(check_all, world, loads)


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One universal folder per optimizer layout and precision, and one without moments."""
    root = tmp_path_factory.mktemp("universal")
    folders = {}
    for layout, precision in [("decay", "fp32"), ("layers", "fp32"), ("decay", "fp16")]:
        spec = spec_of(Case("", precision=precision, layout=layout))
        folders[f"{layout}-{precision}"] = folder = root / f"{layout}-{precision}"
        write_checkpoint(folder, spec, reader(make_tensors(spec)), format="universal", manifest_growth=None)
    spec = without_moments(make_spec())
    folders["fresh"] = root / "fresh"
    write_checkpoint(root / "fresh", spec, reader(make_tensors(spec)), format="universal", manifest_growth=None)
    return folders


def without_moments(spec: TargetSpec) -> TargetSpec:
    return replace(spec, states=("fp32",), groups=tuple(replace(g, step=0) for g in spec.groups))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_one_universal_folder_for_every_stage_and_world(universal: dict[str, Path], world: int) -> None:
    decay, fresh, fp16, layers = (universal[key] for key in ("decay-fp32", "fresh", "decay-fp16", "layers-fp32"))
    loads = [Load(str(decay), Case(f"z{s}", s, "bf16" if s == world else "fp32", config=UNIVERSAL)) for s in (1, 2, 3)]
    if world == 1:
        loads += [Load(str(fresh), Case(f"fresh{s}", s, config=UNIVERSAL), fresh=True) for s in (2, 3)]
        loads += [Load(str(fp16), Case(f"fp16{s}", s, "fp16", config=UNIVERSAL)) for s in (1, 3)]
    if world == 2:
        loads += [Load(str(layers), Case(f"layers{s}", s, layout="layers", config=UNIVERSAL)) for s in (2, 3)]
        loads.append(Load(str(decay), Case("sub", 3, zero=SMALL, config=UNIVERSAL)))
    run_ranks(check_all, world, loads)


def test_native_checkpoint_without_moments_is_a_fresh_optimizer(tmp_path: Path) -> None:
    loads = []
    for stage in (2, 3):
        spec = without_moments(make_spec())
        folder = tmp_path / f"z{stage}"
        write_checkpoint(
            folder, spec, reader(make_tensors(spec)), format="zero", stage=stage, world_size=1, manifest_growth=None
        )
        loads.append(Load(str(folder), Case(f"z{stage}", stage), fresh=True))
    run_ranks(check_all, 1, loads)


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 3), (3, 2)])
def test_deepspeeds_own_zero_to_fp32_reads_the_shards(tmp_path: Path, stage: int, world: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    spec = spec_of(Case("", buffer=True))
    tensors = make_tensors(spec)
    write_checkpoint(
        tmp_path / "d", spec, reader(tensors), format="zero", stage=stage, world_size=world, manifest_growth=None,
        sub_group_size=5000,
    )  # fmt: skip
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "d"))
    wanted = {name: states["fp32"] for name, states in tensors.items()} | spec.buffers
    wanted |= {absent: wanted[kept] for absent, kept in spec.aliases.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
