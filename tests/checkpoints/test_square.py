"""The commuting square, bit for bit: consolidating what was grown shard by shard = growing what was consolidated.

Sources are real engines' checkpoints of every ZeRO stage at 1 to 4 ranks; each is grown to every stage at 1 to 4 ranks.
DeepSpeed's own `zero_to_fp32` consolidates both ends: the weights as it is, the moments by its own merge, given them in
place of the weights. (Stage 0 keeps whole tensors, which torch alone reads; ZeRO's sources are compared with the live
engine as well.) Three ranks make padding real; the model has a tensor of two elements, fewer than the ranks, and
nothing is divisible, so that tensors are cut by the partitions' borders.

Files are opened with weights_only=False, for the tests themselves made them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.algebra.realise import values
from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.target import Target
from bert2bert.checkpoints.zero.layout import zero12_layout
from bert2bert.commands.grow import target_spec
from bert2bert.growth.named import Named
from bert2bert.growth.opened import Growth, open_growth
from tests.checkpoints.engines import STATES, Case, hf_config, load_truth, save_cases
from tests.doors import reshard, write_checkpoint

Tensors = dict[str, dict[str, torch.Tensor]]
"""[state][name]"""
STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 3, 4)
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 11, "max_position_embeddings": 8}
LARGER = {**SIZES, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 17}
SOURCES = [(stage, world) for world in WORLDS for stage in STAGES]


def case(stage: int, world: int) -> Case:
    return Case(f"z{stage}w{world}", stage=stage, steps=2, sizes=SIZES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("square")
    for world in WORLDS:
        save_cases(folder, world, [case(stage, world) for stage in STAGES])
    for name, sizes in (("small", SIZES), ("large", LARGER)):
        (folder / f"{name}.json").write_text(json.dumps({"model_type": "bert", **hf_config(**sizes)}))
    return folder


def merged(folder: Path, stage: int) -> Tensors:
    """A native checkpoint as whole tensors, by DeepSpeed's tool (stage 0: by torch)."""
    from deepspeed.utils import zero_to_fp32 as tool

    if stage == 0:
        return whole(torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False))
    models = tool.parse_model_states(tool.get_model_state_files(str(folder)))
    files = [torch.load(f, weights_only=False)["optimizer_state_dict"] for f in tool.get_optim_files(str(folder))]
    found: Tensors = {}
    for state in STATES:
        if stage == 3:
            flats = [flat(rank, state, "fp32_flat_groups", "optimizer_state_dict") for rank in files]
            lazy = tool._get_fp32_state_dict_from_zero3_checkpoint(len(files), flats, models, False)
        else:
            flats = [flat(rank, state, "single_partition_of_fp32_groups", "base_optimizer_state") for rank in files]
            gaps = files[0]["param_alignment_paddings"]
            lazy = tool._get_fp32_state_dict_from_zero2_checkpoint(len(files), flats, models, False, gaps)
        found[state] = {name: tensor.clone() for name, tensor in tool.to_torch_tensor(lazy).items()}
    return found


def flat(rank: dict[str, Any], state: str, masters: str, inner: str) -> list[torch.Tensor]:
    held = rank[inner]["state"]
    return list(rank[masters]) if state == "fp32" else [held[i][state] for i in sorted(held)]


def whole(content: dict[str, Any]) -> Tensors:
    weights, kept = content["module"], content["optimizer"]["state"]
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    shapes = {name: weight.shape for name, weight in weights.items() if name not in tied}
    names = [n for group in param_groups(by_name(shapes), "decay") for n in group.names]
    found = {state: {name: kept[i][state] for i, name in enumerate(names)} for state in STATES[1:]}
    return {"fp32": {name: weights[name] for name in names}, **found}


def grown(growth: Growth, source: Tensors) -> Tensors:
    """The plan on whole tensors."""

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        return source[state][name][start:stop]

    rows, plan = values(growth.plan, [read]), growth.plan.tensors
    return {state: {name: rows(name, state, 0, t.shape[0]) for name, t in plan.items()} for state in STATES}


def same(found: Tensors, wanted: Tensors) -> list[str]:
    """Where a bit differs."""
    return [
        f"{state} of {name}"
        for state in STATES
        for name, tensor in wanted[state].items()
        if found[state][name].shape != tensor.shape
        or not torch.equal(found[state][name].view(torch.int32), tensor.view(torch.int32))
    ]


def test_the_sizes_are_awkward(home: Path) -> None:
    """Else the square would be easy."""
    source = open_source(home / "z2w3")
    assert min(meta.numel for meta in source.tensors.values()) == 2 < min(WORLDS[2:])
    for world in WORLDS[1:]:
        groups = [[source.tensors[name].numel for name in group["names"]] for group in source.groups]
        layouts = [zero12_layout(numels, world) for numels in groups]
        assert any(piece.start for layout in layouts for pieces in layout.pieces for piece in pieces)
        assert any(any(layout.paddings) for layout in layouts) or world == 2
        assert any(meta.numel % world for meta in source.tensors.values())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage,world", SOURCES, ids=lambda x: str(x))
def test_growing_and_consolidating_commute(home: Path, tmp_path: Path, stage: int, world: int) -> None:
    source = home / case(stage, world).name
    before = merged(open_source(source).folder, stage)
    if stage:
        live = load_truth(home, case(stage, world))["tensors"]
        assert not same(before, {state: {name: live[name][state] for name in live} for state in STATES})
    growth = open_growth(source, home / "large.json", source_config=home / "small.json", width="fpi", seed=4)
    wanted = grown(growth, before)
    spec = target_spec(Named.of(growth, "zero"), Target("zero", 0))
    rows = values(growth.plan, growth.reads)
    assert same(wanted, {**wanted, "exp_avg": wanted["exp_avg_sq"]})  # the comparison can fail
    for out_stage in STAGES:
        for out_world in WORLDS:
            target = tmp_path / f"{out_stage}.{out_world}"
            folder = write_checkpoint(
                target, spec, rows, format="zero", stage=out_stage, world_size=out_world, manifest_growth=None
            )
            assert not same(merged(folder, out_stage), wanted), (out_stage, out_world)


@pytest.mark.parametrize("stage,world", [(2, 3), (3, 4), (0, 2)])
def test_through_every_form_and_back(home: Path, tmp_path: Path, stage: int, world: int) -> None:
    """As DeepSpeed's tool sees both ends, no bit differs after universal and native forms in a row."""
    last = home / case(stage, world).name
    names, tensors = open_source(last).tensors, merged(open_source(last).folder, stage)
    wanted = {state: {name: tensors[state][name] for name in names} for state in STATES}  # tied ones once
    way: list[dict[str, Any]] = [{"format": "zero", "stage": s, "world_size": w} for s, w in ((3, 3), (1, 4), (0, 1))]
    for i, how in enumerate([*way, {"format": "universal"}, *reversed(way), {**way[0], "stage": 2}]):
        reshard(last, tmp_path / str(i), say=lambda _: None, **how)
        last = tmp_path / str(i)
        if how["format"] == "zero":
            assert not same(merged(open_source(last).folder, how["stage"]), wanted), how
    reshard(last, tmp_path / "hub", format="hub", say=lambda _: None)
    hub = open_source(tmp_path / "hub")
    assert all(
        torch.equal(hub.read(n, "fp32", 0, t.shape[0]), t) for n, t in wanted["fp32"].items() if n in hub.tensors
    )
