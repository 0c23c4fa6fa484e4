"""What a state dict holds beside parameters: grown, written again, and loaded strictly by real, unmodified engines."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import Source
from bert2bert.errors import UnsupportedGrowth
from bert2bert.tables import table_for
from tests import tiny
from tests.checkpoints.engines import Case, build, hf_config, hf_model, release, save_cases, train
from tests.checkpoints.test_readers_zero import edit
from tests.distributed import run_ranks
from tests.doors import grow, reshard

FAMILIES = ["bert", "roberta", "gpt2", "llama-tied", "mistral", "qwen2", "qwen3", "t5", "modernbert", "mixtral"]
FAMILIES += ["qwen2_moe", "qwen3_moe"]
QUIET: dict[str, Any] = {"say": lambda _: None}


def stored(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The buffers of transformers' own model of a config: those that older versions stored."""
    return dict(hf_model(config).named_buffers())


def larger(config: dict[str, Any]) -> dict[str, Any]:
    """Twice as wide with heads of the same size, one layer more, and longer where positions are a table."""
    table, sizes = table_for(config), table_for(config).axis_sizes(config)
    changes = {axis: 2 * sizes[axis] for axis in ("embed", "heads", "kv", "ffn", "shared") if axis in table.sizes.axes}
    changes |= {axis: sizes[axis] + 1 for axis in table.sizes.depth}
    changes |= {"pos": sizes["pos"] + 5} if "pos" in table.sizes.axes else {}
    return table.resize(config, changes) | ({"layer_types": None} if "layer_types" in config else {})


def resume(loads: list[tuple[str, Case]]) -> None:
    """On every rank: a strict load, after which the buffers are those of transformers' own model."""
    for folder, case in loads:
        engine = build(case)
        for buffer in engine.module.buffers():
            buffer.fill_(1)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None, folder
        wanted = stored(case.hf)
        found = dict(engine.module.named_buffers())
        assert found.keys() == wanted.keys()
        for name in found if "checkpoint" not in case.config else ():  # DeepSpeed's universal load restores none
            assert torch.equal(found[name], wanted[name].to(found[name].dtype)), (folder, name)
        train(engine, case, 1)
        release(engine)


def test_buffers_that_transformers_once_stored_grow_with_every_family(tmp_path: Path) -> None:
    """A width, depth and length growth into native shards or a universal checkpoint; frozen parts, tied heads, too."""
    cases = [
        Case(name, 1 + i % 3, ("fp32", "bf16")[i % 2], layout="single", steps=1, hf=tiny.config_of(name),
             stored_buffers=True, frozen=("norm", "ln_") if i % 2 else ())
        for i, name in enumerate(FAMILIES)
    ]  # fmt: skip
    save_cases(tmp_path, 1, cases)
    loads = []
    for i, case in enumerate(cases):
        source, goal = tmp_path / case.name, larger(case.hf)
        held = open_source(source)
        assert held.buffers.keys() == stored(case.hf).keys(), case.name
        assert held.buffers or case.hf["model_type"] in ("gpt2", "t5")
        (source / "config.json").write_text(json.dumps(case.hf))
        (tmp_path / "goal.json").write_text(json.dumps(goal))
        how: dict[str, Any] = {"width": "fpi", "depth": "stack", "measure": False, "lossy": True, **QUIET}
        how |= {"positions": "tile"} if "pos" in table_for(goal).sizes.axes else {}
        stage = 1 + (i + 1) % 3
        universal = i % 4 > 1  # whatever the precision and what is frozen
        form: dict[str, Any] = {} if universal else {"format": "zero", "stage": stage, "world_size": 1}
        grow(source, tmp_path / f"{case.name}.g", tmp_path / "goal.json", **how, **form)
        config = {"checkpoint": {"load_universal": True}} if universal else {}
        loads.append((f"{tmp_path}/{case.name}.g", replace(case, stage=stage, hf=goal, config=config)))
        reshard(source, tmp_path / f"{case.name}.r", format="zero", stage=stage, world_size=1, **QUIET)
        loads.append((f"{tmp_path}/{case.name}.r", replace(case, stage=stage)))
    run_ranks(resume, 1, loads)


# ------------------------------------------------------------------------------------------------ buffers of one's own

LAYERS = "bert.encoder.layer.{}.attention.self."
CONFIG = {"model_type": "bert", "architectures": ["BertForPreTraining"], **hf_config()}
DEEPER = {**CONFIG, "num_hidden_layers": 4}
WIDER = {**CONFIG, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 88}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    save_cases(root, 1, [Case("run", 2, steps=1)])
    (root / "run" / "config.json").write_text(json.dumps(CONFIG))
    return root / "run"


