"""Depth operators: index lists as published, refusals that say what works, and layers that change nothing at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.operators.registry import OPERATORS
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import Grown, assert_slices, gradients, grow, reader, realised
from tests.planning import plan_growth
from tests.rounding import WRONG, allowed, largest

FAMILIES = sorted(tiny.VARIANTS)
PRENORM = [n for n in FAMILIES if table_for(tiny.config_of(n)).norms.pre]


def deepened(name: str, layers: int, decoder: int = 2, keys: dict[str, Any] | None = None, **how: Any) -> Grown:
    """A variant grown in depth; every list of the layers' kinds is made again, all alike where the source's are."""
    config = tiny.config_of(name, **(keys or {}))
    sizes = {"layers": layers} | ({"decoder_layers": decoder} if "t5" in name else {})
    if kinds := config.get("layer_types"):
        pattern = [kinds[i % len(kinds)] for i in range(layers)] if len(set(kinds)) == 1 else None
        how["target"] = {"layer_types": pattern} | how.get("target", {})
    return grow(name, sizes, keys=keys, **how)


def rows(plan: GrowthPlan, axis: str = "layers") -> str:
    return " ".join(plan.recipe["layers"][axis])


def bert_layers(source: int, target: int, depth: str) -> str:
    small, large = (tiny.bert_config(layers=n) for n in (source, target))
    return rows(plan_growth(small, large, depth=depth))


LISTS = [
    ("stack", 5, 12, "0 1 2 3 4 0 1 2 3 4 3 4"),
    ("gstack", 3, 9, "0 1 2 0 1 2 0 1 2"),
    ("gstack:g=4", 2, 8, "0 1 0 1 0 1 0 1"),
    ("gstack:g=1", 3, 3, "0 1 2"),
    ("interleave", 3, 6, "0 0 1 1 2 2"),
    ("interleave", 2, 6, "0 0 0 1 1 1"),
    ("interpolate", 3, 6, "0 0 1 1 2 2"),
    ("interpolate", 3, 5, "0 0 1 1 2"),
    ("interpolate", 6, 8, "0 0 1 2 3 3 4 5"),
    ("gopher", 22, 28, "0 1 2 2 3 4 5 6 6 7 8 9 9 10 11 12 13 13 14 15 16 16 17 18 19 20 20 21"),
    ("gopher", 3, 6, "0 0 1 2 2 2"),
    ("gopher", 3, 9, "0 0 1 1 1 2 2 2 2"),
    ("upscale", 32, 48, " ".join(map(str, [*range(24), *range(8, 32)]))),
    ("upscale:m=8", 32, 48, " ".join(map(str, [*range(24), *range(8, 32)]))),
    ("upscale:m=1", 4, 6, "0 1 2 1 2 3"),
    ("upscale", 3, 6, "0 1 2 0 1 2"),
    ("upscale:m=1", 2, 2, "0 1"),
    ("upscale", 3, 3, "0 1 2"),
    ("top", 4, 6, "0 1 2 3 2 3"),
    ("top", 3, 6, "0 1 2 0 1 2"),
    ("middle", 6, 8, "0 1 2 3 2 3 4 5"),
    ("middle", 4, 6, "0 1 0 1 2 3"),
    ("middle", 3, 5, "0 1 1 1 2"),
    ("middle", 4, 8, "0 1 2 3 0 1 2 3"),
    ("middle:block=2", 6, 10, "0 1 2 3 2 3 2 3 4 5"),
    ("middle:block=1", 6, 8, "0 1 2 2 2 3 4 5"),
    ("middle:centre=layer", 4, 6, "0 1 2 1 2 3"),
    ("middle:block=2,centre=layer", 5, 9, "0 1 2 1 2 1 2 3 4"),
    ("insert_identity", 8, 10, "0 1 2 3 3+0 4 5 6 7 7+0"),
    ("insert_identity", 3, 5, "0 1 1+0 2 2+0"),
    ("insert_identity", 2, 5, "0 0+0 1 1+0 1+0"),
    ("insert_identity:place=top", 4, 6, "0 1 2 2+0 3 3+0"),
    ("insert_identity:place=top", 2, 5, "0 0+0 1 1+0 1+0"),
    ("random", 2, 4, "0 1 new new"),
    ("unshare", 2, 6, "0 1 0 1 0 1"),
]


@pytest.mark.parametrize("depth,source,target,expected", LISTS)
def test_layers(depth: str, source: int, target: int, expected: str) -> None:
    assert bert_layers(source, target, depth) == expected


def test_every_depth_operator_is_listed_and_leaves_an_unchanged_depth_alone() -> None:
    here = {n for n, o in OPERATORS["depth"].items() if o.make.__module__.endswith((".depth", ".depth_unshare"))}
    assert {text.partition(":")[0] for text, *_ in LISTS} == here - {"share"}
    for name in here:
        assert bert_layers(3, 3, name) == "0 1 2"


REFUSALS = [
    ("gstack", 3, 8, "num_hidden_layers=8.*the source has 3; it makes whole copies: 6 or 9 layers"),
    ("gstack:g=2", 3, 9, "gstack:g=2.*makes 6 layers"),
    ("gstack:g=2", 3, 3, "makes 6 layers"),
    ("interleave", 3, 4, "3 or 6 layers"),
    ("upscale", 3, 5, "an even number of layers from 4 to 6"),
    ("upscale", 3, 8, "an even number of layers from 4 to 6"),
    ("upscale:m=1", 4, 8, "upscale:m=1.*makes 6 layers"),
    ("upscale:m=3", 4, 6, "an even number of layers from 4 to 8"),
    ("upscale:m=9", 4, 6, "an even number of layers from 4 to 8"),
    ("upscale:m=1", 4, 4, "makes 6 layers"),
    ("top", 3, 7, "at most 6 layers in one growth"),
    ("middle:block=2", 3, 5, r"middle:block=2: .*whole blocks: for this number of layers, block=1\."),
    ("middle:block=4", 6, 9, r"block=1 \| 3\."),
    ("middle:block=2,centre=layer", 5, 8, r"block=2,centre=layer: .*block=1 \| 3\."),
    ("middle:block=9", 4, 22, r"block=1 \| 2\."),
    ("unshare", 3, 7, "whole times: 6 or 9"),
]


@pytest.mark.parametrize("depth,source,target,text", REFUSALS)
def test_refusals_say_which_numbers_work(depth: str, source: int, target: int, text: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=text) as refused:
        bert_layers(source, target, depth)
    assert "insert_identity, which make any" in str(refused.value)


def test_options_are_checked() -> None:
    for text, expected in (("gstack:g=0", "positive whole"), ("insert_identity:place=bottom", "known: even, top")):
        with pytest.raises(InvalidConfig, match=expected):
            bert_layers(3, 6, text)


def test_encoder_and_decoder_grow_each_by_its_own_axis() -> None:
    plan = deepened("t5", 6, 4, depth="interleave").plan
    assert rows(plan) == "0 0 1 1 2 2" and rows(plan, "decoder_layers") == "0 0 1 1"
    assert [r for r in plan.exactness.function if r.startswith("decoder_layers 2 -> 4")]
    for depth in ("gstack:g=2", "upscale"):  # the decoder keeps its layers
        plan = deepened("t5", 6, 2, depth=depth).plan
        assert rows(plan) == "0 1 2 0 1 2" and rows(plan, "decoder_layers") == "0 1"
        assert not [r for r in plan.exactness.function if "decoder_layers" in r]
    with pytest.raises(UnsupportedGrowth, match="num_decoder_layers=3"):
        deepened("t5", 6, 3, depth="gstack")


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("depth", ["gstack", "interleave", "interpolate", "gopher", "upscale", "top", "middle"])
def test_copied_layers_are_copies_with_their_moments(name: str, depth: str) -> None:
    grown = deepened(name, 6, 4, depth=depth)
    assert grown.plan.moments == "carried" and grown.plan.exactness.function and not grown.plan.exactness.lossy
    assert grown.drift() > WRONG
    table = table_for(grown.config)
    parameters = table.parameters(grown.plan.config, frozenset(grown.plan.recipe["heads"]))
    read = reader({"exp_avg": grown.weights, "exp_avg_sq": grown.weights})
    m, v = realised(grown.plan, read, "exp_avg"), realised(grown.plan, read, "exp_avg_sq")
    for n, p in parameters.items():
        layer = None if p.layer is None else int(grown.plan.recipe["layers"][p.depth][p.layer])
        if p.at(layer) in grown.weights:
            for found in (grown.state[n], m[n], v[n]):
                assert torch.equal(found, grown.weights[p.at(layer)]), n
        else:  # ModernBERT's first layer has no norm before its attention
            assert name.startswith("modernbert") and "attn_norm" in n and layer == 0 and p.layer > 0
            assert torch.equal(grown.state[n], torch.full_like(grown.state[n], float(n.endswith("weight"))))
            assert any(
                "copies layer 0" in r and n.replace(f".{p.layer}.", ".{layers}.") in r
                for r in grown.plan.exactness.function
            )


@pytest.mark.parametrize("name", families(PRENORM))
@pytest.mark.parametrize("place,layers,decoder", [("even", 5, 3), ("top", 4, 4), ("even", 8, 5)])
def test_identities_change_no_bit(name: str, place: str, layers: int, decoder: int) -> None:
    target = {}
    if name.startswith("modernbert"):
        kinds = {4: "fsff", 5: "fssff", 8: "ffsssfff"}[layers]
        target = {"layer_types": [{"f": "full_attention", "s": "sliding_attention"}[k] for k in kinds]}
    grown = deepened(name, layers, decoder, depth=f"insert_identity:place={place}", target=target)
    a, b = tiny.logits(grown.source, grown.config), tiny.logits(grown.target, grown.plan.config)
    assert grown.plan.exactness.function == () and torch.equal(a, b)
    zeros = {n for n, x in grown.state.items() if not x.any() and "norm" not in n}
    fresh = {a: sum(r.endswith("+0") for r in kept) for a, kept in grown.plan.recipe["layers"].items()}
    biased = 2 if name.startswith("gpt2") or name == "modernbert-untied" else 1
    writers = 3 if name == "qwen2_moe" else 2 * biased  # Qwen2-MoE has a shared expert
    assert len(zeros) == writers * fresh["layers"] + 3 * fresh.get("decoder_layers", 0)
    if "t5" in name:
        assert any("EncDecAttention.o" in n for n in zeros)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families(PRENORM))
def test_only_the_zeroed_writers_of_an_identity_get_a_gradient(name: str) -> None:
    grown = deepened(name, 6, 4, depth="insert_identity", target={"layer_types": None} if "modern" not in name else {
        "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"] * 2})  # fmt: skip
    measured = gradients(grown.target, grown.plan.config)
    limits = allowed(lambda: gradients(grown.target, grown.plan.config), plain=measured)
    ones = {n: torch.ones_like(x) for n, x in grown.weights.items()}
    moments = realised(grown.plan, reader({"exp_avg": ones}), "exp_avg")
    writing = 0
    for n, p in table_for(grown.config).parameters(grown.plan.config, frozenset(grown.plan.recipe["heads"])).items():
        if p.layer is None or not grown.plan.recipe["layers"][p.depth][p.layer].endswith("+0"):
            assert moments[n].all(), n
            continue
        assert not moments[n].any(), n
        if grown.state[n].any():
            assert n not in measured or largest(measured[n]) <= limits[n], n
        else:
            writing += bool(measured[n].any())
    assert writing
    assert any("inserted layers start at zero" in r for r in grown.plan.exactness.moments)
    assert any("3.16x" in w for w in grown.plan.warnings)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_identities_in_post_norm_models_still_normalise(name: str) -> None:
    grown = deepened(name, 4, depth="insert_identity")
    assert any("still normalise" in reason for reason in grown.plan.exactness.function)
    assert grown.drift() > WRONG
    layer = {n: x for n, x in grown.state.items() if ".layer.3." in n}
    zeros = {n.split(".layer.3.")[1] for n, x in layer.items() if not x.any()}
    assert zeros == {f"{part}output.dense.{kind}" for part in ("attention.", "") for kind in ("weight", "bias")}
    for n, x in layer.items():  # the norms are copies, or the layer would forget what it reads
        if "LayerNorm" in n:
            assert torch.equal(x, grown.weights[n.replace(".3.", ".2.")])


def test_alternating_attention_keeps_its_pattern_only_where_the_target_says_so() -> None:
    """The default pattern of six layers of period two is f s f s f s; the source's f s f, each twice, f f s s f f."""
    grown = deepened("modernbert", 6, depth="insert_identity")
    (reason,) = grown.plan.exactness.function
    assert "attention pattern" in reason and grown.drift() > WRONG
    wanted = ["full_attention"] * 2 + ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert f"layer_types={wanted}" in reason
    assert deepened("modernbert", 6, depth="insert_identity", target={"layer_types": wanted}).drift() == 0.0
    with pytest.raises(InvalidConfig, match="layer_types lists the kinds of 3 layers"):
        grow("modernbert", {"layers": 6}, depth="insert_identity:place=top")
    stacked = deepened("modernbert", 6, depth="stack").plan.exactness.function
    assert len([r for r in stacked if "attention pattern" in r]) == 1
    assert len([r for r in stacked if "layer 3 copies layer 0, which has no" in r]) == 1


