"""Operators that only copy: tile, Net2Net, HyperCloning with its noise and head sizes, block-diagonal widths."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch

from bert2bert.algebra.states import STATES
from bert2bert.errors import UnsupportedGrowth
from bert2bert.tables import TABLES, table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import (
    Grown,
    assert_gradient_rule,
    assert_same_logits,
    assert_slices,
    gradients,
    grow,
    reader,
    realised,
)
from tests.rounding import ROUNDING, WRONG, allowed, gap

FAMILIES = sorted(tiny.VARIANTS)
ROTARY = [n for n in FAMILIES if "qk" in table_for(tiny.config_of(n)).sizes.fixed]
BLOCKED = "bert.encoder.layer.1.intermediate.dense.weight"


def sizes_of(name: str) -> dict[str, int]:
    config = tiny.config_of(name)
    return table_for(config).axis_sizes(config)


def doubled(name: str, times: int = 2) -> dict[str, int]:
    return {"embed": times * sizes_of(name)["embed"]}


def larger_heads(name: str, times: int = 2) -> dict[str, int]:
    """Sizes with as many heads, each ``times`` as large; T5's, free of the width, with a remainder."""
    sizes = sizes_of(name)
    free = table_for(tiny.config_of(name)).key("qk") != table_for(tiny.config_of(name)).key("embed")
    return {"embed": times * sizes["embed"], "heads": sizes["heads"]} | ({"qk": 3 * times - 1} if free else {})


def more_units(name: str) -> dict[str, int]:
    """Units one more each; as many heads as a Llama wants, whose width their number must divide."""
    table, sizes = table_for(tiny.config_of(name)), sizes_of(name)
    more = {a: sizes[a] + 1 for a in table.sizes.units if a != "heads" or table.key("qk") != table.key("embed")}
    if table.model_type == "llama":
        more["group"] = 12 // more["kv"] if 12 % more["kv"] == 0 else sizes["group"] + 1
        more["kv"] = 12 // more["group"]
    return more


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("width", ["tile", "hyperclone", "staged"])
@pytest.mark.parametrize("times", [2, 3])
def test_multiples_keep_logits_and_moments(name: str, width: str, times: int) -> None:
    grown = grow(name, doubled(name, times), width=width)
    assert_same_logits(grown)
    assert_gradient_rule(grown)
    assert grown.plan.moments == "exact" and any("identical for ever" in w for w in grown.plan.warnings)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("width", ["tile", "net2net", "hyperclone"])
def test_units_grow_exactly_to_any_number(name: str, width: str) -> None:
    grown = grow(name, more_units(name), width=width, seed=4)
    assert_same_logits(grown)
    assert_gradient_rule(grown)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("width", ["tile", "net2net", "hyperclone", "hyperclone:noise=3", "staged"])
def test_slices(name: str, width: str) -> None:
    grown = grow(name, doubled(name), width=width)
    assert_slices(grown.plan, grown.weights)


def test_tile_repeats_and_net2net_draws() -> None:
    old = sizes_of("gpt2")["ffn"]
    rows = {w: grow("gpt2", {"ffn": 20}, width=w).state["transformer.h.0.mlp.c_fc.bias"] for w in ("tile", "net2net")}
    assert torch.equal(rows["tile"][old:], rows["tile"][: 20 - old])
    drawn = [int((rows["net2net"][:old] == x).nonzero()[0, 0]) for x in rows["net2net"][old:]]
    assert drawn != sorted(drawn) and torch.equal(rows["net2net"][:old], rows["tile"][:old])


@pytest.mark.parametrize("name", families())
def test_unequal_counts_before_a_norm_change_the_function_and_say_so(name: str) -> None:
    """The guard: the laws above can fail."""
    grown = grow(name, doubled(name), width="net2net", seed=3)
    assert grown.plan.exactness.lossy and grown.plan.moments == "carried"
    assert grown.drift() > WRONG


def test_hyperclone_says_what_indivisible_widths_lose() -> None:
    grown = grow("bert", {"embed": 12, "heads": 3, "ffn": 18}, width="hyperclone")
    assert "1 to 2 copies" in grown.plan.exactness.lossy[0] and grown.drift() > WRONG


@pytest.mark.parametrize("name", families(set(FAMILIES) - set(ROTARY)))
@pytest.mark.parametrize("times", [2, 3])
def test_head_sizes_grow_exactly(name: str, times: int) -> None:
    """The softmax scale included, where the model has one (T5 has none)."""
    grown = grow(name, larger_heads(name, times), width="hyperclone")
    assert_same_logits(grown)
    assert_gradient_rule(grown)
    noisy = grow(name, larger_heads(name, times), width="hyperclone:noise=5")
    assert_same_logits(noisy)
    assert_slices(noisy.plan, noisy.weights)