def with_buffers(run: Path, to: Path, buffers: dict[str, Any], extras: dict[str, Any] | None = None) -> Path:
    """A copy of the run whose model has these as well."""
    shutil.copytree(run, to)

    def add(content: Any) -> None:
        content["module"] |= {**buffers, **(extras or {})}
        content["buffer_names"] += list(buffers)

    edit(to / "global_step1" / "mp_rank_00_model_states.pt", add)
    return to


def grown(source: Path, goal: dict[str, Any], **how: Any) -> Source:
    (source.parent / "goal.json").write_text(json.dumps(goal))
    target = source.parent / "target"
    grow(source, target, source.parent / "goal.json", measure=False, lossy=True, **{**QUIET, **how})
    return open_source(target)


def test_a_layers_own_buffers_go_with_it(run: Path, tmp_path: Path) -> None:
    own = {LAYERS.format(i) + "seen": torch.tensor([3 * i, 4]) for i in range(2)}
    extra = {LAYERS.format(i) + "_extra_state": {"recipe": "delayed", "history": torch.ones(3) * i} for i in range(2)}
    found = grown(with_buffers(run, tmp_path / "run", own, extra), DEEPER, depth="stack")
    assert {name: value.tolist() for name, value in found.buffers.items()} == {
        LAYERS.format(j) + "seen": [3 * (j % 2), 4] for j in range(4)
    }
    assert {name: value["history"].tolist() for name, value in found.extras.items()} == {
        LAYERS.format(j) + "_extra_state": [j % 2] * 3 for j in range(4)
    }


def test_a_buffer_that_some_layers_have_goes_with_those(run: Path, tmp_path: Path) -> None:
    """Nothing says whether a layer made of one that has it and of one that has not has it, or one made of none."""
    source = with_buffers(run, tmp_path / "run", {LAYERS.format(1) + "seen": torch.tensor([7])})
    found = grown(source, DEEPER, depth="stack")
    assert found.buffers.keys() == {LAYERS.format(i) + "seen" for i in (1, 3)}
    shutil.rmtree(tmp_path / "target")
    with pytest.raises(UnsupportedGrowth, match=r"layer\.1\.attention\.self\.seen'.*layer \d is not made of one layer"):
        grown(source, WIDER, width="aki")


def test_buffers_with_the_names_of_other_families(tmp_path: Path) -> None:
    """Frequencies and positions in models without rotary or learned ones."""
    own = {
        "rotary.inv_freq": torch.ones(5),
        "position_ids": torch.arange(3)[None],
        "other.inv_freq": torch.ones(2) * 1j,
    }
    for family in ("gpt2", "t5"):
        config = tiny.config_of(family)
        save_cases(tmp_path, 1, [Case(family, 2, steps=1, hf=config)])
        source = with_buffers(tmp_path / family, tmp_path / f"{family}.own" / "run", own)
        (source / "config.json").write_text(json.dumps(config))
        goal = table_for(config).resize(config, dict.fromkeys(table_for(config).sizes.depth, 6))
        assert grown(source, goal, depth="stack").buffers.keys() == own.keys()


@pytest.mark.parametrize("alike", [True, False])
def test_a_layer_made_of_several_has_their_buffers_where_they_are_alike(run: Path, tmp_path: Path, alike: bool) -> None:
    own = {LAYERS.format(i) + "seen": torch.tensor([0 if alike else i]) for i in range(2)}
    source = with_buffers(run, tmp_path / "run", own)
    if alike:
        assert len(grown(source, WIDER, width="aki").buffers) == 2
    else:
        with pytest.raises(UnsupportedGrowth, match=r"layer\.0\.attention\.self\.seen'.*not made of one layer"):
            grown(source, WIDER, width="aki")


@pytest.mark.parametrize(("name", "value"), [
    ("bert.mean", torch.zeros(32)),
    ("bert.tables", torch.zeros(3, 17, 44)),
    ("bert.embeddings.position_ids", torch.arange(17)[None].flip(1)),
    (LAYERS.format(1) + "mean", torch.zeros(32)),
    ("bert._extra_state", {"amax": torch.zeros(32)}),
])  # fmt: skip
def test_what_would_have_to_grow_is_refused_by_name_before_anything_is_written(
    run: Path, tmp_path: Path, name: str, value: Any
) -> None:
    both = ({name: value}, {}) if isinstance(value, torch.Tensor) else ({}, {name: value})
    source = with_buffers(run, tmp_path / "run", *both)
    goal = {**WIDER, "max_position_embeddings": 21}
    with pytest.raises(UnsupportedGrowth, match=re.escape(f"holds '{name}', which is not a parameter")):
        grown(source, goal, positions="tile")
    assert not (tmp_path / "target").exists()
    messages: list[str] = []
    grown(source, goal, positions="tile", format="hub", say=messages.append)
    assert f"left out, for models of transformers store no buffers: {name}" in messages[0]


