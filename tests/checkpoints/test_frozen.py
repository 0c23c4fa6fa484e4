"""Frozen parameters: written beside those that train, without optimizer state, and restored by unmodified engines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bert2bert
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import STATES
from bert2bert.errors import InvalidCheckpoint, UnsupportedGrowth
from tests import tiny
from tests.checkpoints.engines import Case, build, hf_config, hf_model, load_truth, release, save_cases, train, truth
from tests.checkpoints.targets import make_tensors, reader
from tests.checkpoints.test_readers_zero import edit
from tests.checkpoints.test_stage0 import spec_of
from tests.distributed import run_ranks
from tests.doors import grow, reshard, write_checkpoint

FROZEN = ("layer.0.", "LayerNorm.bias")
CASES = [
    Case("z1", 1, "bf16", frozen=FROZEN, buffer=True),
    Case("z2", 2, frozen=FROZEN, layout="layers"),
    Case("z3", 3, "bf16", frozen=FROZEN, buffer=True),
]


def resume(folder: str) -> None:
    for case in CASES:
        spec, engine = spec_of(case), build(case)
        path, _ = engine.load_checkpoint(f"{folder}/{case.name}")
        assert path is not None
        wanted, found = make_tensors(spec), truth(engine, case)
        assert found["tensors"].keys() == wanted.keys()
        for name, states in found["tensors"].items():
            assert (states.keys() == {"fp32"}) == (name in spec.frozen)
            for state, tensor in states.items():
                assert torch.equal(tensor, wanted[name][state].to(tensor.dtype)), (case, name, state)
        if case.buffer:
            assert torch.equal(found["buffers"]["bert.tally"].float(), torch.tensor([5.0, 6.0, 7.0]))
        train(engine, case, 2)
        assert engine.global_steps == 9
        release(engine)


def test_unmodified_engines_restore_them(tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for case in CASES:
        spec = spec_of(case)
        tensors, target = make_tensors(spec), tmp_path / case.name
        write_checkpoint(
            target, spec, reader(tensors), format="zero", stage=case.stage, world_size=2, manifest_growth=None
        )
        if case.stage > 1:  # DeepSpeed's tool looks for frozen ones from stage 2 on
            found = get_fp32_state_dict_from_zero_checkpoint(str(target))
            for name, states in tensors.items():
                low = states["fp32"].to(spec.dtype) if name in spec.frozen else states["fp32"]
                assert torch.equal(found[name], low), name
    run_ranks(resume, 2, str(tmp_path))


@pytest.mark.parametrize(
    "how", [{"format": "universal"}, *({"format": "zero", "stage": s, "world_size": 3} for s in (1, 2, 3))]
)
def test_they_read_back_without_moments(tmp_path: Path, how: dict[str, Any]) -> None:
    spec = spec_of(Case("", precision="bf16", frozen=FROZEN, buffer=True))
    tensors = make_tensors(spec)
    folder = write_checkpoint(tmp_path / "d", spec, reader(tensors), manifest_growth=None, **how)
    source = open_source(folder)
    assert list(source.tensors) == list(tensors) and list(source.buffers) == ["bert.tally"]
    for name, states in tensors.items():
        trained = name not in spec.frozen
        assert source.tensors[name].trainable == trained and source.step(name) == (7 if trained else 0)
        for state in STATES:
            want = states[state] if trained else states[state].to(spec.dtype) if state == "fp32" else torch.zeros(())
            found = source.read(name, state, 0, len(states[state]))
            assert torch.equal(found, want.expand(found.shape)), (name, state)
    manifest = json.loads((folder / "bert2bert.json").read_text())
    assert all((len(manifest["tensors"][name]["digest"]) == 1) == (name in spec.frozen) for name in tensors)
    assert not {name for group in manifest["groups"] for name in group["names"]} & set(spec.frozen)


def test_growth_keeps_what_was_frozen(tmp_path: Path) -> None:
    """A ZeRO-3 run with a frozen layer, grown in width and depth into native and universal checkpoints."""
    case = Case("run", 3, frozen=("layer.0.",), buffer=True)
    save_cases(tmp_path, 2, [case])
    model = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    (tmp_path / "run" / "config.json").write_text(json.dumps(hf_config() | model))
    target = hf_config(hidden_size=64, intermediate_size=88, num_attention_heads=4, num_hidden_layers=4) | model
    (tmp_path / "target.json").write_text(json.dumps(target))
    messages: list[str] = []
    common: dict[str, Any] = {"measure": False, "say": messages.append}
    native = {"format": "zero", "stage": 2, "world_size": 2}
    for name, how in {"native": native, "universal": {}, "hub": {"format": "hub"}}.items():
        folder = grow(tmp_path / "run", tmp_path / name, tmp_path / "target.json", **how, **common)
        source = open_source(folder)
        frozen = {n for n, meta in source.tensors.items() if not meta.trainable}
        layers = {n.split(".")[3] for n in frozen}
        assert layers == (set() if name == "hub" else {"0", "2"})  # layer 2 is grown of layer 0 (and alone of it)
        for n in frozen:
            assert source.read(n, "fp32", 0, 1).any() and not source.read(n, "exp_avg", 0, 1).any()
        if name != "hub":
            assert source.read("bert.encoder.layer.1.output.dense.weight", "exp_avg", 0, 1).any()
            assert list(source.buffers) == ["bert.tally"]
            first = f"{len(frozen)} parameters, first bert.encoder.layer.0.attention.self.query.weight"
            assert first in "\n".join(messages) and "must freeze these and no others" in "\n".join(messages)
        messages.clear()


DEPTHS: dict[str, tuple[str, dict[int, int]]] = {
    "modernbert": ("stack", {i: i % 3 for i in range(6)}), "llama": ("insert_identity", {i: i // 2 for i in range(6)}),
}  # fmt: skip
"""Family -> depth operator, target layer -> the source's."""


