"""Operators that pad the residual stream: LEMON at any width, Gesmundo's composable expansions."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from bert2bert.algebra import axes
from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import UnsupportedGrowth
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import (
    STATES,
    Grown,
    assert_gradient_rule,
    assert_same_logits,
    assert_slices,
    gradients,
    grow,
    reader,
    realised,
)
from tests.laws.test_copying import more_units
from tests.rounding import ROUNDING, WRONG, allowed, gap, largest, squared

FAMILIES = sorted(tiny.VARIANTS)
ON_STREAM = [n for n in FAMILIES if n.startswith(("bert", "roberta", "modernbert"))]  # a norm writes the stream itself
PADDED = sorted(set(FAMILIES) - set(ON_STREAM))
RMS = [n for n in PADDED if not n.startswith("gpt2")]
FIRST_STEP = "first Adam update"


def table_and_sizes(name: str) -> tuple[Any, dict[str, int]]:
    config = tiny.config_of(name)
    return table_for(config), table_for(config).axis_sizes(config)


def indivisible(name: str, times: int) -> dict[str, int]:
    """``times`` copies of the stream and about a half, one more neuron, heads as the model allows."""
    table, sizes = table_and_sizes(name)
    more = {unit: sizes[unit] + 1 for unit in table.sizes.units if unit not in ("heads", "kv", "group")}
    embed = sizes["embed"] * times + sizes["embed"] // 2
    if "heads" in sizes:
        free = table.key("qk") != table.key("embed")
        return more | {"embed": embed + free, "heads": sizes["heads"] + 1 if free else embed // sizes["qk"]}
    heads = embed // 2
    group = heads if sizes["kv"] == 1 else sizes["group"]
    return more | {"embed": embed, "group": group, "kv": heads // group}


def loaded(grown: Grown, state: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> float:
    """The drift when the grown model has this state (and config) instead."""
    config = config or grown.plan.config
    return grown.drift_of(tiny.load(config, state), config)


def scaled(plan: GrowthPlan, state: dict[str, torch.Tensor], axis: str, factor: float) -> dict[str, torch.Tensor]:
    """The state with a factor on every tensor that has the axis."""
    return {n: x * factor if axis in axes.axes_of(plan.tensors[n].spec) else x for n, x in state.items()}


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("times", [2, 3])
def test_lemon_keeps_the_logits_at_multiples(name: str, times: int) -> None:
    _, sizes = table_and_sizes(name)
    grown = grow(name, {"embed": times * sizes["embed"]}, width="lemon")
    assert_same_logits(grown)
    assert grown.plan.moments == "carried" and "uneven shares" in grown.plan.exactness.moments[0]
    assert not any("identical for ever" in w for w in grown.plan.warnings)
    even = grow(name, {"embed": times * sizes["embed"]}, width="tile")
    assert sum(not torch.equal(even.state[n], grown.state[n]) for n in even.state) > len(even.state) / 4


@pytest.mark.parametrize("name", families())
def test_lemon_grows_units_to_any_number_with_exact_moments(name: str) -> None:
    grown = grow(name, more_units(name), width="lemon")
    assert_same_logits(grown)
    assert_gradient_rule(grown)
    assert grown.plan.moments == "exact"


@pytest.mark.parametrize("name", families(PADDED))
@pytest.mark.parametrize("times", [1, 2])
def test_lemon_keeps_the_logits_at_any_width(name: str, times: int) -> None:
    grown = grow(name, indivisible(name, times), width="lemon")
    assert_same_logits(grown)
    table, sizes = table_and_sizes(name)
    kept, eps = times * sizes["embed"] / indivisible(name, times)["embed"], table.norms.eps[0]
    assert kept < 1 and grown.plan.config[eps] == pytest.approx(kept * grown.config[eps], rel=1e-15)
    assert grown.plan.moments == "carried" and any("padding" in r for r in grown.plan.exactness.moments)
    assert any(FIRST_STEP in w for w in grown.plan.warnings) and any(eps in n for n in grown.plan.notes)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families(ON_STREAM))
@pytest.mark.parametrize("width", ["lemon", "gesmundo"])
def test_no_padding_where_a_norm_writes_the_stream(name: str, width: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=r"multiple of 8[^,]*, or use --width fpi with --lossy") as e:
        grow(name, indivisible(name, 1), width=width)
    assert ("--width lemon," in str(e.value)) == (width == "gesmundo")


@pytest.mark.parametrize("name", families(PADDED))
def test_padding_needs_the_gain_and_the_epsilon(name: str) -> None:
    """Guards: the norms' factor and epsilon are what makes the law hold."""
    grown = grow(name, indivisible(name, 1), width="lemon")
    table, sizes = table_and_sizes(name)
    gain = sqrt(sizes["embed"] / indivisible(name, 1)["embed"])
    assert loaded(grown, scaled(grown.plan, grown.state, "rho", 1 / gain)) > WRONG
    plain = {**grown.plan.config, table.norms.eps[0]: grown.config[table.norms.eps[0]]}
    assert loaded(grown, grown.state, plain) > WRONG
    if "iota" in sizes:
        assert loaded(grown, scaled(grown.plan, grown.state, "iota", 1 / gain)) > WRONG


