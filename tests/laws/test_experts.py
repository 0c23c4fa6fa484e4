"""Dense models upcycled and experts duplicated: exact where routers allow it, reported where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.algebra.realise import values
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import table_for
from tests import tiny
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
from tests.planning import plan_growth
from tests.rounding import ROUNDING, WRONG, allowed, gap, largest

DENSE = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe"]
TOP = "num_experts_per_tok"


def sparse(
    name: str, experts: int = 5, top: int = 2, shards: int = 1, sizes: dict[str, int] | None = None, **keys: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dense config, and that of the mixture of experts which it can become, ``sizes`` as of the grown dense model."""
    dense = tiny.config_of(name)
    large = table_for(dense).resize(dense, sizes or {})
    kind = tiny.VARIANTS[DENSE[name]]
    ffn = "moe_intermediate_size" if DENSE[name] == "qwen3_moe" else "intermediate_size"
    target = tiny.config_of(DENSE[name]) | {
        key: large[key] for key in (*kind.base, "rms_norm_eps", "rope_parameters", "sliding_window")
        if key in large and key != "model_type"
    }  # fmt: skip
    count = "num_local_experts" if "num_local_experts" in target else "num_experts"
    return dense, target | {count: experts, TOP: top, ffn: large["intermediate_size"] // shards} | keys


def upcycled(name: str, how: str = "upcycle", *, given: dict[str, Any] | None = None, **keys: Any) -> Grown:
    """A scrambled dense model and its growth into experts; given: other arguments of the growth."""
    dense, target = sparse(name, **keys)
    return Grown(dense, plan_growth(dense, target, experts=how, seed=1, **(given or {})))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(5, 1), (5, 2), (8, 8)])