def numbered(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def resumed(folder: Path, case: Case) -> None:
    engine = build(case)
    assert engine.load_checkpoint(str(folder / case.name))[0]
    found = truth(engine, case)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{case.name}.truth.pt")
    release(engine)


@pytest.mark.parametrize("family", DEPTHS)
def test_what_is_made_of_nothing_is_frozen_with_its_layer(family: str, tmp_path: Path) -> None:
    """The norm that ModernBERT's first layer lacks, and an inserted block's zeros: a script that freezes whole layers
    finds every weight and moment where DeepSpeed's strict load puts it."""
    depth, layers = DEPTHS[family]
    small = tiny.config_of(family)
    deep = tiny.config_of(family, num_hidden_layers=6)
    case = Case("run", 2, steps=2, hf=small, frozen=("layers.0.",))
    save_cases(tmp_path, 2, [case])
    for name, config in {"small": small, "deep": deep}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    grow(
        tmp_path / "run", tmp_path / "grown", tmp_path / "deep.json", source_config=tmp_path / "small.json",
        depth=depth, format="zero", stage=2, world_size=2, measure=False, say=lambda _: None,
    )  # fmt: skip
    still = tuple(f"layers.{i}." for i, origin in layers.items() if origin == 0)
    after = Case("grown", 2, steps=2, hf=deep, frozen=still)
    run_ranks(resumed, 2, tmp_path, after)
    source, found = (load_truth(tmp_path, each)["tensors"] for each in (case, after))
    new = set()
    for name, states in found.items():
        at = numbered(name)
        origin = name if at is None else name.replace(f"layers.{at}.", f"layers.{layers[at]}.")
        if origin not in source or not states["fp32"].any():
            new.add(name)
            continue
        assert states.keys() == source[origin].keys(), name
        inserted = depth == "insert_identity" and at is not None and at % 2
        for state, value in states.items():
            assert torch.equal(value, source[origin][state] * (not inserted or state == "fp32")), (name, state)
    assert any("layers.3.attn_norm" in name for name in new) if depth == "stack" else len(new) == 2 * 3

    model = hf_model(small)
    model.model.layers[0].requires_grad_(False)
    grown = bert2bert.grow(model, deep, depth=depth)
    learns = {name for name, p in grown.named_parameters() if p.requires_grad}
    assert learns == {name for name, states in found.items() if "exp_avg" in states}


def test_frozen_ones_that_cannot_grow_are_named(tmp_path: Path) -> None:
    """Those that a run left out of its files, and those of a quantised base model."""
    name = "bert.encoder.layer.0.attention.self.query.weight"
    model = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(hf_config() | model))
    how: dict[str, Any] = {"source_config": tmp_path / "config.json", "measure": False, "say": lambda _: None}
    cases = [
        Case(f"z{s}{e}", s, steps=1, frozen=("layer.0.",), exclude_frozen=e) for s in (1, 2) for e in (True, False)
    ]
    save_cases(tmp_path, 1, cases)

    def whole(content: Any) -> None:
        content["module"][name] = content["module"][name].to(torch.int8)

    for stage in (1, 2):
        left_out, kept = tmp_path / f"z{stage}True", tmp_path / f"z{stage}False"
        reshard(left_out, tmp_path / f"u{stage}", say=lambda _: None)
        for folder in (left_out, tmp_path / f"u{stage}"):
            with pytest.raises(InvalidCheckpoint, match=rf"{name} is missing(.|\n)*save it without exclude_frozen_par"):
                grow(folder, tmp_path / "out", tmp_path / "config.json", **how)
        grow(kept, tmp_path / f"out{stage}", tmp_path / "config.json", **how)
        edit(kept / "global_step1" / "mp_rank_00_model_states.pt", whole)
        with pytest.raises(InvalidCheckpoint, match=rf"{name} is int8, a parameter that the run froze: .*quantised"):
            grow(kept, tmp_path / "out", tmp_path / "config.json", **how)
        with pytest.raises(UnsupportedGrowth, match=rf"'{name}' is int8, a parameter that the run froze"):
            reshard(kept, tmp_path / "out", say=lambda _: None)
    three = hf_config(num_hidden_layers=3) | model
    (tmp_path / "config.json").write_text(json.dumps(three))
    with pytest.raises(
        InvalidCheckpoint, match=r"layer\.2\..* is missing(.|\n)*Is this the config of this checkpoint\?$"
    ):
        grow(tmp_path / "z2False", tmp_path / "out", tmp_path / "config.json", **how)


