"""Widths that keep no function: ModernBERT's centre tiling, SPARKLING's scales and moments, MSG's layout."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Gather
from bert2bert.algebra.plan import TensorPlan
from bert2bert.algebra.realise import realise
from bert2bert.errors import UnsupportedGrowth
from bert2bert.operators.builder import Builder
from bert2bert.operators.decisions import Layer, Pair
from bert2bert.operators.width_scaled import sparkling
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import Grown, assert_same_logits, assert_slices, grow, reader, realised
from tests.planning import plan_growth
from tests.rounding import WRONG

TOKENS = ("vocab", "pos", "types", "buckets")


def wider(name: str, times: float, **how: Any) -> Grown:
    """The width and the units grown by a factor, rounded up; a single key-value head stays one below 2."""
    table, config = table_for(tiny.config_of(name)), tiny.config_of(name)
    sizes = table.axis_sizes(config)
    grown = [a for a in ("embed", *table.sizes.units) if a != "group"]
    return grow(name, {a: ceil(times * sizes[a]) if sizes[a] > 1 or times == 2 else 1 for a in grown}, **how)


def corners(plan: TensorPlan, sizes: dict[str, int], large: dict[str, int]) -> list[torch.Tensor]:
    """Per dim, the target positions that are old features of every axis, in the source's order."""
    found = []
    for dim in axes.parse(plan.spec):
        start, parts = 0, []
        for product in dim:
            shape = [large[a.axis] for a in product]
            grid = torch.arange(int(np.prod(shape))).view(shape)
            parts.append(start + grid[tuple(slice(0, sizes[a.axis]) for a in product)].reshape(-1))
            start += int(np.prod(shape))
        found.append(torch.cat(parts))
    return found


# ---- centre ----


def tiled(n: int, target: int) -> list[int]:
    """As the authors fill an axis: the source in the middle, then outwards on both sides, round and round."""
    offset = (target - n) // 2
    out = [-1] * target
    out[offset : offset + n] = range(n)
    for i in range(offset):
        out[offset - 1 - i] = n - 1 - i % n
    for i in range(offset + n, target):
        out[i] = (i - offset) % n
    return out


def test_centre_is_tiling_from_the_middle_at_modernbert_large() -> None:
    keys = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    base, large = (
        tiny.config_of("modernbert", global_attn_every_n_layers=3, **dict(zip(keys, sizes, strict=True)))
        for sizes in ((768, 12, 1152, 22), (1024, 16, 2624, 28))
    )
    plan = plan_growth(base, large, width="centre", depth="gopher")
    assert tiled(3, 8) == [1, 2, 0, 1, 2, 0, 1, 2]
    hidden, inner = tiled(768, 1024), tiled(1152, 2624)
    wqkv, wi = (plan.tensors[f"model.layers.27.{n}.weight"].terms[0] for n in ("attn.Wqkv", "mlp.Wi"))
    assert wqkv.source == "model.layers.21.attn.Wqkv.weight" and wi.source == "model.layers.21.mlp.Wi.weight"
    assert wqkv.dims[0].index.tolist() == [part * 768 + i for part in range(3) for i in hidden]
    assert wi.dims[0].index.tolist() == [part * 1152 + i for part in range(2) for i in inner]
    assert wqkv.dims[1].index.tolist() == wi.dims[1].index.tolist() == hidden
    assert plan.recipe["layers"]["layers"] == [str(round(i * 22 / 28)) for i in range(28)]


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("times", [1.5, 2, 3.5])
def test_centre_copies_values_and_moments_as_they_are(name: str, times: float) -> None:
    grown = wider(name, times, width="centre")
    plan, table = grown.plan, table_for(grown.config)
    small, large = table.axis_sizes(grown.config), table.axis_sizes(plan.config)
    assert plan.moments == "carried" and grown.drift() > WRONG
    assert any("not divided by their number" in r for r in plan.exactness.function)
    assert any("stay identical for ever" in w for w in plan.warnings)
    read = reader(dict.fromkeys(("exp_avg", "exp_avg_sq"), grown.weights))
    states = [grown.state, realised(plan, read, "exp_avg"), realised(plan, read, "exp_avg_sq")]
    for n, tensor in plan.tensors.items():
        expected = grown.weights[n]
        for d, dim in enumerate(axes.parse(tensor.spec)):
            index, start = [], 0
            for product in dim:
                grid = np.arange(int(np.prod([small[a.axis] for a in product]))).reshape(
                    [small[a.axis] for a in product]
                )
                for i, a in enumerate(product):
                    grid = grid.take(tiled(small[a.axis], large[a.axis]), axis=i)
                index.append(start + grid.reshape(-1))
                start += int(np.prod([small[a.axis] for a in product]))
            expected = expected.index_select(d, torch.from_numpy(np.concatenate(index)))
        assert all(torch.equal(x[n], expected) for x in states), n
    assert_slices(plan, grown.weights)


# ---- SPARKLING ----