@pytest.mark.parametrize("name", families())
def test_random_layers_stand_on_the_old_ones(name: str) -> None:
    grown = deepened(name, 5, 3, depth="random")
    assert any("2 layers are drawn at random" in r for r in grown.plan.exactness.function)
    parameters = table_for(grown.config).parameters(grown.plan.config, frozenset(grown.plan.recipe["heads"]))
    fresh = {n for n, p in parameters.items() if grown.plan.recipe["layers"].get(p.depth, ["0"])[p.layer or 0] == "new"}
    assert fresh and grown.drift() > WRONG
    for n, x in grown.state.items():
        if n not in fresh:
            assert torch.equal(x, grown.weights[n])
        elif x.ndim == 1:  # gains and biases
            assert x.unique().tolist() in ([0.0], [1.0]), n
        else:
            assert 0 < x.std() < 1.5 and len(x.unique()) == x.numel(), n
        assert (n in fresh) == (not grown.plan.tensors[n].sources)
    assert any("3.16x" in w and "1x where all entries of an optimizer group are new" in w for w in grown.plan.warnings)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("depth", ["insert_identity", "random", "upscale"])
def test_width_then_depth_in_one_pass_is_the_sequence(name: str, depth: str) -> None:
    """Bit for bit, moments included."""
    config = tiny.config_of(name)
    wide = {"embed": 2 * table_for(config).axis_sizes(config)["embed"]}
    table = table_for(config)
    middle = table.resize(config, wide)
    last = table.resize(middle, {"layers": 4} | ({"decoder_layers": 4} if "t5" in name else {}))
    if "layer_types" in last:
        last["layer_types"] = None
    one = Grown(config, plan_growth(config, last, depth=depth, seed=3))
    first = Grown(config, plan_growth(config, middle, seed=3))
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        read = reader({state: first.weights})
        between = realised(first.plan, read, state)
        second = realised(plan_growth(middle, last, depth=depth, seed=3), reader({state: between}), state)
        assert second.keys() == one.plan.tensors.keys()
        together = realised(one.plan, read, state)
        assert all(torch.equal(together[n], second[n]) for n in second), state


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_asymmetric_moments_of_stacked_layers_are_zero(name: str) -> None:
    """The first copy of a layer keeps its moments, the others start at zero."""
    sizes = dict.fromkeys(table_for(tiny.config_of(name)).sizes.depth, 6)
    grown = grow(name, sizes, depth="stack", moments="asymmetric")
    ones = {n: torch.ones_like(w) for n, w in grown.weights.items()}
    moments = realised(grown.plan, reader({"exp_avg_sq": ones}), "exp_avg_sq")
    parameters = table_for(grown.config).parameters(grown.plan.config, frozenset(grown.plan.recipe["heads"]))
    old = table_for(grown.config).axis_sizes(grown.config)
    found = {(p.layer is not None and p.layer >= old[p.depth], bool(moments[n].any())) for n, p in parameters.items()}
    assert found == {(False, True), (True, False)}
    assert any("first Adam update" in warning for warning in grown.plan.warnings)