def test_second_names_of_frozen_ones_that_were_left_out_are_named(tmp_path: Path) -> None:
    """DeepSpeed leaves the first name of a tied frozen matrix out of its files, and writes the second with values."""
    second = "cls.predictions.decoder.weight"
    cases = [Case(f"{e}", 1, steps=1, frozen=("word_embeddings",), exclude_frozen=e) for e in (True, False)]
    save_cases(tmp_path, 1, cases)
    for case in cases:
        held = torch.load(tmp_path / case.name / "global_step1/mp_rank_00_model_states.pt", weights_only=False)[
            "module"
        ]
        assert held[second].numel() and ("bert.embeddings.word_embeddings.weight" in held) != case.exclude_frozen
        lines: list[str] = []
        reshard(tmp_path / case.name, tmp_path / f"u{case.name}", say=lines.append)
        assert (f"left out: 1 tensors, first {second} = " in "\n".join(lines)) == case.exclude_frozen
    # At stages 1 and 2, where a load that is not strict restores the tied parameter by its second name, it is carried.
    source = tmp_path / "True"
    value = torch.load(source / "global_step1/mp_rank_00_model_states.pt", weights_only=False)["module"][second]
    for stage in (2, 1):
        lines, target = [], tmp_path / f"z{stage}"
        reshard(source, target, format="zero", stage=stage, world_size=2, say=lines.append)
        assert f"carried: 1 tensors, first {second} = " in "\n".join(lines)
        written = torch.load(target / "global_step1/mp_rank_00_model_states.pt", weights_only=False)
        assert torch.equal(written["module"][second], value) and second in written["shared_params"]
        assert written["frozen_param_fragments"] is None and second not in written["buffer_names"]
        source = target


def test_growth_names_the_state_that_it_cannot_carry(tmp_path: Path) -> None:
    case = Case("run", 2, steps=1)
    save_cases(tmp_path, 1, [case])
    model = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(hf_config() | model))

    def amsgrad(content: Any) -> None:
        for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()

    edit(next((tmp_path / "run" / "global_step1").glob("*optim_states.pt")), amsgrad)
    with pytest.raises(UnsupportedGrowth, match=r"keeps exp_avg, exp_avg_sq, max_exp_avg_sq\. How these grow"):
        grow(
            tmp_path / "run", tmp_path / "out", tmp_path / "config.json", source_config=tmp_path / "config.json",
            measure=False,
        )  # fmt: skip
    grow(
        tmp_path / "run", tmp_path / "hub", tmp_path / "config.json", source_config=tmp_path / "config.json",
        format="hub", measure=False,
    )  # fmt: skip