def realistic(name: str, times: float) -> Pair:
    """Two models of a realistic width: 256 features, 512 neurons, heads of 32."""
    keys = {
        "hidden_size": 256, "n_embd": 256, "d_model": 256, "num_attention_heads": 8, "n_head": 8, "num_heads": 8,
        "d_kv": 32, "head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 512, "n_inner": 512, "d_ff": 512,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_local_experts": 2, "num_experts": 2,
    }  # fmt: skip
    small = tiny.config_of(name, **{k: v for k, v in keys.items() if k in tiny.VARIANTS[name].base})
    table = table_for(small)
    large = table.resize(small, {"embed": round(256 * times)})
    return Pair(table, small, large, table.axis_sizes(small), table.axis_sizes(large), 7)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("times,how", [(1.5, {}), (2.5, {"choice": "random"}), (1.5, {"fresh": "random"})])
def test_sparkling_keeps_the_size_of_activations(name: str, times: float, how: dict[str, Any]) -> None:
    """Every linear map of a layer and of the head, with weights drawn as at the start of training, on inputs with
    independent features, in expectation."""
    pair = realistic(name, times)
    table = pair.table
    heads = next(iter(table.names.classes.values()))
    originals = table.parameters(pair.source, heads)
    width = sparkling(pair, **how)
    layers = {axis: [Layer(i) for i in range(pair.small[axis])] for axis in table.sizes.depth}
    build = Builder(pair, width, layers, originals)
    g = torch.Generator().manual_seed(0)
    checked = 0
    for n, p in table.parameters(pair.target, heads).items():
        spec = axes.parse(p.spec)
        reads = [d for d, dim in enumerate(spec) if all(a.reads for product in dim for a in product)]
        if len(p.shape) < 2 or not reads or p.layer not in (None, 1) or spec[reads[0]][0][0].axis in TOKENS:
            continue
        tensor, read = build.tensor(p), build.gathers(p, p.layer)[reads[0]]
        shape, std = originals[p.at(p.layer)].shape, table.std(p.pattern, pair.target)
        before = after = 0.0
        for draw in range(1 + 2**17 // int(np.prod(shape))):
            old = std * torch.randn(shape, generator=g, dtype=torch.float64)
            new = realise(
                replace(tensor, seed=draw), "fp32", lambda _, state, start, stop, x=old: x[start:stop], torch.float64
            )
            before += float(old.square().mean())
            after += float(heard(new, read, reads[0]).square().sum() / new.numel() * len(read) / shape[reads[0]])
        assert abs(sqrt(after / before) - 1) < 0.01, (n, sqrt(after / before))
        checked += 1
    assert checked >= 4


def heard(weight: torch.Tensor, read: Gather, dim: int) -> torch.Tensor:
    """The weight by independent inputs: what reads copies of one is added up, what reads a fresh one stands alone."""
    index = torch.from_numpy(np.where(read.index < 0, read.source + np.arange(len(read)), read.index))
    shape = list(weight.shape)
    shape[dim] = read.source + len(read)
    return torch.zeros(shape, dtype=weight.dtype).index_add(dim, index, weight)


@pytest.mark.parametrize("times,scale", [(1.5, 1 / sqrt(1 + 3 * 0.5)), (2, 0.5), (3, 1 / 3), (1.25, 1 / sqrt(1.75))])
def test_sparkling_scales_are_the_papers(times: float, scale: float) -> None:
    pair = realistic("llama", times)
    embed = sparkling(pair).maps["embed"]
    assert isinstance(embed, Gather) and embed.gain is None and embed.share == pytest.approx(scale)
    drawn = sparkling(pair, fresh="random")
    embed = drawn.maps["embed"]
    assert isinstance(embed, Gather) and embed.share == pytest.approx(sqrt(1 / times))
    assert drawn.fresh.std["~normed"] == drawn.fresh.std["~embed"] == sqrt(1 / times)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "modernbert", "t5"])
@pytest.mark.parametrize("fresh", ["copies", "random"])
def test_sparkling_keeps_the_size_of_a_tied_heads_logits(name: str, fresh: str) -> None:
    """There the last norm's gain is scaled, for the embedding is read as it is written."""
    pair = realistic(name, 1.5)
    heads = next(iter(pair.table.names.classes.values()))
    originals = pair.table.parameters(pair.source, heads)
    width = sparkling(pair, fresh=fresh)
    build = Builder(pair, width, {axis: [Layer(0)] for axis in pair.table.sizes.depth}, originals)
    targets = pair.table.parameters(pair.target, heads)
    (gain,) = (p for p in targets.values() if "~embed)" in p.spec and p.name.endswith("weight"))
    words = next(p for p in targets.values() if p.spec == "vocab -> embed")
    g, before, after = torch.Generator().manual_seed(0), 0.0, 0.0
    for draw in range(40):
        table = pair.table.std(words.pattern, pair.target) * torch.randn(originals[words.name].shape, generator=g)
        one = torch.ones(originals[gain.name].shape, dtype=torch.float64)
        made = [
            realise(
                replace(build.tensor(p), seed=draw),
                "fp32",
                lambda _, state, start, stop, x=x: x[start:stop].double(),
                torch.float64,
            )
            for p, x in ((words, table), (gain, one))
        ]
        if "sigma" in gain.spec:  # the root of the width, by which T5 divides
            made[1] /= sqrt(pair.large["embed"] / pair.small["embed"])
        before += float(table.square().sum())
        after += float(heard(made[0] * made[1], build.map("embed", None), 1).square().sum())
    assert abs(sqrt(after / before) - 1) < 0.01


