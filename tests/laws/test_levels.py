"""Ways back: every growth that copies is undone by its inverse; coalesce, share, and the mean of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import values
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.choices import Choices
from bert2bert.growth.compose import interpolate, then
from bert2bert.growth.inverse import inverse, shrunk
from bert2bert.operators.registry import OPERATORS
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import (
    STATES,
    assert_gradient_rule,
    assert_same_logits,
    assert_slices,
    grow,
    reader,
    realised,
)
from tests.planning import plan_growth
from tests.rounding import ROUNDING, SPARE, elementary, gap, unit

SEVERAL = ["bert", "gpt2", "llama-mqa", "t5", "modernbert", "qwen3_moe"]
GROWTHS = [(kind, name) for kind in ("width", "depth") for name, o in OPERATORS[kind].items() if not o.shrinks]
FITTED = {"ligo"}  # takes the maps of a fit, which mix whole tensors: see test_what_does_not_come_back

States = dict[str, dict[str, Tensor]]


def larger(config: dict[str, Any], kind: str = "both", times: int = 2) -> dict[str, Any]:
    """The config of a model ``times`` as wide, as deep, or both."""
    table = table_for(config)
    old = table.axis_sizes(config)
    axes = {"width": ("embed",), "depth": table.sizes.depth, "both": ("embed", *table.sizes.depth)}[kind]
    changed = table.resize(config, {axis: times * old[axis] for axis in axes})
    listed = table.compatible.kinds
    return changed | ({listed: None} if listed and kind != "width" else {})


def random_states(plan: GrowthPlan, config: dict[str, Any], seed: int = 0) -> States:
    """Random weights and moments for the model that a plan starts from."""
    g = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in table_for(config).parameters(config, frozenset(plan.recipe["heads"])).items()}
    fp32, m = ({n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2))
    return {"fp32": fp32, "exp_avg": m, "exp_avg_sq": {n: x.square() for n, x in m.items()}}


def apart(plan: GrowthPlan, states: States, expected: Mapping[str, Tensor], state: str) -> float:
    """The `gap` between what a plan makes and what is expected, names and their order included."""
    made = realised(plan, reader(states), state)
    assert list(made) == list(expected)
    limits = {n: elementary(expected[n], *(states[state][s] for s in p.sources)) for n, p in plan.tensors.items()}
    return max(gap(made[n], expected[n], limits[n]) for n in expected)


def grown_states(plan: GrowthPlan, states: States) -> States:
    return {state: realised(plan, reader(states), state) for state in states}


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("kind,operator", [g for g in GROWTHS if g[1] not in FITTED])
def test_growing_and_shrinking_changes_nothing(name: str, kind: str, operator: str) -> None:
    small = tiny.config_of(name)
    try:
        plan = plan_growth(small, larger(small, kind), seed=1, **{kind: operator})
    except UnsupportedGrowth as refused:
        assert f"--{kind} {operator}" in str(refused)
        return
    if (kind, operator) == ("width", "random"):
        with pytest.raises(UnsupportedGrowth, match=r"does not come back.*shrink by a growth that copies"):
            inverse(plan, small)
        return
    back, states = inverse(plan, small), random_states(plan, small)
    kept = STATES if plan.exactness.moments == () else STATES[:1]
    large = grown_states(plan, {state: states[state] for state in kept})
    for state in kept:
        assert apart(back, large, states[state], state) <= ROUNDING, state
    assert back.exactness.function != () and back.moments == "carried"


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("how", [{}, {"breaker": "noise:scale=20"}, {"breaker": "uneven"}, {"moments": "asymmetric"}])
def test_unequal_numbers_of_copies_come_back(name: str, how: dict[str, Any]) -> None:
    """Widths that are no multiples, also where copies differ; the second moment is never too small."""
    small = tiny.config_of(name)
    table = table_for(small)
    old = table.axis_sizes(small)
    units = [a for a in table.sizes.units if a not in ("heads", "kv", "group")]
    sizes = {a: 2 * old[a] + (a == "ffn") for a in units}
    plan = plan_growth(small, table.resize(small, sizes | {"embed": 2 * old["embed"]}), width="net2net", seed=2, **how)
    back, states = inverse(plan, small), random_states(plan, small)
    large = grown_states(plan, states)
    assert apart(back, large, states["fp32"], "fp32") <= ROUNDING
    if "moments" not in how:
        assert apart(back, large, states["exp_avg"], "exp_avg") <= ROUNDING
        second = realised(back, reader(large), "exp_avg_sq")
        assert all((second[n] >= states["exp_avg_sq"][n] * (1 - SPARE * unit(torch.float64))).all() for n in second)
    assert_slices(back, large["fp32"])


def test_noise_of_training_cancels_as_the_maps_say() -> None:
    """Not only exact copies: written features are averaged by share, read ones summed, blocks off the diagonal too."""
    small = tiny.config_of("gpt2")
    for width in ("tile", "staged"):
        plan = plan_growth(small, larger(small, "width"), width=width)
        g = torch.Generator().manual_seed(4)
        large = {n: torch.randn(t.shape, generator=g, dtype=torch.float64) for n, t in plan.tensors.items()}
        made = realised(inverse(plan, small), reader({"fp32": large}))
        name = "transformer.h.1.mlp.c_fc.weight"  # normed -> ffn
        w = large[name]
        assert gap(made[name], 0.5 * (w[:8, :12] + w[8:, :12] + w[:8, 12:] + w[8:, 12:])) <= ROUNDING


@pytest.mark.parametrize("name", families())
def test_decoalesce_keeps_the_function(name: str) -> None:
    config = tiny.config_of(name)
    grown = grow(name, {"embed": 2 * table_for(config).axis_sizes(config)["embed"]}, width="decoalesce")
    assert_same_logits(grown)
    assert_gradient_rule(grown)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("order", ["interleave", "stack"])
def test_coalesce_undoes_decoalesce(name: str, order: str) -> None:
    """Bit for bit, moments too, except for the rounding of T5's √2."""
    small = tiny.config_of(name)
    large = larger(small)
    up = plan_growth(small, large, width="decoalesce", depth=f"decoalesce:order={order}")
    down = plan_growth(large, small, width="coalesce", depth=f"coalesce:order={order}")
    states = random_states(up, small)
    grown = grown_states(up, states)
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        assert apart(down, grown, states[state], state) <= (ROUNDING if name.startswith("t5") else 0.0)
    assert_slices(down, grown["fp32"])
    assert down.config == small and down.aliases == up_aliases(small, up)
    assert then(up, down).leaves == 1


