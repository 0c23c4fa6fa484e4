"""Every operator on every family, from a ZeRO-2 checkpoint of a real engine: shards give what whole tensors give.

The engine trains each family of tests.tiny for two AdamW steps on two ranks. The whole tensors come from DeepSpeed
alone: weights from its zero_to_fp32, moments from its functions on the live engine. A growth that is read from the
shards in blocks of rows must equal the same growth of the whole tensors bit for bit, moments included; where an
operator is not defined for a family, it must say so. Some are also written out and resumed by real engines.

The product shows two facts that the laws and the readers' tests show apart, so the short suite takes each operator on
three families and each family with several operators; ``--full`` takes them all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert import growths
from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import values
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth.source_model import CheckpointModel, open_model
from bert2bert.operators.registry import OPERATORS
from tests import tiny
from tests.checkpoints.engines import STATES, Case, build, load_truth, release, save_cases, train, truth
from tests.checkpoints.growths import FAMILIES, GROWTHS, UNDEFINED, Growth
from tests.cover import families
from tests.distributed import run_ranks
from tests.doors import grow

STEPS = 2

# Written out and resumed by real engines, every family once.
RESUMED = {
    "bert": ("width-aki-embedx2", "zero"),
    "bert-untied": ("width-fpi-embedx2", "universal"),
    "roberta": ("breaker-noise-embedx2", "zero"),
    "gpt2": ("width-lemon-embedx1.5-kvx1-ffnx1-sharedx1", "zero"),
    "gpt2-untied": ("width-hyperclone-embedx2-qkx2-headsx1-kvx1", "zero"),
    "llama": ("width-gesmundo-embedx2", "zero"),
    "llama-mha": ("width-net2net-embedx2", "universal"),
    "llama-mqa": ("width-direct-embedx2", "zero"),
    "llama-tied": ("depth-insert_identity-depth+2", "zero"),
    "mistral": ("depth-upscale-layers+1", "universal"),
    "qwen2": ("width-hyperclone:noise=0.1-embedx2", "zero"),
    "qwen3": ("width-staged-embedx2", "zero"),
    "t5": ("width-tile-embedx2", "zero"),
    "t5-gated": ("depth-random-depth+2", "zero"),
    "t5-untied": ("width-aki-embedx2", "universal"),
    "modernbert": ("depth-interpolate-depth+2", "zero"),
    "modernbert-untied": ("width-random-embedx2", "universal"),
    "mixtral": ("width-fpi-embedx2", "zero"),
    "qwen3_moe": ("breaker-uneven-embedx2", "universal"),
    "qwen2_moe": ("depth-interleave:scale=step-depthx2", "zero"),
}
UNTRAINED = {"bert-untied": {"cls.predictions.bias"}}  # which no output reads


@dataclass(frozen=True)
class Trained:
    """A family's checkpoint opened as a model, and the whole tensors by state and name."""

    model: CheckpointModel
    whole: dict[str, dict[str, torch.Tensor]]

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return self.whole[state][name][start:stop]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder a family, saved in one launch."""
    root = tmp_path_factory.mktemp("families")
    cases = [Case(name, steps=STEPS, hf=tiny.config_of(name)) for name in FAMILIES]
    for case in cases:
        getattr(transformers, case.hf["architectures"][0])  # imported before the fork, not by every rank
    save_cases(root, 2, cases)
    for case in cases:
        (root / case.name / "config.json").write_text(json.dumps(case.hf))
    return root


@pytest.fixture(scope="module")
def trained(folder: Path) -> Callable[[str], Trained]:
    """A family's checkpoint, read by DeepSpeed and opened by us."""

    @cache
    def of(name: str) -> Trained:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        live = load_truth(folder, Case(name))["tensors"]
        merged = get_fp32_state_dict_from_zero_checkpoint(str(folder / name))
        weights = {n: tensor.detach() for n, tensor in merged.items()}
        assert all(torch.equal(weights[n], states["fp32"]) for n, states in live.items())
        whole = {"fp32": weights} | {state: {n: found[state] for n, found in live.items()} for state in STATES[1:]}
        assert {n for n, tensor in whole["exp_avg_sq"].items() if not tensor.any()} == UNTRAINED.get(name, set())
        return Trained(open_model(folder / name), whole)

    return of


def test_every_operator_has_a_target() -> None:
    """But for untie, which tests/train/test_phases.py takes through engines: most families are untied already."""
    registered = {(kind, name) for kind, operators in OPERATORS.items() for name in operators if kind != "embeddings"}
    assert {(g.kind, g.name) for g in GROWTHS} == registered
    assert len({*map(str, GROWTHS)}) == len(GROWTHS)