@pytest.mark.parametrize("name", families())
def test_sparkling_keeps_the_function_where_copies_are_even(name: str) -> None:
    assert_same_logits(wider(name, 2, width="sparkling"))
    reasons = wider(name, 1.5, width="sparkling").plan.exactness.function
    assert any("keeps the size of activations on embed" in r for r in reasons)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("fresh,times", [("copies", 2), ("copies", 1.5), ("random", 2)])
def test_sparkling_keeps_old_moments_and_zeroes_the_fresh(name: str, fresh: str, times: float) -> None:
    grown = wider(name, times, width=f"sparkling:fresh={fresh}")
    plan, table = grown.plan, table_for(grown.config)
    small, large = table.axis_sizes(grown.config), table.axis_sizes(plan.config)
    assert plan.moments == "asymmetric"
    assert bool(plan.exactness.function) == (grown.drift() > WRONG) == ((fresh, times) != ("copies", 2))
    for state in ("exp_avg", "exp_avg_sq"):
        made = realised(plan, reader({state: grown.weights}), state)
        for n, tensor in plan.tensors.items():
            where = torch.meshgrid(*corners(tensor, small, large), indexing="ij")
            assert torch.equal(made[n][where], grown.weights[n]), (n, state)
            made[n][where] = 0
            assert not made[n].any(), (n, state)
    assert any("moments of old entries are kept as they were" in r for r in plan.exactness.moments)
    assert any("1.3 times the current one within 250 steps" in note for note in plan.notes)
    assert any("3.16x" in w for w in plan.warnings) and not any("identical for ever" in w for w in plan.warnings)
    assert_slices(plan, grown.weights)


def test_sparkling_with_carried_moments_keeps_none_apart() -> None:
    plan = wider("llama", 1.5, width="sparkling", moments="carried").plan
    assert plan.moments == "carried" and not any(m is not None for t in plan.tensors.values() for m in t.fresh)
    assert any("a heuristic" in r for r in plan.exactness.moments)
    assert any("identical for ever" in w for w in plan.warnings)


# ---- MSG ----


@pytest.mark.parametrize("name", families())
def test_msg_is_the_source_in_a_corner_of_fresh_values(name: str) -> None:
    grown = wider(name, 2, width="msg")
    plan, table = grown.plan, table_for(grown.config)
    small, large = table.axis_sizes(grown.config), table.axis_sizes(plan.config)
    assert plan.moments == "asymmetric" and grown.drift() > WRONG
    (reason,) = plan.exactness.function
    assert "masks" in reason and ("--width lemon" in reason) == table.norms.pre
    drawn = []
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        made = realised(plan, reader({state: grown.weights}), state)
        for n, tensor in plan.tensors.items():
            assert not tensor.reset
            where = torch.meshgrid(*corners(tensor, small, large), indexing="ij")
            if "sigma" not in tensor.spec:  # T5 divides by the root of the width after it
                assert torch.equal(made[n][where], grown.weights[n]), (n, state)
            rest = torch.ones(made[n].shape, dtype=torch.bool)
            rest[where] = False
            fresh = made[n][rest]
            if state != "fp32" or n.endswith("bias"):
                assert not fresh.any(), (n, state)
            elif fresh.ndim and len(tensor.shape) == 1:
                assert (fresh == 1).all(), n
            else:
                drawn.append(fresh)
    assert 0.019 < torch.cat(drawn).std() < 0.021
    assert any("3.16x" in w for w in plan.warnings)
    assert_slices(plan, grown.weights)


@pytest.mark.parametrize("width", ["centre", "sparkling", "msg"])
def test_what_none_of_them_can(width: str) -> None:
    small = tiny.bert_config()
    with pytest.raises(UnsupportedGrowth, match=r"head size would change from 4 to 8"):
        plan_growth(small, tiny.bert_config(hidden=16, heads=2), width=width)
    with pytest.raises(UnsupportedGrowth, match=rf"{width} makes no even copies"):
        plan_growth(small, tiny.bert_config(16, 4), width=width, breaker="noise")
    nothing = plan_growth(small, small, width=width)
    assert nothing.exactness.function == nothing.exactness.moments == nothing.warnings == nothing.notes == ()
    assert not any(t.fill for t in nothing.tensors.values())
