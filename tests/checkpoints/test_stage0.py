"""ZeRO 0 against live DeepSpeed engines, both ways, bit for bit: fp32, and both 16-bit forms of master weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import STATES
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from tests.checkpoints import engines
from tests.checkpoints.engines import Case, build, release, train
from tests.checkpoints.targets import DECAY, LR, make_spec, make_tensors, reader
from tests.checkpoints.test_readers_zero import edit, equal
from tests.distributed import run_ranks
from tests.doors import write_checkpoint
from tests.rounding import ROUNDING, gap

CASES = [
    Case("fp32", 0),
    Case("fp32single", 0, layout="single", model="mlm"),
    Case("fp32layers", 0, layout="layers", skip=(2, 5), buffer=True),
    Case("bf16", 0, "bf16", frozen=("layer.0.",), buffer=True, client_state={"epoch": 3}),
    Case("fp16", 0, "fp16", layout="layers"),
    Case("fused-bf16", 0, "bf16"),
    Case("fused-fp16", 0, "fp16", layout="layers", frozen=("layer.0.",)),
]
BY_NAME = {case.name: case for case in CASES}


def _decays(name: str) -> bool:
    """As transformers' example scripts have it, for a BERT."""
    return not any(part in name for part in ("bias", "LayerNorm.weight"))


def like(case: Case) -> Any:
    """The engine of a case. "fused": with the wrapper that DeepSpeed puts around its FusedAdam, whose kernel it would
    have to compile."""
    import deepspeed.runtime.engine as module

    fused = module.FusedAdam
    module.FusedAdam = engines.SkippingAdamW if case.name.startswith("fused") else fused
    try:
        return build(case)
    finally:
        module.FusedAdam = fused


def live_states(engine: Any, case: Case) -> dict[str, Any]:
    """Of every trained parameter: master weight, moments and step, taken from the engine's objects."""
    outer, found = engine.optimizer, {}
    inner = getattr(outer, "optimizer", outer)
    shapes = {name: p.shape for name, p in engine.module.named_parameters()}
    for g, names in enumerate(engine.group_names):
        live, at = inner.param_groups[g]["params"], 0
        for i, name in enumerate(names):
            numel = shapes[name].numel()
            flat = live[0] if case.name.startswith("fused") else live[i]
            state = inner.state.get(flat, {})
            start = at if case.name.startswith("fused") else 0
            at += numel

            def part(tensor: torch.Tensor, start: int = start, name: str = name) -> torch.Tensor:
                return tensor.detach().reshape(-1)[start : start + shapes[name].numel()].reshape(shapes[name]).clone()

            zeros = torch.zeros(shapes[name])
            found[name] = {"fp32": part(flat)} | {s: part(state[s]) if s in state else zeros for s in STATES[1:]}
            found[name]["step"] = int(state.get("step", 0))
    return found


