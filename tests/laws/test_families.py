"""bert2BERT's own operators on every architecture: exact widths, the gradient rule, slices, AKI's identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import Grown, assert_gradient_rule, assert_same_logits, assert_slices, grow, reader, realised


def doubled(name: str, times: int = 2) -> dict[str, int]:
    """Sizes of a model ``times`` as wide."""
    config = tiny.config_of(name)
    return {"embed": times * table_for(config).axis_sizes(config)["embed"]}


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("how", [{}, {"breaker": "noise:scale=5"}, {"breaker": "uneven"}, {"moments": "asymmetric"}])
@pytest.mark.parametrize("times", [2, 3])
def test_divisible_widths_keep_the_logits(name: str, how: dict[str, Any], times: int) -> None:
    grown = grow(name, doubled(name, times), width="fpi", **how)
    assert_same_logits(grown)
    assert not torch.equal(grown.state[next(iter(grown.state))], grown.weights[next(iter(grown.weights))])


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("choice", ["random", "balanced", "left"])
def test_units_grow_exactly_by_any_map(name: str, choice: str) -> None:
    """Neurons, and heads where their number is free of the width, at sizes that are no multiples."""
    config = tiny.config_of(name)
    table = table_for(config)
    sizes, free = table.axis_sizes(config), table.key("qk") != table.key("embed")
    more = {axis: sizes[axis] + 1 for axis in table.sizes.units if axis != "heads" or free}
    # transformers wants a whole number of heads
    if table.sizes.multiples and (more["kv"] * more["group"] > sizes["embed"]):
        more = more | {"kv": 2 * sizes["kv"], "group": sizes["group"]}
    grown = grow(name, more, width=f"fpi:choice={choice}", seed=3)
    assert_same_logits(grown)
    assert_gradient_rule(grown)


@pytest.mark.parametrize("name", sorted(tiny.VARIANTS))
def test_the_gradient_rule(name: str) -> None:
    """Of every variant, for a mistake in a row may be in that row alone, and may take the variant out of the cover."""
    grown = grow(name, doubled(name), width="fpi")
    assert_same_logits(grown)
    assert_gradient_rule(grown)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("width", ["fpi", "aki", "direct", "random"])
def test_slices(name: str, width: str) -> None:
    breaker = "noise" if width in ("fpi", "aki") else None
    grown = grow(name, doubled(name), width=width, breaker=breaker)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("source", ["above", "below"])
def test_aki_is_fpi_where_layers_are_equal_and_borrows_where_not(name: str, source: str) -> None:
    plans = [grow(name, doubled(name), width=w, seed=5).plan for w in ("fpi", f"aki:source={source}")]
    fpi, aki = plans
    model = Grown(tiny.config_of(name), aki)
    originals = table_for(model.config).parameters(model.config, frozenset(aki.recipe["heads"]))
    equal = {}
    for n, p in originals.items():
        equal[n] = model.weights[p.at(1) if p.layer is not None and p.at(1) in model.weights else n]
    a, f = (realised(plan, reader({"fp32": equal})) for plan in (aki, fpi))
    assert all(torch.equal(a[n], f[n]) for n in a)
    a, f = (realised(plan, reader({"fp32": model.weights})) for plan in (aki, fpi))
    differing = {n for n in a if not torch.equal(a[n], f[n])}
    layers = {p.layer for n, p in originals.items() if n in differing}
    last = {"above": 2, "below": 0}[source]
    assert layers == {0, 1, 2} - {last}
    for n in differing:  # the source's own block is FPI's
        corner = tuple(slice(0, s) for s in model.weights[n].shape)
        if "c_attn" not in n and "Wqkv" not in n and "gate_up" not in n and ".Wi." not in n:
            assert torch.equal(a[n][corner], f[n][corner]), n
    assert aki.moments == "carried" and any("aki" in reason for reason in aki.exactness.function)
