"""Sources of one layer and of none: what grows from them, what is refused, and fresh layers that write nothing yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.size_request import SizeRequest
from bert2bert.growth.sizes import resized
from bert2bert.operators.registry import OPERATORS
from bert2bert.tables import TABLES, table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import STATES, Grown, assert_same_logits, assert_slices, reader, realised
from tests.laws.test_depth import PRENORM, deepened
from tests.laws.test_levels import random_states
from tests.planning import plan_growth
from tests.rounding import WRONG

EMPTY = [name for name in sorted(tiny.VARIANTS) if not name.startswith("modernbert")]  # transformers makes no such
COPIES = [name for name, one in OPERATORS["depth"].items() if not one.shrinks and name != "random"]


def shallow(name: str, layers: int) -> dict[str, Any]:
    config = tiny.config_of(name)
    keys = dict.fromkeys(map(table_for(config).key, table_for(config).sizes.depth), layers)
    made = tiny.config_of(name, **keys, **({"layer_types": None} if "layer_types" in config and layers else {}))
    return made | ({"layer_types": None} if layers and "layer_types" in config else {})


def deep(name: str) -> dict[str, Any]:
    config = tiny.config_of(name)
    return config | ({"layer_types": None} if "layer_types" in config else {})


@pytest.mark.parametrize("name", families())
def test_one_layer_becomes_many_copies(name: str) -> None:
    """Bu's copying: every layer is the one there is, with its moments; ModernBERT's first lacks a norm, made fresh."""
    small, large = shallow(name, 1), deep(name)
    copies = {plan_growth(small, large, depth=how).digest() for how in ("stack", "interleave", "middle", "interpolate")}
    grown = Grown(small, plan_growth(small, large))
    assert copies == {grown.plan.digest()} and grown.drift() > WRONG
    assert set(grown.plan.recipe["layers"]["layers"]) == {"0"}
    states = random_states(grown.plan, small)
    made = {state: realised(grown.plan, reader(states), state) for state in STATES}
    for n, p in table_for(small).parameters(large, frozenset(grown.plan.recipe["heads"])).items():
        source = p.at(None if p.layer is None else 0)
        if source in states["fp32"]:
            assert all(torch.equal(made[state][n], states[state][source]) for state in STATES), n
        else:
            assert name.startswith("modernbert") and "attn_norm" in n and any("attn_norm" in r for r in
                                                                             grown.plan.exactness.function)  # fmt: skip
            assert (made["fp32"][n] == float(n.endswith("weight"))).all() and not made["exp_avg"][n].any(), n


@pytest.mark.parametrize("name", families(EMPTY))
def test_no_layer_becomes_many_drawn_ones(name: str) -> None:
    """With a deviation as transformers draws it, moments of zero; embeddings and head keep theirs."""
    small, large = shallow(name, 0), deep(name)
    grown = Grown(small, plan_growth(small, large, depth="random"))
    assert grown.drift() > WRONG and any("drawn at random" in reason for reason in grown.plan.exactness.function)
    table, moments = table_for(small), random_states(grown.plan, small)
    m = realised(grown.plan, reader(moments), "exp_avg")
    for n, p in table.parameters(large, frozenset(grown.plan.recipe["heads"])).items():
        if p.layer is None:
            assert torch.equal(grown.state[n], grown.weights[n]) and torch.equal(m[n], moments["exp_avg"][n]), n
        else:
            assert not m[n].any() and grown.plan.tensors[n].fill is not None, n
            if grown.state[n].ndim > 1 and grown.state[n].numel() > 100:
                assert 0.8 < grown.state[n].std() / table.std(p.pattern, large) < 1.2, n
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families([n for n in EMPTY if n in PRENORM]))
def test_drawn_layers_that_write_nothing_keep_the_function(name: str) -> None:
    """On top of none, of one with a doubled width in the same pass, and of three."""
    small, large = shallow(name, 0), deep(name)
    none = Grown(small, plan_growth(small, large, depth="random:residual=zero"))
    assert none.plan.exactness.function == () and none.drift() == 0.0 and none.plan.moments == "asymmetric"
    wide = table_for(small).resize(large, {"embed": 2 * table_for(large).axis_sizes(large)["embed"]})
    for layers in (0, 1):
        assert_same_logits(Grown(shallow(name, layers), plan_growth(shallow(name, layers), wide,
                                                                    depth="random:residual=zero")))  # fmt: skip
    three = deepened(name, 5, 3, depth="random:residual=zero")
    assert three.plan.exactness.function == () and three.drift() == 0.0
    assert three.plan.recipe["layers"]["layers"][3:] == ["new+0", "new+0"]
    assert any(w.ndim > 1 and w.any() for n, w in three.state.items() if not three.plan.tensors[n].terms)


@pytest.mark.parametrize("depth", COPIES)
def test_nothing_can_be_copied_of_no_layer(depth: str) -> None:
    with pytest.raises(
        UnsupportedGrowth, match=r"num_hidden_layers=0, so there is no layer to copy; use --depth random"
    ):
        plan_growth(shallow("llama", 0), deep("llama"), depth=depth)


def test_a_width_alone_grows_without_layers() -> None:
    for name in ("gpt2", "bert", "t5"):
        small = shallow(name, 0)
        for width in ("fpi", "aki", "sparkling"):
            wide = table_for(small).resize(small, {"embed": 16})
            grown = Grown(small, plan_growth(small, wide, width=width))
            if width == "fpi":
                assert_same_logits(grown)
            assert grown.target is not None and not any(".0." in n for n in grown.state)


def test_a_model_without_layers_comes_back() -> None:
    small, large = shallow("gpt2", 0), deep("gpt2")
    down = plan_growth(large, small, depth="shrink:of=random")
    states = random_states(down, large)
    made = realised(down, reader(states))
    assert made and all(torch.equal(value, states["fp32"][n]) for n, value in made.items())
    assert any("depth 3 -> 0" in reason for reason in down.exactness.function)


def test_sizes_of_a_model_without_layers() -> None:
    small, heads = shallow("gpt2", 0), TABLES["gpt2"].names.classes["GPT2LMHeadModel"]
    assert resized(small, heads, SizeRequest.parse(depth="12")).config["n_layer"] == 12
    assert resized(small, heads, SizeRequest.parse(width="2x")).config["n_layer"] == 0
    for wish in ({"depth": "2x"}, {"params": "1M"}):
        with pytest.raises(InvalidConfig, match="without layers"):
            resized(small, heads, SizeRequest.parse(**wish))
    with pytest.raises(InvalidConfig, match="num_hidden_layers is 0; a positive integer"):
        TABLES["modernbert"].axis_sizes(tiny.config_of("modernbert") | {"num_hidden_layers": 0})
    with pytest.raises(InvalidConfig, match="n_layer is -1; an integer of at least 0"):
        TABLES["gpt2"].axis_sizes(small | {"n_layer": -1})