def chosen(growth: Growth) -> set[str]:
    """The families of the short suite: where the operator says that it is not defined, and three where it is."""
    refused = UNDEFINED.get(str(growth), set())
    defined = [name for name in FAMILIES if name not in refused]
    place, third = GROWTHS.index(growth), max(1, len(defined) // 3)
    return refused | {defined[(place + i * third) % len(defined)] for i in range(3)}


def products() -> list[Any]:
    pairs = [(growth, name) for growth in GROWTHS for name in FAMILIES]
    marks = {True: (), False: (pytest.mark.full,)}
    return [pytest.param(g, name, id=f"{g}-{name}", marks=marks[name in chosen(g)]) for g, name in pairs]


def test_the_short_suite_has_every_operator_and_family() -> None:
    shown = [(str(g), name) for g in GROWTHS for name in chosen(g) - UNDEFINED.get(str(g), set())]
    by_operator, by_family = (Counter(side) for side in zip(*shown, strict=True))
    assert by_operator.keys() == {*map(str, GROWTHS)} and min(by_operator.values()) >= 3
    assert by_family.keys() == {*FAMILIES} and min(by_family.values()) >= 4


def test_the_tables_of_this_file_name_what_exists() -> None:
    growths = {*map(str, GROWTHS)}
    assert UNDEFINED.keys() <= growths and set().union(*UNDEFINED.values()) <= set(FAMILIES)
    assert RESUMED.keys() == set(FAMILIES) and {growth for growth, _ in RESUMED.values()} <= growths


def same_rows(plan: GrowthPlan, source: Trained) -> set[str]:
    """Check every state of every tensor, from the shards in blocks of rows; the states that are not zero everywhere."""
    shards, tensors = (values(plan, [read] * plan.leaves) for read in (source.model.read, source.read))
    moved = set()
    for tensor, described in plan.tensors.items():
        rows = described.shape[0]
        for state in STATES:
            wanted = tensors(tensor, state, 0, rows)
            blocks = [shards(tensor, state, a, b) for a, b in pairwise([0, rows // 3, rows])]
            assert torch.equal(torch.cat(blocks), wanted), (tensor, state)
            moved |= {state} if wanted.any() else set()
    return moved


@pytest.mark.parametrize("growth,name", products())
def test_shards_give_what_whole_tensors_give(
    growth: Growth, name: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source, file = trained(name), tmp_path / "made.npy"
    if name in UNDEFINED.get(str(growth), ()):
        with pytest.raises(UnsupportedGrowth):
            growth.plan(source.model, file)
        return
    plan = growth.plan(source.model, file)
    moved = same_rows(plan, source)
    assert moved == ({"fp32"} if plan.moments == "reset" else {*STATES})


@pytest.mark.parametrize("name", families())
def test_plans_of_plans_read_shards_too(name: str, trained: Callable[[str], Trained]) -> None:
    source = trained(name)
    two = growths.then(growths.stack(2), growths.fpi(2, seed=3))
    mean = growths.interpolate(growths.fpi(2), growths.net2net(2, seed=5), 0.3)
    config = source.model.config
    assert same_rows(two.plan(config), source) == {*STATES}
    assert same_rows(mean.plan(config, config), source) == {*STATES}


@dataclass(frozen=True)
class Resume:
    """A grown run folder and the engine that must resume it; wanted: a file of what it must then hold; fresh: whether
    its optimizer starts again from zero."""

    folder: str
    wanted: str
    case: Case
    fresh: bool


def resume_all(resumes: list[Resume]) -> None:
    """Runs on every rank: load, compare every value, train one step."""
    for resume in resumes:
        engine = build(resume.case)
        path, _ = engine.load_checkpoint(resume.folder)
        assert path is not None
        wanted, found = torch.load(resume.wanted), truth(engine, resume.case)
        assert found["tensors"].keys() == wanted["fp32"].keys(), resume
        for name, states in found["tensors"].items():
            for state in STATES:
                assert torch.equal(states[state], wanted[state][name]), (resume, name, state)
        assert found["counters"]["global_steps"] == STEPS
        groups = engine.optimizer.optimizer.param_groups
        steps = [int(engine.optimizer.optimizer.state[group["params"][0]]["step"]) for group in groups]
        assert set(steps) == {0 if resume.fresh else STEPS}, resume
        (loss,) = train(engine, resume.case, 1, start=STEPS)
        assert math.isfinite(loss) and engine.global_steps == STEPS + 1
        assert not torch.equal(truth(engine, resume.case)["tensors"][name]["fp32"], wanted["fp32"][name])
        release(engine)


def test_real_engines_resume_what_was_grown(folder: Path, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    growths, resumes = {str(g): g for g in GROWTHS}, []
    for family, (text, form) in RESUMED.items():
        growth, source, target, file = growths[text], trained(family), tmp_path / family, tmp_path / f"{family}.npy"
        plan = growth.plan(source.model, file)
        (tmp_path / f"{family}.json").write_text(json.dumps(growth.target(source.model.config)))
        native = {"stage": 2, "world_size": 2} if form == "zero" else {}
        grow(
            folder / family,
            target,
            tmp_path / f"{family}.json",
            format=form,
            lossy=True,
            measure=False,
            say=lambda _: None,
            **native,
            **growth.options(file),
        )
        rows = values(plan, [source.read])
        wanted = {state: {n: rows(n, state, 0, t.shape[0]) for n, t in plan.tensors.items()} for state in STATES}
        torch.save(wanted, tmp_path / f"{family}.pt")
        more = {"checkpoint": {"load_universal": True}} if form == "universal" else {}
        config = open_model(target).config
        case = Case(family, hf=config, config=more, steps=STEPS)
        resumes.append(Resume(str(target), str(tmp_path / f"{family}.pt"), case, plan.moments == "reset"))
    run_ranks(resume_all, 2, resumes)