def up_aliases(config: dict[str, Any], plan: GrowthPlan) -> dict[str, str]:
    return table_for(config).aliases(config, frozenset(plan.recipe["heads"]))


# What the published matrices do, independently of maps and tables: name end -> axes, ~ where read
_BERT = {
    "word_embeddings.weight": ("vocab", "embed"), "position_embeddings.weight": ("pos", "embed"),
    "token_type_embeddings.weight": ("types", "embed"), "query.weight": ("heads", "~embed"),
    "key.weight": ("heads", "~embed"), "value.weight": ("heads", "~embed"), "query.bias": ("heads",),
    "key.bias": ("heads",), "value.bias": ("heads",), "attention.output.dense.weight": ("embed", "~heads"),
    "intermediate.dense.weight": ("ffn", "~embed"), "intermediate.dense.bias": ("ffn",),
    "output.dense.weight": ("embed", "~ffn"), "transform.dense.weight": ("embed", "~embed"),
    "pooler.dense.weight": ("embed", "~embed"), "seq_relationship.weight": ("classes", "~embed"),
    "seq_relationship.bias": ("classes",), "predictions.bias": ("vocab",), "weight": ("embed",), "bias": ("embed",),
}  # fmt: skip
_GPT2 = {
    "wte.weight": ("vocab", "embed"), "wpe.weight": ("pos", "embed"), "c_attn.weight": ("~embed", "3heads"),
    "c_attn.bias": ("3heads",), "attn.c_proj.weight": ("~heads", "embed"), "c_fc.weight": ("~embed", "ffn"),
    "c_fc.bias": ("ffn",), "mlp.c_proj.weight": ("~ffn", "embed"), "weight": ("embed",), "bias": ("embed",),
}  # fmt: skip