def test_identical_experts_are_the_dense_layer(name: str, shape: tuple[int, int]) -> None:
    """Mixtral's weights of a token's experts sum to one, whatever the router says, and so do Qwen3's when asked to."""
    grown = upcycled(name, experts=shape[0], top=shape[1])
    assert_same_logits(grown)
    routers = [p.name for p in grown.plan.tensors.values() if p.spec == "experts <- normed"]
    drawn = torch.stack([grown.state[r] for r in routers])
    assert len(routers) == 3 and drawn.unique().numel() == drawn.numel() and 0.01 < drawn.std() < 0.03
    with torch.no_grad():  # for any router
        for n, p in tiny.parameters(grown.target, grown.plan.config).items():
            if n in routers:
                p.normal_(0, 3)
    assert grown.drift() <= ROUNDING


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(
    "how",
    [
        {"width": "fpi"}, {"width": "fpi", "breaker": "noise:scale=20"}, {"depth": "insert_identity"},
        {"width": "fpi:choice=left", "depth": "insert_identity", "vocab": "mean"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("shards", [1, 2])
def test_with_other_growth_in_the_same_pass(name: str, how: dict[str, str], shards: int) -> None:
    sizes = {"embed": 24, "kv": 4, "group": 3, "ffn": 22} if "width" in how else {}
    sizes |= {"layers": 5} if "depth" in how else {}
    sizes |= {"vocab": 34} if "vocab" in how else {}
    grown = upcycled(name, f"upcycle:granularity={shards}", given=how, experts=6, top=4, shards=shards, sizes=sizes)
    assert grown.drift() <= ROUNDING
    assert all("vocab" in reason for reason in grown.plan.exactness.function)
    again = plan_growth(grown.config, grown.plan.config, experts=grown.plan.recipe["experts"], seed=1, **how)
    assert again.digest() == grown.plan.digest()


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shape", [(4, 2, 2), (8, 2, 2), (8, 4, 2), (10, 5, 5), (10, 10, 5)])
def test_virtual_groups(name: str, shape: tuple[int, int, int]) -> None:
    """A token's experts are copies of every shard, and their weights 1 / G of the dense sum, which scaling undoes."""
    experts, top, shards = shape
    grown = upcycled(name, f"upcycle:granularity={shards}", experts=experts, top=top, shards=shards)
    assert_same_logits(grown)
    router = grown.state["model.layers.1.mlp.gate.weight"]
    copies = experts // shards
    assert all(torch.equal(router[:copies], group) for group in router.split(copies))
    # equal rows leave ties to top-k, unless all are chosen
    assert [f"one of the {shards} shards twice and miss another" in n for n in grown.plan.notes] == [True] * (
        top < experts
    )
    assert router.unique().numel() == router[:copies].numel()
    dense = grown.weights["model.layers.1.mlp.down_proj.weight"]
    down = grown.state["model.layers.1.mlp.experts.down_proj"]
    for j, expert in enumerate(down):
        assert gap(expert, dense.chunk(shards, 1)[j // copies] * shards**0.5) <= ROUNDING
    unscaled = upcycled(name, f"upcycle:granularity={shards},scale=none", experts=experts, top=top, shards=shards)
    assert unscaled.drift() > WRONG and f"1 / {shards} of the dense" in unscaled.plan.exactness.function[0]


def test_a_token_needs_every_shard() -> None:
    grown = upcycled("llama", "upcycle:granularity=5", experts=10, top=7, shards=5)
    assert grown.drift() > WRONG and "equally often" in grown.plan.exactness.function[0]


@pytest.mark.parametrize(("experts", "top", "shards", "factor"), [(64, 8, 8, 4.0), (8, 1, 1, 2.0)])
def test_the_papers_scale(experts: int, top: int, shards: int, factor: float) -> None:
    """E8G8T8 is scaled by 4, E8G1T1 by 2; the gate too, so that under SiLU the function changes, and it is reported."""
    sizes = {"ffn": 16}
    how = f"upcycle:granularity={shards},scale=cube"
    grown = upcycled("llama", how, experts=experts, top=top, shards=shards, sizes=sizes)
    plain = upcycled("llama", how.replace("cube", "none"), experts=experts, top=top, shards=shards, sizes=sizes)
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        assert gap(grown.state[name], factor * plain.state[name]) <= ROUNDING
    assert grown.drift() > WRONG and "not linear" in " ".join(grown.plan.exactness.function)


@pytest.mark.parametrize(("experts", "top", "shards"), [(6, 2, 1), (6, 2, 2), (5, 5, 1)])
def test_weights_that_do_not_sum_to_one(experts: int, top: int, shards: int) -> None:
    """Softmax, then the largest: right only for an even router, and for all experts."""

    def made(spread: float) -> Grown:
        return upcycled("qwen3", f"upcycle:granularity={shards}", experts=experts, top=top, shards=shards,
                        norm_topk_prob=False, initializer_range=spread)  # fmt: skip

    grown = made(0.5)
    if top == experts:
        assert_same_logits(grown)
        return
    assert grown.drift() > WRONG and "do not sum to one" in grown.plan.exactness.function[0]
    assert made(1e-9).drift() < 1e-6 * grown.drift()


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("shards", [1, 2])
def test_gradients_at_the_start(name: str, shards: int) -> None:
    """Everything but the experts learns as in the dense model, and a router only how to weigh shards."""
    grown = upcycled(name, f"upcycle:granularity={shards}", experts=6, top=2, shards=shards)
    before, after = gradients(grown.source, grown.config), gradients(grown.target, grown.plan.config)
    limits = allowed(lambda: gradients(grown.target, grown.plan.config))
    for n, g in after.items():
        if n in before:
            assert gap(g, before[n], limits[n]) <= ROUNDING, n
        elif ".gate." in n:
            groups = g.view(shards, 6 // shards, -1)
            assert largest(groups.sum(0)) <= limits[n], n
            assert shards == 1 or largest(groups[0]) > WRONG * limits[n]
        else:
            assert largest(g) > WRONG * limits[n], n


@pytest.mark.parametrize("shards", [1, 2])
def test_moments(shards: int) -> None:
    def plan(moments: str | None) -> Any:
        how = f"upcycle:granularity={shards}"
        return upcycled("llama", how, given={"moments": moments}, experts=6, top=2, shards=shards).plan

    state = Grown(tiny.config_of("llama"), plan(None)).weights
    reads = reader({"exp_avg": state, "exp_avg_sq": {n: w.square() for n, w in state.items()}})
    m, v = (realised(plan(None), reads, s) for s in STATES[1:])
    down, dense = "model.layers.2.mlp.experts.down_proj", state["model.layers.2.mlp.down_proj.weight"]
    expected = torch.stack([dense.chunk(shards, 1)[j // (6 // shards)] for j in range(6)]) / shards**0.5
    assert gap(m[down], expected) <= ROUNDING and gap(v[down], expected.square()) <= ROUNDING
    assert not m["model.layers.2.mlp.gate.weight"].any()
    assert plan(None).moments == "carried" and any("3.16x" in w for w in plan(None).warnings)
    assert len(plan(None).exactness.moments) == 2
    fresh = realised(plan("asymmetric"), reads, "exp_avg")[down]
    kept = [j for j in range(6) if fresh[j].any()]
    assert kept == list(range(0, 6, 6 // shards)) and torch.equal(fresh[kept], m[down][kept])
    assert not any(x.any() for x in realised(plan("reset"), reads, "exp_avg").values())
    assert not plan("reset").warnings
    with pytest.raises(UnsupportedGrowth, match="routed to it alone"):
        plan("exact")


@pytest.mark.parametrize("shards", [1, 5])
def test_slices_of_upcycled_models(shards: int) -> None:
    how = f"upcycle:granularity={shards}"
    grown = upcycled("qwen3", how, given={"breaker": "noise"}, experts=10, top=5, shards=shards,
                     sizes={"embed": 24, "kv": 4, "ffn": 20})  # fmt: skip
    single = {n: w.float() for n, w in grown.weights.items()}
    rows = values(grown.plan, [reader(dict.fromkeys(STATES, single))])
    for n, p in grown.plan.tensors.items():
        for state in STATES:
            whole = rows(n, state, 0, p.shape[0])
            for start, stop in ((0, 1), (p.shape[0] // 3, p.shape[0] - 1)):
                assert torch.equal(rows(n, state, start, stop), whole[start:stop]), (n, state)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("how", [{}, {"breaker": "noise:scale=20"}, {"wider": True}])
def test_duplicates_that_are_chosen_together(name: str, times: int, how: dict[str, Any]) -> None:
    """As many times the experts as experts a token: exact, moments too, whether weights are divided by their sum."""
    wider = {"embed": 24, "kv": 4} if how.get("wider") else {}
    grown = grow(name, {"experts": 5 * times, **wider}, target={TOP: 2 * times}, experts="duplicate",
                 breaker=how.get("breaker"))  # fmt: skip
    assert_same_logits(grown)
    down = grown.state["model.layers.0.mlp.experts.down_proj"]
    if "breaker" in how:
        assert (down[:5] - down[5:10]).abs().min() > 0
        assert not any("score alike" in w for w in grown.plan.warnings)
        assert any("only in sum" in reason for reason in grown.plan.exactness.moments)
    else:
        assert torch.equal(down[:5], down[5:10])
        assert any("kept up to ties" in note for note in grown.plan.notes)
        assert grown.plan.moments == "exact" and any("score alike" in w for w in grown.plan.warnings)
        assert_gradient_rule(grown)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("experts", "top"), [(10, 2), (8, 2), (8, 3), (10, 3)])
def test_duplicates_that_are_not(name: str, experts: int, top: int) -> None:
    """The old number of experts a token, or copies of some alone."""
    grown = grow(name, {"experts": experts}, target={TOP: top}, experts="duplicate")
    assert grown.drift() > WRONG and "chosen together" in grown.plan.exactness.function[0]
    assert grown.plan.moments == "carried"
    m = realised(grown.plan, reader({"exp_avg": grown.weights}), "exp_avg")
    n = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(m[n], grown.weights[n][torch.arange(experts) % 5])


@pytest.mark.parametrize("experts", [7, 10])
def test_one_expert_a_token(experts: int) -> None:
    """Its weight is one where weights are divided by their sum, so any copies will do; else copies share it."""
    grown = grow("mixtral", {"experts": experts}, keys={TOP: 1}, experts="duplicate")
    assert grown.plan.exactness.function == () and grown.drift() <= ROUNDING
    assert grown.plan.exactness.moments
    shared = grow("qwen3_moe", {"experts": experts}, keys={TOP: 1, "norm_topk_prob": False}, experts="duplicate")
    assert shared.plan.exactness.function and shared.drift() > WRONG


def test_asymmetric_moments_of_duplicates() -> None:
    grown = grow("mixtral", {"experts": 10}, target={TOP: 4}, experts="duplicate", moments="asymmetric")
    v = realised(grown.plan, reader({"exp_avg_sq": grown.weights}), "exp_avg_sq")
    for n, p in grown.plan.tensors.items():
        if p.spec.startswith("experts"):
            assert v[n][:5].any() and not v[n][5:].any()
    assert not any("score alike" in w for w in grown.plan.warnings)


def test_refusals() -> None:
    """What would work is named."""
    (llama, mixtral), bert = sparse("llama"), tiny.config_of("bert")
    qwen3_moe, mixture = tiny.config_of("qwen3_moe"), tiny.config_of("mixtral")
    more = mixture | {"num_local_experts": 10}
    for error, match, source, target, how in (
        (UnsupportedGrowth, "use --experts upcycle", llama, mixtral, {}),
        (UnsupportedGrowth, "use --experts upcycle, not duplicate", llama, mixtral, {"experts": "duplicate"}),
        (UnsupportedGrowth, "makes a mixtral of a llama", llama, qwen3_moe, {"experts": "upcycle"}),
        (UnsupportedGrowth, r"one architecture \(bert, ", tiny.config_of("gpt2"), mixtral, {"experts": "upcycle"}),
        (UnsupportedGrowth, "makes a mixtral of it", llama, llama, {"experts": "upcycle"}),
        (UnsupportedGrowth, "a bert has no experts", bert, bert, {"experts": "duplicate"}),
        (UnsupportedGrowth, "--experts duplicate, or set it to 5", mixture, more, {}),
        (UnsupportedGrowth, "use --experts duplicate", mixture, more, {"experts": "upcycle"}),
        (InvalidConfig, "num_local_experts is the same", mixture, mixture, {"experts": "duplicate"}),
        (InvalidConfig, "11 of 10 experts", mixture, more | {TOP: 11}, {"experts": "duplicate"}),
        (UnsupportedGrowth, TOP, mixture, mixture | {TOP: 3}, {}),
        (InvalidConfig, "divide into 3 shards", llama, mixtral, {"experts": "upcycle:granularity=3"}),
        (UnsupportedGrowth, "sliding_window is None", llama, mixtral | {"sliding_window": 8}, {"experts": "upcycle"}),
        (UnsupportedGrowth, "rms_norm_eps", llama, mixtral | {"rms_norm_eps": 0.1}, {"experts": "upcycle"}),
        (UnsupportedGrowth, "cannot shrink", llama, mixtral | {"intermediate_size": 5}, {"experts": "upcycle"}),
        (UnsupportedGrowth, "--vocab mean", llama, mixtral | {"vocab_size": 40}, {"experts": "upcycle"}),
        (InvalidConfig, "--width random", llama, mixtral, {"experts": "upcycle", "width": "random"}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            plan_growth(source, target, **how)