def test_head_sizes_with_remainders_grow_exactly() -> None:
    grown = grow("bert", {"embed": 24, "heads": 4, "ffn": 25}, width="hyperclone")  # 4 -> 6 in each head
    assert table_for(grown.config).axis_sizes(grown.plan.config)["qk"] == 6
    assert_same_logits(grown)
    assert_gradient_rule(grown)


def test_the_query_takes_the_papers_factor_and_needs_it() -> None:
    grown = grow("bert", {"embed": 16, "heads": 2}, width="hyperclone")
    q, k = (f"bert.encoder.layer.0.attention.self.{part}.bias" for part in ("query", "key"))
    head = grown.weights[q][:4] * sqrt(4 / 8)
    assert gap(grown.state[q][:8], torch.cat([head, head])) <= ROUNDING
    assert torch.equal(grown.state[k][:8], grown.weights[k][:4].repeat(2))
    without = {n: x * sqrt(2) if ".query." in n else x for n, x in grown.state.items()}
    assert grown.drift_of(tiny.load(grown.plan.config, without), grown.plan.config) > WRONG


@pytest.mark.parametrize("name", families(ROTARY))
@pytest.mark.parametrize("width", ["hyperclone", "gesmundo", "direct"])
def test_rotary_head_sizes_are_refused(name: str, width: str) -> None:
    sizes = sizes_of(name)
    with pytest.raises(UnsupportedGrowth, match=r"rotary positions pair.*grow the heads"):
        grow(name, {"embed": 2 * sizes["embed"], "heads": 2} if "heads" in sizes else {"qk": 8}, width=width)