@pytest.mark.parametrize("family,ends", [("bert", _BERT), ("gpt2", _GPT2)])
@pytest.mark.parametrize("order", ["interleave", "stack"])
def test_coalesce_is_the_published_averaging(family: str, ends: dict[str, tuple[str, ...]], order: str) -> None:
    """F averages the written units i and i + n/2, its row-normalised transpose sums the read ones, R averages layers.

    The norm before a tied head differs by choice: it feeds the head, so its halves are summed, where the paper averages
    them and doubles the embeddings; both give the same logits except for what the doubled embeddings do to the layers.
    """
    small = tiny.config_of(family, **({"num_hidden_layers": 2} if family == "bert" else {"n_layer": 2}))
    plan = plan_growth(larger(small), small, width="coalesce", depth=f"coalesce:order={order}")
    g = torch.Generator().manual_seed(3)
    shapes = table_for(small).parameters(larger(small), frozenset(plan.recipe["heads"]))
    large = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in shapes.items()}
    made = realised(plan, reader({"fp32": large}))
    before_head = ("transform.LayerNorm.weight", "transform.LayerNorm.bias", "ln_f.weight", "ln_f.bias")
    sizes = {"embed": 8, "heads": 8, "ffn": 12, "vocab": 29, "pos": 10, "types": 2, "classes": 2}

    def f(axis: str) -> Tensor:
        n = sizes[axis.strip("~3")]
        if axis in ("vocab", "pos", "types", "classes"):
            return torch.eye(n, dtype=torch.float64)
        half = 0.5 * torch.cat([torch.eye(n), torch.eye(n)], 1).double()
        if axis.startswith("3"):
            return torch.block_diag(half, half, half)
        return 2 * half if axis.startswith("~") else half

    kind = "encoder.layer." if family == "bert" else "transformer.h."
    for name, value in made.items():
        axes = next(axes for end, axes in ends.items() if name.endswith(end))
        layers = [name]
        for i in range(2):
            if f"{kind}{i}." in name:
                pair = (2 * i, 2 * i + 1) if order == "interleave" else (i, i + 2)
                layers = [name.replace(f"{kind}{i}.", f"{kind}{k}.") for k in pair]
        expected = torch.stack([large[n] for n in layers]).mean(0)
        for dim, axis in enumerate(axes):
            expected = torch.tensordot(f(axis), expected.movedim(dim, 0), 1).movedim(0, dim)
        if name.endswith(before_head):
            expected = 2 * expected
        assert gap(value, expected) <= ROUNDING, name


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_share_undoes_unshare(name: str, gradient: str) -> None:
    small = tiny.config_of(name)
    large = larger(small, "depth", 3)
    up = plan_growth(small, large, depth=f"unshare:gradient={gradient}")
    down = plan_growth(large, small, depth=f"share:gradient={gradient}")
    states = random_states(up, small)
    grown = grown_states(up, states)
    for state in STATES:
        assert apart(down, grown, states[state], state) <= ROUNDING
    assert set(down.recipe["layers"]["layers"]) == {"0+3+6", "1+4+7", "2+5+8"}
    layer = next(n for n in down.tensors if n.count(".1."))
    assert len(down.tensors[layer].terms) == 3 and down.moments == "carried"


@pytest.mark.parametrize("name,times", [("llama", 1.5), ("gpt2", 1.5)])
def test_shrinking_takes_back_epsilon(name: str, times: float) -> None:
    small = tiny.config_of(name)
    table = table_for(small)
    key, old = table.norms.eps[0], table.axis_sizes(small)
    target = table.resize(small, {a: round(times * old[a]) for a in ("embed", "ffn")}
                          | {a: old[a] for a in table.sizes.units if a != "ffn"} if name == "llama" else
                          {a: round(times * old[a]) for a in ("embed", "heads", "ffn")})  # fmt: skip
    up = plan_growth(small, target, width="lemon")
    assert up.config[key] != small[key]
    down = plan_growth(up.config, small, width="shrink:of=lemon")
    states = random_states(up, small)
    assert apart(down, grown_states(up, states), states["fp32"], "fp32") <= ROUNDING and down.config == small
    with pytest.raises(UnsupportedGrowth, match=f"{key} is .*set {key} to .* in the target config"):
        plan_growth(up.config | {key: 0.5}, small, width="shrink:of=lemon")


def test_a_shrinking_plan_is_rebuilt_from_its_recipe() -> None:
    small = tiny.config_of("bert")
    large = larger(small)
    plan = plan_growth(large, small, width="shrink:of=fpi:choice=random", depth="shrink", seed=3)
    how = {key: plan.recipe[key] for key in ("width", "depth", "seed", "moments")}
    again = plan_growth(large, small, breaker=plan.recipe["break_symmetry"], **how)
    direct = shrunk(large, small, Choices.of_recipe(plan.recipe), frozenset(plan.recipe["heads"]), optimizer=True)
    assert again.digest() == plan.digest() == direct.digest()
    assert plan.recipe["axes"]["embed"] == [16, 8] and plan.recipe["layers"]["layers"] == ["0+3", "1+4", "2+5"]
    assert plan.digest() != plan_growth(large, small, **how | {"seed": 4}).digest()
    fresh = plan_growth(large, small, width="coalesce", depth="coalesce", moments="reset")
    assert fresh.moments == "reset" and all(t.reset for t in fresh.tensors.values())
    same = plan_growth(small, small, width="coalesce", depth="coalesce")
    assert same.exactness.function == () and same.moments == "exact"


def test_what_does_not_come_back() -> None:
    small = tiny.config_of("bert")
    large = larger(small)
    plan = plan_growth(small, large)
    name = "bert.encoder.layer.2.output.dense.weight"
    mixed = replace(plan, tensors=plan.tensors | {name: replace(plan.tensors[name], sums=True)})
    with pytest.raises(UnsupportedGrowth, match=f"{name} mixes or reshapes.*shrink by a growth that copies"):
        inverse(mixed, small)
    with pytest.raises(UnsupportedGrowth, match="undone step by step"):
        inverse(then(plan, plan_growth(large, large)), small)


