"""Growths in Python: sizes, one pass against two steps, and fused growths against what is written in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bert2bert import growths as g
from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import values
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.steps import KINDS, replan
from bert2bert.operators.registry import OPERATORS
from bert2bert.tables import table_for
from tests import tiny
from tests.laws.harness import STATES, reader
from tests.planning import plan_growth

SEVERAL = ["bert", "gpt2", "llama", "t5", "modernbert", "qwen2_moe"]
States = dict[str, dict[str, Tensor]]


def states_of(config: dict[str, Any], plan: GrowthPlan, seed: int = 0) -> States:
    """Random weights and moments of a checkpoint, in float32."""
    draw = torch.Generator().manual_seed(seed)
    while plan.before:
        plan = plan.before[0]
    shapes = {n: p.shape for n, p in table_for(config).parameters(config, frozenset(plan.recipe["heads"])).items()}
    return {state: {n: torch.rand(s, generator=draw) - 0.2 for n, s in shapes.items()} for state in STATES}


def written(plan: GrowthPlan, sources: list[States]) -> States:
    """What a growth of these checkpoints writes, in float32."""
    rows = values(plan, [reader(s) for s in sources])
    return {s: {n: rows(n, s, 0, t.shape[0]) for n, t in plan.tensors.items()} for s in STATES}


def assert_equal(a: States, b: States) -> None:
    for state in STATES:
        assert list(a[state]) == list(b[state])
        differing = [n for n in a[state] if not torch.equal(a[state][n], b[state][n])]
        assert not differing, (state, differing)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("width", ["fpi", "aki", "tile", "staged"])
def test_width_and_depth_in_one_pass_are_the_two_in_sequence(name: str, width: str) -> None:
    config = tiny.config_of(name)
    one = g.grow(width=width, depth="stack", **sizes(config, 2), seed=3).plan(config)
    two = g.then(getattr(g, width)(2, seed=3), g.stack(2)).plan(config)
    states = states_of(config, one)
    assert_equal(written(one, [states]), written(two, [states]))
    assert one.config == two.config and two.before and not one.before


def sizes(config: dict[str, Any], times: int) -> dict[str, int]:
    """Embed and layers of a model larger in both."""
    table = table_for(config)
    return {axis: times * table.axis_sizes(config)[axis] for axis in ("embed", *table.sizes.depth)}


PAIRS = {
    "fpi, aki": lambda c: (g.fpi(2), g.aki(2, seed=1)),
    "noise, stack": lambda c: (g.fpi(2, breaker="noise:scale=3", seed=2), g.stack(2)),
    "fills, fills": lambda c: (g.direct(2, seed=4), g.direct(2, seed=5)),
    "random layers, tile": lambda c: (g.grow(depth="random", layers=5, seed=6), g.tile(3)),
    "identities, noise": lambda c: (g.insert_identity(2), g.hyperclone(2, noise=2.0)),
    "aki, coalesce": lambda c: (g.aki(4), g.coalesce(embed=2 * table_for(c).axis_sizes(c)["embed"])),
    "all, coalesce": lambda c: (g.grow(width="tile", depth="gstack", **sizes(c, 2)), g.coalesce(2, order="stack")),
    "coalesce, direct": lambda c: (g.coalesce(embed=table_for(c).axis_sizes(c)["embed"] // 2), g.direct(3)),
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("pair", PAIRS)
def test_fused_growths_are_the_sequence(name: str, pair: str) -> None:
    """Bit for bit what the second makes of the files that the first has written, slices too."""
    config = tiny.config_of(name)
    if pair == "coalesce, direct":
        config = g.tile(2).config(config)
    assert_sequence(*PAIRS[pair](config), config)


def assert_sequence(first: g.Step, second: g.Step, *configs: dict[str, Any]) -> None:
    fused = g.then(first, second).plan(*configs)
    one = first.plan(*configs)
    two = second.plan(one.config)
    inner = one.before or (one,)
    states = [states_of(c, p, i) for i, (c, p) in enumerate(zip(configs, inner, strict=True))]
    expected = written(two, [written(one, states)])
    assert_equal(written(fused, states), expected)
    rows = values(fused, [reader(s) for s in states])
    for name, tensor in fused.tensors.items():
        n = tensor.shape[0]
        for state in STATES:
            assert torch.equal(rows(name, state, n // 3, n - 1), expected[state][name][n // 3 : n - 1]), (name, state)
    assert fused.leaves == len(configs) and fused.config == two.config


@pytest.mark.parametrize("name", SEVERAL)
def test_a_v_cycle_in_one_pass(name: str) -> None:
    """Decoalesced, mixed with the large model from before, and grown once more."""
    small = tiny.config_of(name)
    large = g.decoalesce(2).config(small)
    mean = g.interpolate(g.grow(), g.decoalesce(2), 0.25)
    assert mean.leaves == 2 and mean.config(large, small) == large
    assert_sequence(mean, g.fpi(2), large, small)
    plan = mean.plan(large, small)
    assert replan(plan.recipe, large, large, small).digest() == plan.digest()


def test_sequences_of_any_length() -> None:
    config = tiny.config_of("gpt2")
    left, right = (
        g.then(g.then(g.stack(2), g.tile(2)), g.coalesce(2)),
        g.then(g.stack(2), g.then(g.tile(2), g.coalesce(2))),
    )
    plans = [step.plan(config) for step in (left, right, g.then(g.stack(2), g.tile(2), g.coalesce(2)))]
    assert len({p.digest() for p in plans}) == 1 and plans[0].config == config
    assert left.config(config) == config and left.leaves == 1


def test_every_operator_has_its_name() -> None:
    names = {name for kind in KINDS for name in OPERATORS[kind]}
    assert names | {"grow", "then", "interpolate"} <= set(dir(g))
    for name in names - {"interpolate"}:
        assert callable(getattr(g, name))
    with pytest.raises(AttributeError, match=r"'stacks'.*did you mean 'stack'"):
        _ = g.stacks


def test_sizes_by_factor_by_axis_and_by_config() -> None:
    config = tiny.config_of("bert")
    assert g.stack(2).config(config) == config | {"num_hidden_layers": 6}
    assert g.tile(pos=20).config(config) == config | {"max_position_embeddings": 20}
    assert g.stack(layers=5).config(config) == config | {"num_hidden_layers": 5}
    wide = config | {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    assert g.fpi(embed=16).config(config) == g.fpi(2).config(config) == wide
    assert g.fpi(embed=16, ffn=30, heads=4, choice="left").config(config) == wide | {"intermediate_size": 30}
    assert g.decoalesce(2).config(config) == wide | {"num_hidden_layers": 6}
    assert g.coalesce(2).config(g.decoalesce(2).config(config)) == config
    assert g.fpi(wide).config(config) == wide and g.grow().config(config) == config
    t5 = tiny.config_of("t5")
    assert g.stack(2).config(t5) == t5 | {"num_layers": 6, "num_decoder_layers": 4}


def test_a_step_is_the_plan_of_its_operators() -> None:
    config = tiny.config_of("bert")
    wide = g.fpi(2).config(config)
    mine = g.fpi(2, choice="random", seed=7, breaker="noise", moments="reset").plan(config)
    theirs = plan_growth(config, wide, width="fpi:choice=random", seed=7, breaker="noise", moments="reset")
    assert mine.digest() == theirs.digest() and mine.recipe == theirs.recipe
    only = g.coalesce(embed=8).plan(wide)
    assert only.recipe["width"] == "coalesce" and only.recipe["depth"] == "stack"
    assert g.grow().plan(config).exactness.function == ()


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_kinds_of_layers_follow_the_depth(name: str) -> None:
    config = tiny.config_of(name)
    kinds = g.stack(2).config(config)["layer_types"]
    assert kinds == tiny.config_of(name, num_hidden_layers=6)["layer_types"] and len(kinds) == 6
    odd = config | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    assert g.stack(2).config(odd)["layer_types"] == 2 * odd["layer_types"]


@pytest.mark.parametrize(
    "step,text",
    [
        (lambda: g.stack(1.5), r"stack: 1.5 times layers=3 is not a whole number"),
        (lambda: g.fpi(layers=6), "fpi does not grow layers, which is a matter of depth"),
        (lambda: g.stack(2, embed=16), "stack does not grow embed, which is a matter of width"),
        (lambda: g.fpi(hidden=16), "hidden is not an axis"),
        (lambda: g.fpi(chioce="left"), "chioce='left' is neither an option of the operator nor the size"),
        (lambda: g.fpi(choice="wild"), "choice is 'wild'"),
        (lambda: g.fpi(embed=True), "embed=True is neither"),
        (lambda: g.fpi(2, embed=24), "a factor of 2 and embed are both given"),
        (lambda: g.stack(float("inf")), "a positive factor is expected"),
        (lambda: g.copy(vocab=40), "--vocab copy: of is not given"),
        (lambda: g.stack(0), "a positive factor is expected"),
        (lambda: g.interpolate(g.grow(), g.stack(2), 2.0), "alpha is 2.0"),
    ],
)
def test_refused_steps(step: Any, text: str) -> None:
    config = tiny.config_of("bert")
    with pytest.raises(InvalidConfig, match=text):
        made = step()
        made.plan(*[config | {"num_hidden_layers": 6}, config] if made.leaves == 2 else [config])


def test_configs_must_be_as_many_as_checkpoints() -> None:
    config = tiny.config_of("bert")
    with pytest.raises(InvalidConfig, match="starts from 2 checkpoints, and 1 configs were given"):
        g.interpolate(g.grow(), g.stack(2), 0.5).plan(config)
    with pytest.raises(InvalidConfig, match="starts from 1 checkpoints, and 2"):
        g.stack(2).plan(config, config)
    with pytest.raises(UnsupportedGrowth, match="can only come first in a sequence"):
        g.then(g.stack(2), g.interpolate(g.grow(), g.grow(), 0.5))