@pytest.mark.parametrize("width", ["hyperclone", "gesmundo"])
def test_head_size_under_a_softmax_scale_and_rms_norm(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama at position 0 for every token, where rotation does nothing: head sizes may grow there."""
    table = TABLES["llama"]
    monkeypatch.setitem(TABLES, "llama", replace(table, sizes=replace(table.sizes, fixed={})))
    grown = grow("llama", {"qk": 6}, width=width)
    given = tiny.inputs(grown.config)
    given["position_ids"] = torch.zeros_like(given.pop("labels"))

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(**given).logits

    limit = allowed(lambda: logits(grown.target))
    assert grown.plan.exactness.function == ()
    assert gap(logits(grown.target), logits(grown.source), limit) <= ROUNDING
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    if width == "gesmundo":  # the paper scales the keys
        assert torch.equal(grown.state[q][:4], grown.weights[q][:4])
        assert gap(grown.state[k][:4], grown.weights[k][:4] * sqrt(6 / 4)) <= ROUNDING
        assert not grown.state[k][4:6].any() and grown.state[q][4:6].all()


@pytest.mark.parametrize("width", ["hyperclone", "gesmundo", "direct"])
def test_no_head_shrinks(width: str) -> None:
    with pytest.raises(UnsupportedGrowth, match=r"cannot shrink heads\.\nSet num_attention_heads=3"):
        grow("bert", {"embed": 12, "heads": 4, "ffn": 12}, width=width)


@pytest.mark.parametrize("name", families())
def test_null_space_noise_keeps_the_logits(name: str) -> None:
    plain, noisy = (grow(name, doubled(name), width=w) for w in ("hyperclone", "hyperclone:noise=5"))
    assert_same_logits(noisy)
    differ = [n for n in plain.state if not torch.equal(plain.state[n], noisy.state[n])]
    assert len(differ) > len(plain.state) / 4
    assert noisy.plan.moments == "carried" and "noise" in noisy.plan.exactness.moments[0]
    assert not any("identical for ever" in w for w in noisy.plan.warnings)
    other = grow(name, doubled(name), width="hyperclone:noise=5", seed=2)
    assert not torch.equal(other.state[differ[0]], noisy.state[differ[0]])


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("breaker", ["noise:scale=5", "uneven"])
def test_blocks_with_a_broken_symmetry_keep_the_logits(name: str, breaker: str) -> None:
    plain, broken = (grow(name, doubled(name), width="staged", breaker=b) for b in (None, breaker))
    assert_same_logits(broken)
    assert broken.plan.moments == "carried"
    assert any(not torch.equal(plain.state[n], broken.state[n]) for n in plain.state)


def test_blocks_stand_on_the_diagonal() -> None:
    grown = grow("bert", doubled("bert"), width="staged")
    w = grown.weights[BLOCKED]
    assert torch.equal(grown.state[BLOCKED], torch.block_diag(w, w))
    norm = "cls.predictions.transform.LayerNorm.weight"
    assert torch.equal(grown.state[norm], grown.weights[norm].repeat(2) / 2)
    c_fc = "transformer.h.1.mlp.c_fc.weight"  # stored [in, out]
    grown = grow("gpt2", doubled("gpt2", 3), width="staged")
    assert torch.equal(grown.state[c_fc], torch.block_diag(*[grown.weights[c_fc]] * 3))


def test_blocks_off_the_diagonal_have_gradients_and_so_moments() -> None:
    """The authors' code leaves the off-diagonal moments at zero; the measured gradient is G / 2 in all four blocks."""
    grown = grow("bert", doubled("bert"), width="staged")
    g = gradients(grown.source, grown.config)
    measured = gradients(grown.target, grown.plan.config)[BLOCKED]
    limit = allowed(lambda: gradients(grown.target, grown.plan.config))[BLOCKED]
    ours = realised(grown.plan, reader({"exp_avg": g}), "exp_avg")[BLOCKED]
    published = torch.block_diag(g[BLOCKED] / 2, g[BLOCKED] / 2)
    out, read = g[BLOCKED].shape
    off = measured[:out, read:]
    assert gap(off, g[BLOCKED] / 2, limit) <= ROUNDING and off.abs().max() > WRONG * limit
    assert gap(ours, measured, limit) <= ROUNDING
    assert (published - measured).abs().max() > 0.1 * measured.abs().max()


@pytest.mark.parametrize(
    "name,sizes",
    [
        ("bert", {"embed": 12, "heads": 3, "ffn": 18}),
        ("bert", {"embed": 16, "ffn": 36}),
        ("gpt2", {"ffn": 13}),
        ("llama", {"kv": 4, "group": 6, "embed": 24}),
    ],
)
def test_blocks_need_one_whole_factor(name: str, sizes: dict[str, int]) -> None:
    with pytest.raises(UnsupportedGrowth, match="same whole factor"):
        grow(name, sizes, width="staged")


def test_blocks_on_some_axes_only() -> None:
    """An axis that stays has no blocks."""
    for name, sizes in (("gpt2", {"ffn": 24}), ("t5", {"heads": 4, "ffn": 12}), ("llama", {"embed": 24, "kv": 2})):
        sizes = sizes | {a: n for a, n in sizes_of(name).items() if a in ("embed", "group", "ffn") and a not in sizes}
        grown = grow(name, sizes, width="staged")
        assert_same_logits(grown)
        assert_gradient_rule(grown)


def test_uneven_head_copies_are_refused_with_a_remedy() -> None:
    with pytest.raises(UnsupportedGrowth, match="--break-symmetry noise"):
        grow("bert", {"embed": 16, "heads": 2}, width="hyperclone", breaker="uneven")


def test_maps_of_larger_heads_are_left_inverses() -> None:
    grown: Grown = grow("t5", {"qk": 7}, width="hyperclone")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    dim = grown.plan.tensors[name].terms[0].dims[0]
    gain, share = (np.ones(14) if c is None else c for c in (dim.param, dim.grad))
    assert gap(torch.from_numpy(np.bincount(dim.index, weights=gain * share)), torch.ones(6)) <= ROUNDING


@pytest.mark.parametrize("name", ["llama", "t5", "qwen3_moe"])
def test_aki_borrows_hidden_entries_in_output_biases_alone(name: str) -> None:
    """Where there are none and no unit grows, its hidden features are plain copies, and it says so."""
    table = table_for(tiny.config_of(name))
    sizes = table.axis_sizes(tiny.config_of(name))
    grown = grow(name, {"embed": 2 * sizes["embed"], **{axis: sizes[axis] for axis in table.sizes.units}}, width="aki")
    assert_same_logits(grown)
    assert_gradient_rule(grown)
    assert any("stay identical for ever" in text for text in grown.plan.warnings)


def test_a_scaled_parameter_scales_its_states_as_deepspeed_scales_them() -> None:
    """By the powers in DeepSpeed's own checkpoint/affine.py: for w' = s w, a gradient's states go by 1/s to a power."""
    from deepspeed.checkpoint.affine import SCALE_POWER_BY_STATE

    assert {n: s.power * (-1 if s.gradient else 1) for n, s in STATES.items()} == SCALE_POWER_BY_STATE