@pytest.mark.parametrize(
    "how,text",
    [
        ({"width": "coalesce"}, r"--depth stack: num_hidden_layers would change from 6 to 3.*--depth coalesce"),
        ({"depth": "coalesce"}, r"--width fpi: hidden_size would change from 16 to 8.*--width coalesce"),
        ({"width": "coalesce", "depth": "coalesce", "breaker": "noise"}, "no copies"),
        ({"width": "coalesce", "depth": "coalesce", "moments": "asymmetric"}, "--moments asymmetric.*--moments reset"),
        ({"width": "shrink:of=coalesce", "depth": "shrink"}, "coalesce is not a growth"),
        ({"width": "shrink:of=tiles", "depth": "shrink"}, "'tiles'.*did you mean 'tile'"),
        ({"width": "shrink:of=gesmundo", "depth": "shrink"}, "inverts the growth --width gesmundo.*not possible"),
        ({}, "use|or --width coalesce --depth coalesce"),
    ],
)
def test_shrinking_refuses(how: dict[str, Any], text: str) -> None:
    small = tiny.config_of("bert")
    with pytest.raises(UnsupportedGrowth, match=f"(?s){text}"):
        plan_growth(larger(small), small, **how)


def test_shrinking_does_not_grow() -> None:
    small = tiny.config_of("bert")
    with pytest.raises(UnsupportedGrowth, match=r"intermediate_size=30 is larger than the source's 24.*shrink first"):
        plan_growth(larger(small), small | {"intermediate_size": 30}, width="coalesce", depth="coalesce")


@pytest.fixture(params=["bert", "gpt2", "t5", "qwen3_moe"])
def cycle(request: pytest.FixtureRequest) -> tuple[GrowthPlan, GrowthPlan, list[States]]:
    """A large model as it is, a small one decoalesced into its size, and their states."""
    small = tiny.config_of(request.param)
    large = larger(small)
    a, b = plan_growth(large, large), plan_growth(small, large, width="decoalesce", depth="decoalesce")
    return a, b, [random_states(a, large, 1), random_states(b, small, 2)]


def test_interpolation(cycle: tuple[GrowthPlan, GrowthPlan, list[States]]) -> None:
    a, b, states = cycle
    reads = [reader(s) for s in states]
    moments = states[0]["exp_avg"], realised(b, reads[1], "exp_avg")
    for state in STATES:
        first, second = realised(a, reads[0], state), realised(b, reads[1], state)
        for alpha, expected in ((0.0, first), (1.0, second)):
            made = realised(interpolate(a, b, alpha), reads, state)
            assert all(torch.equal(made[n], expected[n]) for n in expected)
        for alpha in (0.25, 0.5):
            plan = interpolate(a, b, alpha)
            made = realised(plan, reads, state)
            for n, value in made.items():
                expected = (1 - alpha) * first[n] + alpha * second[n]
                assert gap(value, expected) <= ROUNDING, n
                if state == "exp_avg_sq":
                    m = (1 - alpha) * moments[0][n] + alpha * moments[1][n]
                    assert (value >= m.square() * (1 - SPARE * unit(torch.float64))).all(), n
            rows = values(plan, reads, torch.float64)
            name = next(iter(plan.tensors))
            assert torch.equal(rows(name, state, 1, 5), made[name][1:5])
    assert plan.leaves == 2 and plan.roots(name) == ((0, name), (1, name)) and plan.aliases == a.aliases
    swapped = realised(interpolate(b, a, 0.75), reads[::-1])
    assert all(torch.equal(swapped[n], value) for n, value in realised(interpolate(a, b, 0.25), reads).items())


def test_what_an_interpolation_keeps(cycle: tuple[GrowthPlan, GrowthPlan, list[States]]) -> None:
    a, b, _ = cycle
    assert interpolate(a, b, 0.0).exactness.function == () and interpolate(a, b, 0.0).moments == "exact"
    half = interpolate(a, b, 0.5)
    assert half.moments == "carried" and "0.5 of one model" in half.exactness.function[-1]
    assert any("stay identical" in w for w in interpolate(a, b, 1.0).warnings)
    assert not half.warnings  # one model's copies differ by the other
    digests = {interpolate(a, b, alpha).digest() for alpha in (0.0, 0.25, 0.5, 1.0)}
    assert len(digests) == 4
    with pytest.raises(InvalidConfig, match=r"alpha is 1\.5; expected"):
        interpolate(a, b, 1.5)
    with pytest.raises(UnsupportedGrowth, match=r"in the first and .* in the second model; grow both"):
        interpolate(a, replace(b, config=b.config | {"vocab_size": 40}), 0.5)
    missing = replace(b, tensors=dict(list(b.tensors.items())[1:]))
    with pytest.raises(UnsupportedGrowth, match="only one of the models has"):
        interpolate(a, missing, 0.5)
