"""Checkpoints of scripts that group as transformers' Trainer does, read, grown and loaded by real engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert.algebra.realise import values
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import STATES
from bert2bert.errors import InvalidCheckpoint
from bert2bert.growth.opened import open_growth
from bert2bert.growth.source_model import open_model
from bert2bert.tables import table_for
from tests import tiny
from tests.checkpoints.engines import Case, build, release, train, truth
from tests.checkpoints.test_readers_zero import edit, equal
from tests.checkpoints.test_stage0 import live_states
from tests.distributed import run_ranks
from tests.doors import grow, reshard

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "t5", "modernbert", "mixtral")
STEPS = 2


def source_case(name: str, **more: Any) -> Case:
    return Case(name, 0, layout="trainer", steps=STEPS, hf=tiny.config_of(name), **more)


def save_on_rank(folder: str) -> None:
    import deepspeed.comm as dist

    for name in FAMILIES:
        case = source_case(name)
        engine = build(case)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{name}")
        if dist.get_rank() == 0:
            found = {"states": live_states(engine, case), "groups": engine.group_names}
            torch.save(found, f"{folder}/{name}.truth.pt")
            Path(f"{folder}/{name}/config.json").write_text(json.dumps(case.hf))
        release(engine)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    for name in FAMILIES:
        getattr(transformers, tiny.VARIANTS[name].cls)  # imported before the fork, not by every rank
    run_ranks(save_on_rank, 1, str(folder), timeout=200)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_without_names_is_read_by_the_trainers_rule(home: Path, name: str) -> None:
    found, source = torch.load(home / f"{name}.truth.pt"), open_source(home / name)
    assert [tuple(group["names"]) for group in source.groups] == found["groups"]
    assert [group["weight_decay"] for group in source.groups] == [0.1, 0.0]
    for tensor, states in found["states"].items():
        assert source.step(tensor) == STEPS
        assert all(equal(source.read(tensor, s, 0, len(states[s])), states[s]) for s in STATES), tensor


def other_rule(content: Any, decays: Any) -> None:
    """The same optimizer as if its script had grouped by another rule."""
    names = [n for g in content["optimizer"]["param_groups"] for n in g.pop("their_names")]
    of = dict(zip(names, [i for g in content["optimizer"]["param_groups"] for i in g["params"]], strict=True))
    order = [n for n in content["module"] if n in of]
    first, second = content["optimizer"]["param_groups"]
    first["params"] = [of[n] for n in order if decays(n, content["module"][n])]
    second["params"] = [of[n] for n in order if not decays(n, content["module"][n])]


@pytest.mark.parametrize(
    ("name", "decays", "warned"),
    [
        ("t5", lambda name, tensor: tensor.dim() > 1, True),
        ("gpt2", lambda name, tensor: "bias" not in name, True),
        ("qwen2", lambda name, tensor: "bias" not in name, True),
        ("t5", lambda name, tensor: not any(part in name for part in ("bias", "layer_norm.weight")), True),
        ("gpt2", lambda name, tensor: "c_attn" not in name, False),
    ],
)
def test_other_rules_of_scripts(home: Path, tmp_path: Path, name: str, decays: Any, warned: bool) -> None:
    """By the number of dimensions, and by parts of names; what is not a rule is refused."""
    shutil.copytree(home / name, tmp_path / "run")
    found = torch.load(home / f"{name}.truth.pt")
    tag = (tmp_path / "run" / "latest").read_text().strip()

    def change(content: Any) -> None:
        for group, names in zip(content["optimizer"]["param_groups"], found["groups"], strict=True):
            group["their_names"] = names
        other_rule(content, decays)

    edit(tmp_path / "run" / tag / "mp_rank_00_model_states.pt", change)
    if not warned:
        with pytest.raises(InvalidCheckpoint, match="by the rule of transformers' Trainer, by the number of dim"):
            open_source(tmp_path / "run")
        return
    source = open_source(tmp_path / "run")
    for tensor, states in found["states"].items():
        assert all(equal(source.read(tensor, s, 0, len(states[s])), states[s]) for s in STATES), tensor


def larger(config: dict[str, Any]) -> dict[str, Any]:
    table = table_for(config)
    sizes = table.axis_sizes(config)
    deeper = {axis: sizes[axis] + 1 for axis in table.sizes.depth}
    return table.resize(config, {"embed": 2 * sizes["embed"], **deeper}) | {"layer_types": None}


def load_on_rank(loads: list[tuple[str, str, Case]]) -> None:
    for folder, wanted, case in loads:
        engine = build(case)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        whole, found = torch.load(wanted), truth(engine, case)
        assert found["tensors"].keys() == whole["fp32"].keys()
        for name, states in found["tensors"].items():
            for state in STATES:
                assert torch.equal(states[state], whole[state][name]), (folder, name, state)
        for name, weight in engine.module.named_parameters():
            if case.stage < 3:
                assert torch.equal(weight, whole["fp32"][name]), (folder, name)
        assert [group["weight_decay"] for group in found["groups"]] == [0.1, 0.0], folder
        train(engine, case, 1, start=STEPS)
        release(engine)


@pytest.mark.parametrize("world", [1, 2])
def test_unmodified_scripts_load_what_was_grown(home: Path, tmp_path: Path, world: int) -> None:
    """Groups kept, for they are found to be the Trainer's, and made of the source's one group."""
    loads, kept = [], list[str]()
    for i, name in enumerate(FAMILIES):
        config, stage = larger(tiny.config_of(name)), 1 + (i + world) % 3
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        growth = open_growth(home / name, tmp_path / f"{name}.json")
        rows = values(growth.plan, growth.reads)
        whole = {s: {n: rows(n, s, 0, t.shape[0]) for n, t in growth.plan.tensors.items()} for s in STATES}
        torch.save(whole, tmp_path / f"{name}.pt")
        native = {"format": "zero", "stage": stage, "world_size": world, "say": lambda _: None}
        case = Case(name, stage, layout="trainer", steps=STEPS, hf=open_model(home / name).config | config)
        target = tmp_path / f"{name}-kept"
        grow(home / name, target, tmp_path / f"{name}.json", measure=False, **native | {"say": kept.append})
        assert json.loads(next(target.glob("*/bert2bert.json")).read_text())["group_layout"] == "decay"
        loads.append((str(target), str(tmp_path / f"{name}.pt"), case))
        if i % 2 == world % 2:  # the other ways for half of them: what differs is where the groups come from
            continue
        one, again = tmp_path / f"{name}-one", tmp_path / f"{name}-decay"
        words: list[str] = []
        grow(
            home / name, one, tmp_path / f"{name}.json", measure=False,
            **native | {"groups": "single", "say": words.append},
        )  # fmt: skip
        assert any("--groups: weight_decay changes for" in text and "0.0 -> 0.1" in text for text in words)
        assert [g["weight_decay"] for g in open_source(one).groups] == [0.1]
        words.clear()
        reshard(one, again, **native | {"groups": "decay", "say": words.append})
        assert "--groups: weight_decay changes for" in words[0] and "0.1 -> 0.0" in words[0]
        assert [g["weight_decay"] for g in open_source(again).groups] == [0.1, 0.0]
        loads.append((str(again), str(tmp_path / f"{name}.pt"), case))
    assert kept and not any("--groups" in text for text in kept)
    run_ranks(load_on_rank, world, loads, timeout=200)


def test_a_folder_without_groups_gets_a_pair_a_layer_or_the_trainers(tmp_path: Path) -> None:
    config = tiny.config_of("llama")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "goal.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    grow(tmp_path / "small", tmp_path / "big", tmp_path / "goal.json", format="zero", stage=2, world_size=1,
         groups="layers", measure=False, say=lambda _: None)  # fmt: skip
    groups = open_source(tmp_path / "big").groups
    assert [len(g["names"]) for g in groups] == [1, *(7, 2) * 5, 1, 1]
    assert [bool(g["weight_decay"]) for g in groups] == [True, *(True, False) * 5, True, False]
    reshard(
        tmp_path / "big", tmp_path / "again", format="zero", stage=2, world_size=1, groups="decay", say=lambda _: None
    )
    again = open_source(tmp_path / "again")
    assert [(len(g["names"]), bool(g["weight_decay"])) for g in again.groups] == [(37, True), (11, False)]