def test_lemons_stream_is_copies_then_means_and_norms_give_zeros() -> None:
    grown = grow("gpt2", indivisible("gpt2", 2), width="lemon")  # 8 -> 20

    def seen(model: torch.nn.Module, config: dict[str, Any]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        hooks = [
            model.get_submodule(f"transformer.{part}").register_forward_hook(
                lambda _m, _i, out, part=part: found.update({part: out[0] if isinstance(out, tuple) else out})
            )
            for part in ("h.1", "h.2.ln_1", "ln_f")
        ]
        tiny.logits(model, config)
        for hook in hooks:
            hook.remove()
        return found

    before, after = seen(grown.source, grown.config), seen(grown.target, grown.plan.config)
    limits = allowed(lambda: seen(grown.target, grown.plan.config))
    for part, small in before.items():
        large = after[part]
        pads = small.mean(-1, keepdim=True).expand(*small.shape[:-1], 4) if part == "h.1" else 0 * large[..., 16:]
        shares = torch.ones(16) if part != "ln_f" else large[0, 0, :16] / small[0, 0].repeat(2)  # read by a tied head
        assert gap(large[..., :16], small.repeat(1, 1, 2) * shares, limits[part]) <= ROUNDING, part
        assert gap(large[..., 16:], pads, limits[part]) <= ROUNDING, part
    limit = limits["ln_f"] / before["ln_f"][0, 0].abs().min().item()
    assert gap(shares[:8] + shares[8:], torch.ones(8), limit) <= ROUNDING and (shares != 0.5).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_what_reads_the_padding_is_random_and_free(name: str) -> None:
    grown = grow(name, indivisible(name, 1), width="lemon")
    weight = {
        "gpt2": "transformer.h.0.mlp.c_fc.weight",
        "llama": "model.layers.0.mlp.up_proj.weight",
        "t5": "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    }[name]
    fresh = grown.state[weight] if name != "gpt2" else grown.state[weight].T
    _, sizes = table_and_sizes(name)
    assert (fresh[:, sizes["embed"] :] != 0).all()
    fresh[:, sizes["embed"] :] += 5.0  # a view: the state changes
    assert loaded(grown, grown.state) <= ROUNDING
    fresh[:, 0] += 5.0
    assert loaded(grown, grown.state) > WRONG


def six(name: str) -> dict[str, int]:
    """Every axis that Gesmundo's expansions grow, as far as the model's positions let it."""
    table, sizes = table_and_sizes(name)
    return indivisible(name, 1) | ({} if "qk" in table.sizes.fixed else {"qk": sizes["qk"] + 2})


def assert_old_moments(grown: Grown) -> None:
    """Old entries have the true gradients, new ones zeros, though some have a gradient."""
    g, measured = gradients(grown.source, grown.config), gradients(grown.target, grown.plan.config)
    states = {s: {n: x if s == "exp_avg" else x.square() for n, x in g.items()} for s in STATES[1:]}
    ones = {s: {n: torch.ones_like(x) for n, x in g.items()} for s in STATES[1:]}
    limits = allowed(lambda: gradients(grown.target, grown.plan.config))
    beyond = 0.0
    for state, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        ours, powered = realised(grown.plan, reader(states), state), realised(grown.plan, reader(ones), state)
        for n, x in ours.items():
            old, true = powered[n] != 0, measured[n] ** power
            limit = limits[n] if power == 1 else squared(limits[n], measured[n])
            assert old.any() and gap(x[old], true[old], limit) <= ROUNDING, n
            assert not x[~old].any(), n
            beyond = max(beyond, largest(true[~old]) / limit)
    assert beyond > WRONG


@pytest.mark.parametrize("name", families(RMS))
def test_composable_expansions_keep_the_logits_and_old_moments(name: str) -> None:
    grown = grow(name, six(name), width="gesmundo")
    assert_same_logits(grown)
    assert_old_moments(grown)
    assert grown.plan.moments == "asymmetric" and "new entries start at zero" in grown.plan.exactness.moments[0]
    assert any(FIRST_STEP in w for w in grown.plan.warnings)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families())
def test_each_expansion_alone_keeps_the_logits(name: str) -> None:
    """And the guard: what the zeros silence is heard without them."""
    table, sizes = table_and_sizes(name)
    free = table.key("qk") != table.key("embed")
    alone = [{a: sizes[a] + 1} for a in table.sizes.units if a not in ("heads", "kv", "group") or free]
    alone = [c if not {"kv", "group"} & set(c) else {"kv": 2 * sizes["kv"]} for c in alone]
    for change in alone + [{"qk": sizes["qk"] + 2}] * ("qk" not in table.sizes.fixed and free):
        grown = grow(name, change, width="gesmundo")
        assert_same_logits(grown)
        noise = torch.Generator().manual_seed(0)
        heard = {n: torch.where(x == 0, torch.randn(x.shape, generator=noise), x) for n, x in grown.state.items()}
        assert loaded(grown, heard) > WRONG, change


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied"])
def test_zeros_before_a_layer_norm_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=r"subtracts a mean that zeros change\.\nUse --width lemon"):
        grow(name, indivisible(name, 1), width="gesmundo")


def test_head_numbers_follow_the_width_in_bert() -> None:
    with pytest.raises(UnsupportedGrowth, match="cannot shrink heads"):
        grow("bert", {"heads": 4}, width="gesmundo")


@pytest.mark.parametrize("width", ["lemon", "gesmundo"])
def test_nothing_to_break(width: str) -> None:
    with pytest.raises(UnsupportedGrowth, match="no symmetry to break"):
        grow("llama", {"ffn": 20}, width=width, breaker="noise")