def test_old_masks_and_frequencies_by_layer(tmp_path: Path) -> None:
    """As transformers 4.0 to 4.30 stored them: a scalar beside every mask, frequencies in every layer."""
    gpt2, llama = tiny.config_of("gpt2"), tiny.config_of("llama")
    save_cases(tmp_path, 1, [Case("gpt2", 2, steps=1, hf=gpt2), Case("llama", 2, steps=1, hf=llama)])
    names = {"gpt2": "transformer.h.{}.attn.{}", "llama": "model.layers.{}.self_attn.rotary_emb.{}"}
    value = stored(llama)["model.rotary_emb.inv_freq"]
    old = {
        "gpt2": {"bias": torch.ones(1, 1, 10, 10).tril().to(torch.uint8), "masked_bias": torch.tensor(-1e4)},
        "llama": {"inv_freq": value},
    }
    for family, config in (("gpt2", gpt2), ("llama", llama)):
        own = {names[family].format(i, kind): t for i in range(3) for kind, t in old[family].items()}
        source = with_buffers(tmp_path / family, tmp_path / f"{family}.old" / "run", own)
        (source / "config.json").write_text(json.dumps(config))
        found = grown(source, larger(config), **({"positions": "tile"} if family == "gpt2" else {}))
        assert found.buffers.keys() == {names[family].format(i, kind) for i in range(4) for kind in old[family]}
        for i in range(4):
            if family == "gpt2":
                mask = found.buffers[names[family].format(i, "bias")]
                assert mask.dtype == torch.uint8 and torch.equal(mask, torch.ones(1, 1, 15, 15).tril().to(torch.uint8))
                assert found.buffers[names[family].format(i, "masked_bias")] == -1e4
            else:
                assert torch.equal(found.buffers[names[family].format(i, "inv_freq")], value)


# -------------------------------------------------------------------------- tensors that DeepSpeed's file does not list


class Hooked(torch.nn.Module):
    """Puts a tensor of its own into the state dict and takes it out again, as quantised layers do."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.absmax = torch.full((3,), value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "absmax"] = self.absmax

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.absmax = state_dict[prefix + "absmax"].clone()


def unlisted(case: Case, value: float) -> Any:
    """An engine whose model has one buffer under two names, of float32 and of float64, and perhaps a tensor more."""
    engine = build(case)
    table, steps = torch.full((4,), value), torch.full((2,), value, dtype=torch.float64)
    for module in (engine.module.bert.encoder, engine.module.bert.pooler):
        module.register_buffer("table", table)
        module.register_buffer("steps", steps)
    if "hooked" in case.name:
        engine.module.hooked = Hooked(value)
    return engine


def save_unlisted(folder: str, cases: list[Case]) -> None:
    for case in cases:
        engine = unlisted(case, 2.5)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{case.name}")
        release(engine)


def load_unlisted(loads: list[tuple[str, Case]]) -> None:
    for folder, case in loads:
        engine = unlisted(case, 1.0)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        found = dict(engine.module.named_buffers(remove_duplicate=False))
        found |= {"hooked": engine.module.hooked.absmax} if "hooked" in case.name else {}
        held = {n: t for n, t in found.items() if n.endswith(("table", "steps", "hooked"))}
        assert len(held) == 4 + ("hooked" in case.name)
        assert all((t == 2.5).all() and (t.dtype == torch.float64) == n.endswith("steps") for n, t in held.items())
        release(engine)


def test_buffers_of_two_names_and_tensors_of_modules_own_are_no_frozen_parameters(tmp_path: Path) -> None:
    """Stages 0 and 1 list neither them nor frozen parameters; every stage is loaded strictly, written from any."""
    cases = [Case("one", 1, "bf16", frozen=("layer.0.",), steps=1), Case("two-hooked", 2, steps=1)]
    cases.append(Case("three-hooked", 3, frozen=("layer.0.",), steps=1))
    run_ranks(save_unlisted, 1, str(tmp_path), cases)
    loads = []
    for case in cases:
        source = open_source(tmp_path / case.name)
        assert not any(part in name for name in source.tensors for part in ("table", "steps", "absmax"))
        for stage in (1, 2, 3):
            target = tmp_path / f"{case.name}.{stage}"
            reshard(tmp_path / case.name, target, format="zero", stage=stage, world_size=1, **QUIET)
            again = open_source(target)
            assert again.buffers.keys() == source.buffers.keys() and again.tensors.keys() == source.tensors.keys()
            loads.append((str(target), replace(case, stage=stage)))
    run_ranks(load_unlisted, 1, loads)