def save_on_rank(folder: str) -> None:
    import deepspeed.comm as dist

    for case in CASES:
        engine = like(case)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{case.name}", client_state=dict(case.client_state))
        truth = {"states": live_states(engine, case), "weights": {}, "groups": engine.group_names}
        truth["weights"] = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        truth["counters"] = {k: getattr(engine, k) for k in ("global_steps", "global_samples", "skipped_steps")}
        if dist.get_rank() == 0:
            torch.save(truth, f"{folder}/{case.name}.truth.pt")
        release(engine)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with every case, saved by two ranks, and what the engines held."""
    folder = tmp_path_factory.mktemp("stage0")
    run_ranks(save_on_rank, 2, str(folder), timeout=200)
    return folder, {name: torch.load(folder / f"{name}.truth.pt") for name in BY_NAME}


@pytest.mark.parametrize("name", BY_NAME)
def test_everything_equals_the_live_engine(saved: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, truth = saved[0] / name, saved[1][name]
    case, source = BY_NAME[name], open_source(folder)
    assert (source.format, source.stage, source.world_size, source.tag) == ("zero", 0, 2, "global_step3")
    assert (source.precision, source.states, source.fused) == (case.precision, STATES, name.startswith("fused"))
    assert source.counters == truth["counters"] and source.client_state == case.client_state
    assert source.clip_grad == 1.0 and source.lr_scheduler is not None
    assert source.aliases["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    assert list(source.buffers) == ["bert.tally"] * case.buffer
    assert list(source.tensors) == list(truth["weights"])
    assert [tuple(g["names"]) for g in source.groups] == list(truth["groups"])
    for group in source.groups:
        assert group["weight_decay"] == (0.1 if case.layout == "single" or _decays(group["names"][0]) else 0.0)
    for tensor, weight in truth["weights"].items():
        states = truth["states"].get(tensor)
        assert source.tensors[tensor].trainable == (states is not None)
        if states is None:
            assert equal(source.read(tensor, "fp32", 0, len(weight)), weight) and source.step(tensor) == 0
            assert not source.read(tensor, "exp_avg", 0, len(weight)).any()
            continue
        assert source.step(tensor) == states["step"], tensor
        for state in STATES:
            assert equal(source.read(tensor, state, 0, len(weight)), states[state]), (tensor, state)
            assert equal(source.read(tensor, state, 1, 2), states[state][1:2]), (tensor, state)
    if case.precision == "fp16":
        assert source.loss_scaler is not None and source.loss_scaler["dynamic"] and source.loss_scaler["cur_iter"] > 0


def test_wrapped_adam_counts_one_step_more_than_were_taken(saved: tuple[Path, dict[str, Any]]) -> None:
    """DeepSpeed's 16-bit stage 0 steps on zero gradients at start: the step in the file is the one to go on with."""
    steps = {name: max(s["step"] for s in saved[1][name]["states"].values()) for name in ("fp32", "bf16")}
    assert steps == {"fp32": 3, "bf16": 4}


# --- an optimizer's state without names -----------------------------------------------------------------------------


def test_names_that_torch_kept_come_first(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """An order that no rule gives: by name, backwards."""
    tag = shutil.copytree(saved[0] / "fp32" / "global_step3", tmp_path / "tag")
    truth = saved[1]["fp32"]

    def shuffle(content: Any) -> None:
        for group, names in zip(content["optimizer"]["param_groups"], truth["groups"], strict=True):
            order = sorted(range(len(names)), key=lambda i: names[i], reverse=True)
            group["params"] = [group["params"][i] for i in order]
            group["param_names"] = [names[i] for i in order]

    edit(tag / "mp_rank_00_model_states.pt", shuffle)
    source = open_source(tag)
    for name, states in truth["states"].items():
        assert equal(source.read(name, "exp_avg", 0, len(states["exp_avg"])), states["exp_avg"])
    assert [sorted(g["names"]) for g in source.groups] == [sorted(names) for names in truth["groups"]]
    assert "param_names" not in source.groups[0]


@pytest.mark.parametrize("name", ["bf16", "fused-bf16"])
def test_master_weights_tell_whose_they_are(saved: tuple[Path, dict[str, Any]], tmp_path: Path, name: str) -> None:
    """16-bit groups in an order that no rule gives."""
    tag = shutil.copytree(saved[0] / name / "global_step3", tmp_path / "tag")

    def reverse(content: Any) -> None:
        optimizer = content["optimizer"]
        inner = optimizer["optimizer_state_dict"]
        inner["param_groups"].reverse()
        if name == "bf16":
            optimizer["fp32_groups"] = [group[::-1] for group in optimizer["fp32_groups"][::-1]]
            for group in inner["param_groups"]:
                group["params"].reverse()
        else:
            optimizer["fp32_groups_flat"].reverse()

    edit(tag / "mp_rank_00_model_states.pt", reverse)
    source = open_source(tag)
    for tensor, states in saved[1][name]["states"].items():
        for state in STATES:
            assert equal(source.read(tensor, state, 0, len(states[state])), states[state]), (tensor, state)


def other_groups(content: Any) -> None:
    first, second = content["optimizer"]["param_groups"]
    second["params"].append(first["params"].pop())


def other_shape(content: Any) -> None:
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)


