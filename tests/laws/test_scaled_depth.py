"""Copies that share their layer's step: what is scaled, the function to first order, moments, the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.errors import InvalidConfig
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import STATES, assert_slices, detached, gradients, reader, realised, source_of
from tests.laws.test_depth import PRENORM
from tests.laws.test_levels import apart, grown_states, larger, random_states
from tests.planning import plan_growth
from tests.rounding import ROUNDING, gap

# What writes the residual stream, as transformers' modules have it, and no table: the ends of names, by architecture.
WRITERS = {
    "bert": ("output.dense.weight", "output.dense.bias"),
    "roberta": ("output.dense.weight", "output.dense.bias"),
    "gpt2": ("c_proj.weight", "c_proj.bias"),
    "t5": (".o.weight", ".wo.weight"),
    "modernbert": (".Wo.weight", ".Wo.bias"),
    "mixtral": ("o_proj.weight", "experts.down_proj"),
    "qwen3_moe": ("o_proj.weight", "experts.down_proj"),
    "qwen2_moe": ("o_proj.weight", "experts.down_proj", "shared_expert.down_proj.weight"),
}
LLAMA = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
# A copy of ModernBERT's first layer has a norm that the original lacks, so it is no smaller step of the same function.
STEPPING = [name for name in PRENORM if not name.startswith("modernbert")]


def writes(config: dict[str, Any], name: str) -> bool:
    return name.endswith(WRITERS.get(config["model_type"], LLAMA))


def doubled(name: str, scale: str = "step") -> tuple[dict[str, Any], GrowthPlan]:
    """A variant twice as deep; of a mixture all experts are chosen, for a choice that flips is no small change."""
    config = tiny.config_of(name)
    if experts := table_for(config).axis_sizes(config).get("experts"):
        config = tiny.config_of(name, num_experts_per_tok=experts)
    return config, plan_growth(config, larger(config, "depth"), depth=f"interleave:scale={scale}")


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("depth,layers", [("interleave", 9), ("interpolate", 5), ("decoalesce:order=stack", 5)])
def test_what_writes_the_residual_stream_is_divided_by_the_copies(name: str, depth: str, layers: int) -> None:
    config = tiny.config_of(name)
    table = table_for(config)
    stacks = dict.fromkeys(table.sizes.depth, layers) | ({"decoder_layers": 4} if "t5" in name else {})
    large = table.resize(config, stacks) | ({"layer_types": None} if "layer_types" in config else {})
    plan = plan_growth(config, large, depth=depth + (",scale=step" if ":" in depth else ":scale=step"))
    states = random_states(plan, config)
    made = {state: realised(plan, reader(states), state) for state in STATES}
    parameters = table.parameters(large, frozenset(plan.recipe["heads"]))
    seen = 0
    for n, p in parameters.items():
        rows = plan.recipe["layers"].get(p.depth, [])
        source = p.at(None if p.layer is None else int(rows[p.layer]))
        if source not in states["fp32"]:  # ModernBERT's first layer has no norm before its attention
            assert name.startswith("modernbert") and "attn_norm" in n
            continue
        copies = 1 if p.layer is None or "relative_attention_bias" in n else rows.count(rows[p.layer])
        factors = (1 / copies, 1.0, 1.0) if p.layer is not None and writes(config, n) else (1.0, 1 / copies, copies**-2)
        for state, factor in zip(STATES, factors, strict=True):
            assert gap(made[state][n], factor * states[state][source]) <= ROUNDING, (n, state)
        seen += copies > 1 and writes(config, n)
    assert seen and plan.moments == "carried"
    assert_slices(plan, states["fp32"])


def small_steps(config: dict[str, Any], step: float) -> dict[str, Tensor]:
    """The weights of a scrambled model whose residual branches write little."""
    weights = detached(source_of(config, 0), config)
    return {n: step * x if writes(config, n) else x for n, x in weights.items()}


def moved(config: dict[str, Any], plan: GrowthPlan, step: float) -> float:
    """By how much a growth changes the logits of a model whose branches are ``step`` as large."""
    weights = small_steps(config, step)
    a = tiny.logits(tiny.load(config, weights), config)
    b = tiny.logits(tiny.load(plan.config, realised(plan, reader({"fp32": weights}))), plan.config)
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", families(STEPPING))
def test_the_function_is_kept_to_first_order(name: str) -> None:
    """Branches half as large: a quarter of the error; without a scale a half, for the depth then doubles the way."""
    config, plan = doubled(name)
    assert any("first order" in reason for reason in plan.exactness.function)
    assert any("first order" in reason for reason in plan.exactness.moments)
    plain = doubled(name, "none")[1]
    orders = {p: moved(config, p, 2e-3) / moved(config, p, 1e-3) for p in (plan, plain)}
    assert 3.8 < orders[plan] < 4.2 and 1.9 < orders[plain] < 2.1
    assert moved(config, plan, 1e-3) < 0.05 * moved(config, plain, 1e-3)


@pytest.mark.parametrize("name", families(STEPPING))
def test_gradients_of_copies_are_what_the_moments_are_made_of(name: str) -> None:
    """To first order in the branches: the error halves with them."""
    config, plan = doubled(name)

    def error(step: float) -> float:
        weights = small_steps(config, step)
        g = gradients(tiny.load(config, weights), config)
        measured = gradients(tiny.load(plan.config, realised(plan, reader({"fp32": weights}))), plan.config)
        known = [n for n, t in plan.tensors.items() if n in measured and all(s in g for s in t.sources)]
        states = {n: g.get(n, torch.zeros_like(x)) for n, x in weights.items()}
        made = realised(plan, reader({"exp_avg": states}), "exp_avg")
        errors = [(made[n] - measured[n]).abs().max() / measured[n].abs().max() for n in known if measured[n].any()]
        assert len(errors) > 0.8 * len(plan.tensors)
        return float(torch.stack(errors).max())

    large, small = error(2e-4), error(1e-4)
    assert small < 0.05 and 1.8 < large / small < 2.2


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_after_a_norm_no_layer_is_a_step(name: str) -> None:
    """However small the branches are, every copy normalises again: no order is kept, and the plan says so."""
    config, plan = doubled(name)
    assert any("norms follow the residual sum" in reason for reason in plan.exactness.function)
    assert not any("first order" in reason for reason in plan.exactness.moments)
    assert 0.9 < moved(config, plan, 2e-3) / moved(config, plan, 1e-3) < 1.1


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("order", ["interleave", "stack"])
@pytest.mark.parametrize("restriction", ["average", "injection"])
def test_down_and_up_again(name: str, order: str, restriction: str) -> None:
    """Coalesce undoes decoalesce; of layers that differ it keeps the mean or the first, stepping as far as all."""
    config = tiny.config_of(name)
    large = larger(config, "depth")
    up = plan_growth(config, large, depth=f"decoalesce:order={order},scale=step")
    down = plan_growth(large, config, depth=f"coalesce:order={order},scale=step,restriction={restriction}")
    states = random_states(up, config)
    grown = grown_states(up, states)
    for state in STATES:
        assert apart(down, grown, states[state], state) <= ROUNDING, state
    fine = random_states(down, large, 1)
    made = {state: realised(down, reader(fine), state) for state in STATES}
    for n, p in table_for(config).parameters(config, frozenset(down.recipe["heads"])).items():
        members = (
            [int(i) for i in down.recipe["layers"][p.depth][p.layer].split("+")] if p.layer is not None else [None]
        )
        assert len(members) == (1 if p.layer is None or restriction == "injection" else 2)
        held = [p.at(i) for i in members if p.at(i) in fine["fp32"]]  # a lower layer's norm may be missing, as above
        w, m = ([fine[state][h] for h in held] for state in ("fp32", "exp_avg"))
        steps = 2 if p.layer is not None and "relative_attention_bias" not in n else 1
        factors = (steps, 1) if p.layer is not None and writes(config, n) else (1, steps)
        assert gap(made["fp32"][n], factors[0] * torch.stack(w).mean(0)) <= ROUNDING, n
        assert gap(made["exp_avg"][n], factors[1] * torch.stack(m).mean(0)) <= ROUNDING, n
        assert (made["exp_avg_sq"][n] >= made["exp_avg"][n].square() * (1 - 1e-12)).all(), n
    assert any("fewer layers change the function" in reason for reason in down.exactness.function)


def test_options_of_the_scale_are_checked() -> None:
    for text in ("interleave:scale=2", "coalesce:restriction=mean", "interpolate:scale=steps"):
        with pytest.raises(InvalidConfig, match=r"known: |did you mean"):
            plan_growth(tiny.config_of("gpt2"), tiny.config_of("gpt2"), depth=text)
