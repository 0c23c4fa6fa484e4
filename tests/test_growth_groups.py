"""What a growth writes besides tensors: optimizer groups in the order of the source's script, and the loss scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.job import TargetGroup, TargetSpec
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.target import Target
from bert2bert.commands.grow import target_spec
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.named import Named
from bert2bert.growth.opened import open_growth
from tests.checkpoints.engines import hf_config
from tests.checkpoints.targets import make_spec, make_tensors, reader
from tests.doors import grow, write_checkpoint


def config(folder: Path, **sizes: Any) -> Path:
    path = folder / f"config{len(sizes)}.json"
    path.write_text(json.dumps({"model_type": "bert", **hf_config(**sizes)}))
    return path


def foreign(folder: Path, spec: TargetSpec) -> Path:
    """The spec as native shards of somebody's script, which writes no manifest."""
    written = write_checkpoint(
        folder, spec, reader(make_tensors(spec)), format="zero", stage=2, world_size=2, manifest_growth=None
    )
    (written / MANIFEST).unlink()
    (written / "config.json").unlink()
    return folder


def spec_of(source: Path, form: str = "zero", groups: str | None = None, precision: str | None = None) -> TargetSpec:
    config(source.parent)
    native = (2, 2) if form == "zero" else ()
    growth = open_growth(
        source, config(source.parent, num_hidden_layers=4), source_config=source.parent / "config0.json"
    )
    return target_spec(Named.of(growth, form), Target(form, *native, precision=precision, groups=groups))


def regrouped(change: Any) -> TargetSpec:
    spec = make_spec()
    return replace(spec, groups=tuple(change(list(spec.groups))))


def test_groups_of_layers_with_rates_of_their_own_say_where_added_layers_go(tmp_path: Path) -> None:
    def by_layer(groups: list[TargetGroup]) -> list[TargetGroup]:
        names = [name for group in groups for name in group.names]
        parts = [[n for n in names if f".layer.{i}." in n] for i in range(2)]
        parts.append([n for n in names if ".layer." not in n])
        return [
            replace(groups[0], names=tuple(part), hyper=groups[0].hyper | {"lr": 1e-4 * (i + 1)})
            for i, part in enumerate(parts)
        ]

    source, messages = foreign(tmp_path / "run", regrouped(by_layer)), list[str]()
    how: dict[str, Any] = {"source_config": config(tmp_path), "measure": False, "say": messages.append}
    deep = config(tmp_path, num_hidden_layers=4)
    grow(source, tmp_path / "grown", deep, **how)
    text = "layer.0, layer.2 in 0 (lr 0.0001); layer.1, layer.3 in 1 (lr 0.0002). A script that goes on must"
    assert text in "\n".join(messages)
    groups = open_source(tmp_path / "grown").groups
    assert [sorted({n.split(".")[3] for n in g["names"] if ".layer." in n}) for g in groups] == [
        ["0", "2"],
        ["1", "3"],
        [],
    ]
    for name, target, more in (
        ("wide", config(tmp_path, hidden_size=64, num_attention_heads=4), {}),
        ("new", deep, {"groups": "layers"}),
    ):
        messages.clear()
        grow(source, tmp_path / name, target, **how, **more)
        assert messages and "optimizer groups: the source's" not in "\n".join(messages)


def test_groups_keep_the_order_of_the_sources_script(tmp_path: Path) -> None:
    """Scripts differ in it, shapes need not: another order would put weights in wrong places, in silence."""
    plain = spec_of(foreign(tmp_path / "plain", make_spec()))
    assert plain.group_layout == "decay" and [g.decay for g in plain.groups] == [True, False]
    turned = spec_of(foreign(tmp_path / "turned", regrouped(lambda groups: groups[::-1])))
    assert [g.names for g in turned.groups] == [g.names for g in plain.groups][::-1]

    def by_name(groups: list[TargetGroup]) -> list[TargetGroup]:
        return [replace(g, names=tuple(sorted(g.names))) for g in groups]

    named = spec_of(foreign(tmp_path / "named", regrouped(by_name)))
    assert [g.names for g in named.groups] == [tuple(sorted(g.names)) for g in plain.groups]

    def odd(groups: list[TargetGroup]) -> list[TargetGroup]:
        return [replace(g, names=g.names[1:] + g.names[:1]) for g in groups]

    source = foreign(tmp_path / "odd", regrouped(odd))
    with pytest.raises(UnsupportedGrowth, match="neither in the model's order nor by name"):
        spec_of(source)
    assert [set(g.names) for g in spec_of(source, "universal").groups] == [set(g.names) for g in plain.groups]
    assert spec_of(source, groups="decay").groups == plain.groups


def test_a_loss_scale_is_that_of_an_fp16_run_only(tmp_path: Path) -> None:
    """A bf16 run files a fixed scale of 1, at which fp16 gradients vanish."""
    source = foreign(tmp_path / "bf16", make_spec("bf16"))
    assert (open_source(source).loss_scaler or {})["cur_scale"] == 1.0
    assert spec_of(source, precision="fp16").loss_scaler is None
    half = foreign(tmp_path / "fp16", make_spec("fp16", loss_scaler={"dynamic": True, "cur_scale": 64.0}))
    assert (spec_of(half).loss_scaler or {})["cur_scale"] == 64.0


def test_weights_without_groups_grow_on(tmp_path: Path) -> None:
    turned = foreign(tmp_path / "turned", regrouped(lambda groups: groups[::-1]))
    how = {"source_config": config(tmp_path), "say": lambda _: None, "measure": False}
    grow(turned, tmp_path / "hub", config(tmp_path), format="hub", **how)
    assert spec_of(tmp_path / "hub", "universal").group_layout == "layers"
    with pytest.raises(InvalidConfig, match=r"--groups source: .* holds weights only"):
        spec_of(tmp_path / "hub", "universal", groups="source")
    with pytest.raises(InvalidConfig, match="--groups: a Hugging Face folder"):
        grow(turned, tmp_path / "t", config(tmp_path, num_hidden_layers=4), format="hub", groups="decay", **how)


def test_a_group_of_differently_trained_layers_has_the_most_steps(tmp_path: Path) -> None:
    source = foreign(tmp_path / "layers", make_spec(layout="layers"))
    steps = [g.step for g in spec_of(source).groups]
    assert len(set(steps)) == 10 == len(make_spec(layout="layers").groups)  # every pair of groups has its own
    assert [g.step for g in spec_of(source, groups="single").groups] == [max(steps)]
