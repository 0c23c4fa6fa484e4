"""Unsharing: a model that runs its layers several times, with the same parameters, and its unshared successor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import realise
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import Parameter, table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import detached, gradients, reader, realised, scrambled
from tests.planning import plan_growth
from tests.rounding import ROUNDING, allowed, gap, squared

FAMILIES = sorted(tiny.VARIANTS)
DEFINED = [n for n in FAMILIES if not n.startswith("modernbert")]


def unshared(
    name: str, units: int, times: int, gradient: str = "mean", **how: Any
) -> tuple[dict[str, Any], GrowthPlan]:
    """The config of the unshared model and the plan from A = ``units`` layers to A x B; T5's decoder has one layer."""
    depth = {"num_hidden_layers": units, "n_layer": units, "num_layers": units, "num_decoder_layers": 1}
    small = tiny.config_of(name, **{k: n for k, n in depth.items() if k in tiny.VARIANTS[name].base})
    sizes = {axis: times * table_for(small).axis_sizes(small)[axis] for axis in table_for(small).sizes.depth}
    large = table_for(small).resize(small, sizes)
    if "layer_types" in large:
        large["layer_types"] = None
    return large, plan_growth(small, large, depth=f"unshare:gradient={gradient}", **how)


def layers(plan: GrowthPlan) -> dict[str, tuple[Parameter, int]]:
    """Each layer tensor of the grown model, and the source layer that it comes from."""
    table, heads = table_for(plan.config), frozenset(plan.recipe["heads"])
    found = table.parameters(plan.config, heads).items()
    return {n: (p, int(plan.recipe["layers"][p.depth][p.layer])) for n, p in found if p.layer is not None}


def shared(plan: GrowthPlan) -> torch.nn.Module:
    """The unshared model's class with the same parameter objects in all layers of a unit's place."""
    model = scrambled(plan.config)
    names = set(tiny.parameters(model, plan.config))
    for name, (p, source) in layers(plan).items():
        if p.layer != source and (kept := p.at(source)) in names:
            module, _, last = name.rpartition(".")
            owner, _, _ = kept.rpartition(".")
            setattr(model.get_submodule(module), last, getattr(model.get_submodule(owner), last))
    return model


@pytest.mark.parametrize("name", families(DEFINED))
@pytest.mark.parametrize("units,times", [(1, 3), (2, 2)])
def test_the_unshared_model_is_the_shared_one_with_layers_of_its_own(name: str, units: int, times: int) -> None:
    config, plan = unshared(name, units, times)
    model = shared(plan)
    weights = detached(model, config)
    assert len(weights) < len(plan.tensors)
    state = realised(plan, reader({"fp32": weights}))
    target = tiny.load(config, state)
    assert torch.equal(tiny.logits(model, config), tiny.logits(target, config))
    assert any(f"{units} layers run {times} times with shared weights" in r for r in plan.exactness.function)
    assert plan.moments == "carried" and any(f"over its {times} runs" in r for r in plan.exactness.moments)

    total = gradients(model, config)  # what automatic differentiation gives a shared weight: the sum
    limits = allowed(lambda: gradients(model, config))
    each = gradients(target, config)
    for name_, g in total.items():
        copies = [n for n, (p, source) in layers(plan).items() if p.at(source) == name_] or [name_]
        summed = torch.stack([each[n] for n in copies]).sum(0)
        assert gap(summed, g, limits[name_]) <= ROUNDING, name_


@pytest.mark.parametrize("name", families(DEFINED))
@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_each_layer_starts_with_the_moments_of_the_mean_gradient(name: str, gradient: str) -> None:
    config, plan = unshared(name, 1, 3, gradient)
    model = shared(plan)
    total = gradients(model, config)
    factor = 3.0 if gradient == "sum" else 1.0
    depths = {n for n in layers(plan) if "relative_attention_bias" not in n}  # T5's stands in the first layer alone
    source = {n: g * (factor / 3.0 if n in depths else 1.0) for n, g in total.items()}  # what training averaged
    target = tiny.load(config, realised(plan, reader({"fp32": detached(model, config)})))
    each, limits = gradients(target, config), allowed(lambda: gradients(target, config))
    read = reader({"exp_avg": source, "exp_avg_sq": {n: g.square() for n, g in source.items()}})
    present = [t for t in plan.tensors if all(s in source for s in plan.tensors[t].sources)]
    moments = {
        s: {t: realise(plan.tensors[t], s, read, torch.float64) for t in present if t in each}
        for s in ("exp_avg", "exp_avg_sq")
    }
    checked = 0
    for n, m in moments["exp_avg"].items():
        copies = [
            c for c, (p, source_layer) in layers(plan).items() if p.at(source_layer) == plan.tensors[n].sources[0]
        ]
        mean, limit = torch.stack([each[c] for c in copies or [n]]).mean(0), max(limits[c] for c in copies or [n])
        assert gap(m, mean, limit) <= ROUNDING, n
        assert gap(moments["exp_avg_sq"][n], mean.square(), squared(limit, mean)) <= ROUNDING, n
        checked += len(copies) > 1
    assert checked >= 15


def test_sums_are_divided_by_the_runs_and_their_squares_by_its_square() -> None:
    _, plan = unshared("llama", 2, 2, "sum")
    ones = {n: torch.ones(p.shape) for n, p in plan.tensors.items()}
    read = reader(dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), ones))
    for state, value in (("fp32", 1.0), ("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        for name, x in realised(plan, read, state).items():
            assert (x == (value if ".layers." in name else 1.0)).all(), (name, state)


def test_width_and_unsharing_in_one_growth() -> None:
    """Moments: those of the wider tied model's mean gradient, by the width's own map."""
    small = tiny.config_of("gpt2", n_layer=2)
    large = table_for(small).resize(small, {"embed": 16, "layers": 4})
    plan = plan_growth(small, large, depth="unshare:gradient=sum", seed=2)
    ones = {n: torch.ones(p.shape) for n, p in plan_growth(small, small).tensors.items()}
    m = realised(plan, reader({"exp_avg": ones}), "exp_avg")
    assert (m["transformer.h.3.mlp.c_fc.weight"] == 0.25).all() and (m["transformer.wte.weight"] == 0.5).all()


@pytest.mark.parametrize("name", ["modernbert", "modernbert-untied"])
def test_layers_that_cannot_be_the_same_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=r"layer 0 of a modernbert has not all.*attn_norm.*--depth gstack"):
        unshared(name, 1, 3)
    config = tiny.config_of(name)
    assert not plan_growth(config, config, depth="unshare").exactness.function


def test_refusals() -> None:
    small, large = tiny.bert_config(layers=2), tiny.bert_config(layers=5)
    with pytest.raises(UnsupportedGrowth, match="units run whole times: 4 or 6"):
        plan_growth(small, large, depth="unshare")
    with pytest.raises(InvalidConfig, match=r"did you mean 'mean'|known: mean, sum"):
        plan_growth(small, tiny.bert_config(layers=4), depth="unshare:gradient=max")