def other_master(content: Any) -> None:
    content["optimizer"]["fp32_groups"][0][2] = torch.randn_like(content["optimizer"]["fp32_groups"][0][2])


def short_flat(content: Any) -> None:
    content["optimizer"]["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(7)


def adafactor(content: Any) -> None:
    for state in content["optimizer"]["state"].values():
        state["exp_avg_sq_row"] = state.pop("exp_avg_sq").sum(-1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp32", other_groups, "keeps no names with the optimizer's state, and its 2 groups of .* none|not just one"),
        ("fp32", other_shape, "keeps no names with the optimizer's state"),
        ("bf16", other_master, "no parameter of the model has the master weights of optimizer group 0"),
        ("fused-bf16", short_flat, "do not fit each other.*exp_avg"),
    ],
)
def test_contradictions_are_refused(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    tag = shutil.copytree(saved[0] / name / "global_step3", tmp_path / "tag")
    edit(tag / "mp_rank_00_model_states.pt", change)
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tag)


def test_unknown_state_is_named_and_weights_stay_readable(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tag = shutil.copytree(saved[0] / "fp32" / "global_step3", tmp_path / "tag")
    edit(tag / "mp_rank_00_model_states.pt", adafactor)
    source = open_source(tag)
    assert source.states == ("fp32",) and source.other_states == ("exp_avg", "exp_avg_sq_row")


def test_a_checkpoint_without_an_optimizer_holds_weights(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tag = shutil.copytree(saved[0] / "bf16" / "global_step3", tmp_path / "tag")
    edit(tag / "mp_rank_00_model_states.pt", lambda content: content.update(optimizer=None))
    source = open_source(tag)
    assert source.states == ("fp32",) and not source.groups
    for name, weight in saved[1]["bf16"]["weights"].items():
        assert equal(source.read(name, "fp32", 0, len(weight)), weight)


# --- writing --------------------------------------------------------------------------------------------------------

WRITTEN = [
    Case("w-fp32", 0, buffer=True),
    Case("w-bf16", 0, "bf16", layout="layers"),
    Case("w-fp16", 0, "fp16"),
    Case("fused-w-bf16", 0, "bf16"),
    Case("fused-w-fp16", 0, "fp16", layout="layers", frozen=("layer.0.",)),
    Case("w-frozen", 0, frozen=("layer.0.", "LayerNorm.bias")),
]
SCALER = {"cur_scale": 2048.0, "cur_iter": 11, "last_overflow_iter": 4, "scale_factor": 2.0, "scale_window": 500}


def frozen_spec(spec: TargetSpec, parts: tuple[str, ...]) -> TargetSpec:
    """The spec with the parameters whose names hold one of the parts frozen."""
    frozen = tuple(name for name in spec.shapes if any(part in name for part in parts))
    groups = (replace(g, names=tuple(n for n in g.names if n not in frozen)) for g in spec.groups)
    return replace(spec, frozen=frozen, groups=tuple(g for g in groups if g.names))


def spec_of(case: Case) -> TargetSpec:
    over: dict[str, Any] = {"fused": case.name.startswith("fused"), "clip_grad": 0.5}
    if case.precision == "fp16":
        over["loss_scaler"] = {**SCALER, "dynamic": True}
    if case.buffer:
        over["buffers"] = {"bert.tally": torch.tensor([5.0, 6.0, 7.0])}
    return frozen_spec(make_spec(case.precision, case.layout, **over), case.frozen)


def resume_on_rank(folder: str) -> None:
    """Unmodified engines load what was written, hold it bit for bit, and train on."""
    for case in WRITTEN:
        spec, engine = spec_of(case), like(case)
        found, client = engine.load_checkpoint(f"{folder}/{case.name}")
        assert found is not None and client["note"] == {"epoch": 3}
        wanted = make_tensors(spec)
        live = live_states(engine, case)
        assert live.keys() == wanted.keys() - set(spec.frozen)
        step = {name: group.step for group in spec.groups for name in group.names}
        for name, states in live.items():
            assert states.pop("step") == step[name], (case, name)
            assert all(torch.equal(states[s], wanted[name][s]) for s in STATES), (case, name)
        for name, weight in engine.module.named_parameters():
            assert torch.equal(weight, wanted[name]["fp32"].to(weight.dtype)), (case, name)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        assert [(g["lr"], g["weight_decay"]) for g in inner.param_groups] == [
            (LR, DECAY if g.decay else 0.0) for g in spec.groups
        ]
        assert engine.global_steps == 7 and engine.lr_scheduler.state_dict() == spec.lr_scheduler
        if case.precision == "fp16":
            scale = engine.optimizer.loss_scale_config
            assert {key: getattr(scale, key) for key in SCALER} == SCALER
        if spec.fused:
            assert engine.optimizer.clip_grad == 0.5  # DeepSpeed takes it from the file
        if case.buffer:
            assert torch.equal(dict(engine.module.named_buffers())["bert.tally"], spec.buffers["bert.tally"])
        before = engine.skipped_steps
        train(engine, case, 2)
        assert engine.global_steps == 9 and (case.precision == "fp16" or engine.skipped_steps == before)
        release(engine)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_written_resumes_in_unmodified_engines(tmp_path: Path, world: int) -> None:
    for case in WRITTEN:
        spec = spec_of(case)
        target = tmp_path / case.name
        write_checkpoint(target, spec, reader(make_tensors(spec)), format="zero", stage=0, manifest_growth=None)
        source = open_source(target)
        assert (source.stage, source.world_size, source.fused) == (0, 1, spec.fused)
        for name, states in make_tensors(spec).items():
            kept = states if name not in spec.frozen else {"fp32": states["fp32"].to(spec.dtype)}
            assert all(torch.equal(source.read(name, s, 0, len(t)), t) for s, t in kept.items())
            assert source.tensors[name].trainable == (name not in spec.frozen)
        recorded = json.loads((source.folder / "bert2bert.json").read_text())["tensors"]
        assert all(set(recorded[n]["digest"]) == ({"fp32"} if n in spec.frozen else set(STATES)) for n in spec.shapes)
    run_ranks(resume_on_rank, world, str(tmp_path), timeout=120)


def next_loss_on_rank(folder: str, first: Case, then: Case) -> list[float]:
    """Train and save; or load what was rewritten, and take one more step."""
    engine = like(then)
    engine.load_checkpoint(f"{folder}/{then.name}")
    losses = train(engine, then, 2, start=first.steps)
    release(engine)
    return losses


def test_there_and_back_the_next_losses_are_the_same(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Stage 0 -> 2 -> 0 in fp32, rewritten each time: all engines go on with the same losses."""
    shutil.copytree(saved[0] / "fp32", tmp_path / "fp32")
    for name, stage, origin in (("to2", 2, "fp32"), ("back", 0, "to2")):
        source = open_source(tmp_path / origin)
        rewrite(source, tmp_path / name, stage)
    cases = [BY_NAME["fp32"], Case("to2", 2), Case("back", 0)]
    losses = [run_ranks(next_loss_on_rank, 2, str(tmp_path), CASES[0], case)[0] for case in cases]
    assert losses[0] == losses[2] and gap(losses[1], losses[0]) <= ROUNDING


def rewrite(source: Any, target: Path, stage: int) -> None:
    spec = make_spec()
    groups = tuple(replace(g, step=source.step(g.names[0]), hyper={k: v for k, v in live.items() if k != "names"})
                   for g, live in zip(spec.groups, source.groups, strict=True))  # fmt: skip
    spec = replace(
        spec,
        groups=groups,
        counters=source.counters,
        lr_scheduler=source.lr_scheduler,
        client_state=source.client_state,
    )
    write_checkpoint(target, spec, source.read, format="zero", stage=stage, world_size=2, manifest_growth=None)


def test_impossible_worlds_are_refused(tmp_path: Path) -> None:
    spec = make_spec()
    with pytest.raises(InvalidConfig, match="--world-size is 0"):
        write_checkpoint(
            tmp_path / "d", spec, reader(make_tensors(spec)), format="zero", stage=0, world_size=0, manifest_growth=None
        )
