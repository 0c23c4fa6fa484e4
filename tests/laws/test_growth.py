"""Laws of the growth algebra, float64, scrambled parameters, logits and gradients of transformers' own BERT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import realise, values
from bert2bert.growth.compose import then
from tests.planning import plan_growth
from tests.rounding import ROUNDING, WRONG, allowed, gap, largest, squared
from tests.tiny import batch, bert_config, hf_bert, scramble

VARIANTS = [("BertForPreTraining", True), ("BertForPreTraining", False), ("BertForMaskedLM", True), ("BertModel", True)]


def reader(states: dict[str, dict[str, torch.Tensor]]) -> Any:
    return lambda name, state, start, stop: states[state][name][start:stop]


def grown_state(plan: GrowthPlan, states: dict[str, dict[str, torch.Tensor]], state: str = "fp32") -> dict[str, Any]:
    return {n: realise(p, state, reader(states), torch.float64) for n, p in plan.tensors.items()}


def strip(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """BertModel alone has no 'bert.' in its names."""
    return state if hasattr(model, "bert") else {n.removeprefix("bert."): v for n, v in state.items()}


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    outer = "" if hasattr(model, "bert") else "bert."
    return {outer + n: p.detach().clone() for n, p in model.named_parameters()}


def load(config: dict[str, Any], state: dict[str, Any]) -> torch.nn.Module:
    model = hf_bert(config)
    missing = model.load_state_dict(strip(model, state), strict=False)
    assert not missing.unexpected_keys and all("decoder" in k for k in missing.missing_keys)
    return model


def outputs(model: torch.nn.Module, seed: int = 0) -> list[torch.Tensor]:
    b = batch(seed)
    b.pop("labels")
    out = model(**b)
    return [t for t in out.to_tuple() if t is not None]


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    b = batch(seed)
    labels = b.pop("labels")
    out = model(**b)
    if not hasattr(model, "bert"):  # a loss that reads each copy as the growth's readers do: through the pooler alone
        return out.pooler_output.square().sum()
    logits = out.logits if hasattr(out, "logits") else out.prediction_logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    if hasattr(out, "seq_relationship_logits"):
        loss = loss + torch.nn.functional.cross_entropy(out.seq_relationship_logits, torch.tensor([0, 1, 1]))
    return loss


def source(cls: str, tied: bool = True, **sizes: int) -> tuple[dict[str, Any], torch.nn.Module]:
    config = bert_config(cls=cls, tie_word_embeddings=tied, **sizes)
    model = hf_bert(config)
    scramble(model)
    return config, model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    outer = "" if hasattr(model, "bert") else "bert."
    return {outer + n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def breaking(how: str | None) -> dict[str, Any]:
    """The options of `plan_growth` for a way to break the symmetry."""
    return {"moments": how} if how == "asymmetric" else {"breaker": how}


def same_outputs(a: torch.nn.Module, b: torch.nn.Module) -> float:
    """The `gap` of the outputs, the last hidden states of a bare encoder left out (they are copies, not equal)."""
    ys, zs, limits = outputs(a), outputs(b), allowed(lambda: outputs(b))
    return max(gap(z, y, limit) for y, z, limit in zip(ys, zs, limits, strict=True) if y.shape == z.shape)


@pytest.mark.parametrize("cls,tied", VARIANTS)
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("breaker", [None, "noise", "noise:scale=20", "uneven", "asymmetric"])
def test_divisible_width_keeps_the_logits(cls: str, tied: bool, times: int, breaker: str | None) -> None:
    small, model = source(cls, tied)
    large = bert_config(8 * times, 2 * times, 12 * times, cls=cls, tie_word_embeddings=tied)
    plan = plan_growth(small, large, width="fpi", seed=5, **breaking(breaker))
    assert plan.exactness.function == ()
    grown = load(large, grown_state(plan, {"fp32": parameters(model)}))
    if cls == "BertModel":
        a, b, limits = outputs(model), outputs(grown), allowed(lambda: outputs(grown))
        index = torch.from_numpy(plan.tensors["bert.embeddings.LayerNorm.weight"].terms[0].dims[0].index)
        assert all(gap(y, x[..., index], n) <= ROUNDING for x, y, n in zip(a, b, limits, strict=True))
    else:
        assert same_outputs(model, grown) <= ROUNDING


@pytest.mark.parametrize("choice", ["random", "balanced", "left"])
@pytest.mark.parametrize("axis", ["ffn", "heads"])
def test_units_grow_exactly_with_any_map(axis: str, choice: str) -> None:
    """FFN-only: any size. Heads-only: the width is 2 heads of 4, so heads grow with an unchanged hidden size only when
    head size and width are set apart, which BERT's config cannot say; the map is applied to the tensors directly."""
    small, model = source("BertForPreTraining")
    if axis == "ffn":
        large = bert_config(ffn=31)
        plan = plan_growth(small, large, width=f"fpi:choice={choice}", seed=3)
        grown = load(large, grown_state(plan, {"fp32": parameters(model)}))
        counts = [plan.tensors[f"bert.encoder.layer.{i}.intermediate.dense.bias"].terms[0].dims[0] for i in range(3)]
        assert len({c.index.tobytes() for c in counts}) > 1 or choice == "left"
        assert plan.exactness == type(plan.exactness)()
        assert same_outputs(model, grown) <= ROUNDING
    else:
        old, new, limit = _attention(model, choice)
        assert gap(new, old, limit) <= ROUNDING


def _attention(model: Any, choice: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    from functools import reduce
    from operator import mul

    from bert2bert.algebra import axes
    from bert2bert.algebra.maps import copies
    from bert2bert.algebra.plan import Dim, TensorPlan, Term
    from bert2bert.operators.width_bert2bert import index
    from bert2bert.tables import BERT

    heads = copies(index(2, 5, choice, np.random.default_rng(1)), 2)
    layer = model.bert.encoder.layer[0].attention
    sizes = {"heads": heads, "embed": 8, "qk": 4, "v": 4, "tau": 1, "rho": 1}
    from bert2bert.algebra.maps import identity

    values = parameters(model)
    state = {}
    for p in BERT.parameters(bert_config(), frozenset()).values():
        if p.layer == 0 and "attention" in p.name and "LayerNorm" not in p.name:
            dims = []
            for (product,) in axes.parse(p.spec):
                parts = [heads if a.axis == "heads" else identity(int(sizes[a.axis])) for a in product]
                dims.append(Dim.of(reduce(mul, [~g if a.reads else g for a, g in zip(product, parts, strict=True)])))
            plan = TensorPlan(p.name, p.spec, tuple(len(d.index) for d in dims), (Term(p.name, tuple(dims)),))
            state[p.name.split("attention.")[1]] = realise(plan, "fp32", reader({"fp32": values}), torch.float64)

    def run(weights: dict[str, torch.Tensor], n: int, x: torch.Tensor) -> torch.Tensor:
        def linear(name: str, h: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

        q, k, v = (linear(f"self.{m}", x).unflatten(-1, (n, 4)).transpose(1, 2) for m in ("query", "key", "value"))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return linear("output.dense", out.transpose(1, 2).flatten(2))

    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mine = {n: p.detach() for n, p in layer.named_parameters()}
    return run(mine, 2, x), run(state, 5, x), allowed(lambda: run(state, 5, x))


@pytest.mark.parametrize("cls,tied", VARIANTS[:3])
@pytest.mark.parametrize(
    "width,sizes", [("fpi", (16, 4, 24)), ("fpi:choice=left", (24, 6, 36)), ("fpi:choice=random", (8, 2, 31))]
)
def test_gradient_rule_and_moments(cls: str, tied: bool, width: str, sizes: tuple[int, int, int]) -> None:
    """G' = L_out^T G E_in^T for every tensor, and the moments follow. The key bias has no gradient (softmax)."""
    small, model = source(cls, tied)
    large = bert_config(*sizes, cls=cls, tie_word_embeddings=tied)
    plan = plan_growth(small, large, width=width, seed=2)
    assert plan.exactness.function == () and plan.exactness.moments == ()
    grown = load(large, grown_state(plan, {"fp32": parameters(model)}))
    g, measured, limits = gradients(model), gradients(grown), allowed(lambda: gradients(grown))
    squares = {n: x.square() for n, x in g.items()}
    states = {"exp_avg": g, "exp_avg_sq": squares}
    checked = 0
    for name, tensor in plan.tensors.items():
        if name not in measured:  # the untied head's second bias, which transformers does not use
            assert name == "cls.predictions.bias" and not tied
            continue
        m = realise(tensor, "exp_avg", reader(states), torch.float64)
        v = realise(tensor, "exp_avg_sq", reader(states), torch.float64)
        assert gap(m, measured[name], limits[name]) <= ROUNDING, name
        assert gap(v, measured[name].square(), squared(limits[name], measured[name])) <= ROUNDING, name
        assert name.endswith("self.key.bias") or largest(measured[name]) > WRONG * limits[name], name
        checked += 1
    assert checked >= 50


def test_parameter_map_is_wrong_for_moments() -> None:
    """Guards the test above: the parameter's own map must fail it."""
    small, model = source("BertForPreTraining")
    large = bert_config(16, 4, 24)
    plan = plan_growth(small, large, width="fpi")
    grown = load(large, grown_state(plan, {"fp32": parameters(model)}))
    measured, limits = gradients(grown), allowed(lambda: gradients(grown))
    wrong = grown_state(plan, {"fp32": gradients(model)})
    name = "bert.encoder.layer.1.output.dense.weight"
    assert gap(wrong[name], measured[name], limits[name]) <= ROUNDING  # equal in- and out-count: no witness
    name = "cls.predictions.transform.LayerNorm.weight"
    assert (wrong[name] - measured[name]).norm() > 0.4 * measured[name].norm()


@pytest.mark.parametrize("sizes", [(12, 3, 18), (20, 5, 30)])
@pytest.mark.parametrize("choice", ["random", "balanced"])
def test_indivisible_width_differs_and_says_so(sizes: tuple[int, int, int], choice: str) -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(*sizes)
    plan = plan_growth(small, large, width=f"fpi:choice={choice}", seed=1)
    assert any("norm keeps copies only when" in reason for reason in plan.exactness.function)
    assert same_outputs(model, load(large, grown_state(plan, {"fp32": parameters(model)}))) > WRONG


def test_random_map_at_divisible_width_differs_and_says_so() -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(16, 4, 24)
    plan = plan_growth(small, large, width="fpi:choice=random", seed=1)
    assert plan.exactness.function
    assert same_outputs(model, load(large, grown_state(plan, {"fp32": parameters(model)}))) > WRONG


def test_depth_alone_differs_and_says_so() -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(layers=6)
    plan = plan_growth(small, large)
    assert any("depth 3 -> 6" in reason for reason in plan.exactness.function)
    assert same_outputs(model, load(large, grown_state(plan, {"fp32": parameters(model)}))) > WRONG


@pytest.mark.parametrize("sizes,layers", [((16, 4, 24), 3), ((12, 3, 18), 3), ((16, 4, 29), 7)])
def test_aki_identities(sizes: tuple[int, int, int], layers: int) -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(*sizes, layers=layers)
    fpi, aki = (plan_growth(small, large, width=w, seed=9) for w in ("fpi", "aki"))
    states = {"fp32": parameters(model)}
    a, f = grown_state(aki, states), grown_state(fpi, states)
    differing = {n for n in a if not torch.equal(a[n], f[n])}
    # (1) the top layer borrows from itself, so it is FPI's, and so is everything outside the layers
    top = [t for t, s in enumerate([int(s) for s in aki.recipe["layers"]["layers"]]) if s == 2]
    assert top and not any(f".layer.{t}." in n for n in differing for t in top)
    assert all(".layer." in n for n in differing)
    # (2) the source's own block is FPI's
    for name in a:
        corner = tuple(slice(0, n) for n in states["fp32"][aki.tensors[name].terms[0].source].shape)
        assert torch.equal(a[name][corner], f[name][corner]), name
    # (3) fresh units come from the layer above: equal to FPI on a model shifted down by one layer
    shifted = dict(states["fp32"])
    for name, value in states["fp32"].items():
        for low in (0, 1):
            if f".layer.{low + 1}." in name:
                shifted[name.replace(f".layer.{low + 1}.", f".layer.{low}.")] = value
    s = grown_state(fpi, {"fp32": shifted})
    for t, low in enumerate([int(s) for s in aki.recipe["layers"]["layers"]]):
        if low < 2:
            p = f"bert.encoder.layer.{t}."
            for name, cut in (("intermediate.dense.weight", 12), ("attention.self.query.bias", 8)):
                assert torch.equal(a[p + name][cut:], s[p + name][cut:]) and a[p + name][cut:].numel()
                assert not torch.equal(a[p + name][cut:], f[p + name][cut:])
            assert torch.equal(a[p + "output.dense.weight"][:, 12:], s[p + "output.dense.weight"][:, 12:])
            assert torch.equal(a[p + "output.dense.bias"][8:], s[p + "output.dense.bias"][8:])
            norm = p + "output.LayerNorm.weight"
            assert torch.equal(a[norm], f[norm])
    # (4) all layers equal: AKI is FPI bit for bit
    equal = {
        n: states["fp32"][n.replace(".layer.1.", ".layer.0.").replace(".layer.2.", ".layer.0.")] for n in states["fp32"]
    }
    a, f = (grown_state(plan, {"fp32": equal}) for plan in (aki, fpi))
    assert all(torch.equal(a[n], f[n]) for n in a)
    assert aki.exactness.function and "aki" in aki.exactness.function[0]


def test_direct_and_random() -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(16, 4, 24, layers=5)
    values = parameters(model)
    direct = grown_state(plan_growth(small, large, width="direct"), {"fp32": values, "exp_avg": values})
    name = "bert.encoder.layer.4.output.dense.weight"
    assert torch.equal(direct[name][:8, :12], values["bert.encoder.layer.2.output.dense.weight"])
    outside = direct[name][8:]
    assert 0.01 < outside.std() < 0.03 and abs(outside.mean()) < 0.01
    assert (direct["bert.embeddings.LayerNorm.weight"][8:] == 1).all()
    assert (direct["bert.embeddings.LayerNorm.bias"][8:] == 0).all()
    moments = grown_state(plan_growth(small, large, width="direct"), {"exp_avg": values}, "exp_avg")
    assert (moments[name][8:] == 0).all()
    random = grown_state(plan_growth(small, large, width="random"), {})
    other = grown_state(plan_growth(small, large, width="random", seed=1), {})
    word = "bert.embeddings.word_embeddings.weight"
    assert 0.015 < random[word].std() < 0.025 and not torch.equal(random[word], other[word])
    assert same_outputs(model, load(large, random)) > 0.01


def copies_apart(plan: GrowthPlan, config: dict[str, Any], states: dict[str, Any], steps: int = 5) -> list[float]:
    """Train five AdamW steps; for each layer, how far the fresh neurons' input weights are from their originals'."""
    grown = load(config, grown_state(plan, states))
    params = dict(grown.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.1)
    m, v = grown_state(plan, states, "exp_avg"), grown_state(plan, states, "exp_avg_sq")
    for n, p in params.items():
        optimizer.state[p] = {"step": torch.tensor(50.0), "exp_avg": m[n], "exp_avg_sq": v[n]}
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(grown, seed=step).backward()
        optimizer.step()
    gaps = []
    for layer in range(config["num_hidden_layers"]):
        name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
        w = params[name].detach()
        index = plan.tensors[name].terms[-1].dims[0].index
        original = w[torch.from_numpy(index[12:])]
        gaps.append(((w[12:] - original).norm(dim=1) / original.norm(dim=1)).max().item())
    return gaps


@pytest.mark.parametrize("breaker", ["noise", "uneven", "asymmetric"])
def test_breakers_tell_copies_apart(breaker: str) -> None:
    """Without one, AdamW keeps the copies of a grown net identical for ever; with one they part within five steps."""
    small, model = source("BertForMaskedLM")
    large = bert_config(16, 4, 24, cls="BertForMaskedLM")
    values, grads = parameters(model), gradients(model)
    states = {"fp32": values, "exp_avg": grads, "exp_avg_sq": {n: g.square() for n, g in grads.items()}}
    plain, broken = plan_growth(small, large), plan_growth(small, large, **breaking(breaker))
    assert any("identical for ever" in w for w in plain.warnings)
    assert not any("identical for ever" in w for w in broken.warnings)
    rounding = allowed(lambda: torch.tensor(copies_apart(plain, large, states), dtype=torch.float64))
    assert max(copies_apart(plain, large, states)) <= rounding < 1e-6
    assert min(copies_apart(broken, large, states)) > 1e-3
    # aki: every layer but the top one, which borrows from itself
    *lower, top = copies_apart(plan_growth(small, large, width="aki"), large, states)
    assert min(lower) > 1e-3 and top <= rounding
    assert min(copies_apart(plan_growth(small, large, width="aki", **breaking(breaker)), large, states)) > 1e-3


@pytest.mark.parametrize(
    "width,breaker",
    [(w, b) for w in ("fpi", "aki") for b in (None, "noise", "asymmetric")] + [("direct", None), ("random", None)],
)
def test_a_narrowed_plan_is_a_slice_bit_for_bit(width: str, breaker: str | None) -> None:
    small, model = source("BertForPreTraining")
    large = bert_config(20, 5, 27, layers=5)
    plan = plan_growth(small, large, width=width, **breaking(breaker))
    values = {n: p.float() for n, p in parameters(model).items()}
    states = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), values)
    rows_read: list[int] = []

    def counting(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        rows_read.append(stop - start)
        return states[state][name][start:stop]

    for tensor in plan.tensors.values():
        for state in states:
            whole = realise(tensor, state, counting)
            n = len(whole)
            for start, stop in ((0, n), (0, 1), (n // 3, n - 1), (n - 1, n), (n // 2, n // 2)):
                part = tensor.narrow(start, stop)
                assert torch.equal(realise(part, state, counting), whole[start:stop]), (tensor.name, state)
                middle = part.narrow(0, part.shape[0] // 2)
                assert torch.equal(realise(middle, state, counting), whole[start : start + part.shape[0] // 2])


@pytest.mark.parametrize("middle,last", [((16, 4, 24, 3), (48, 12, 72, 3)), ((24, 6, 30, 5), (72, 18, 61, 11))])
@pytest.mark.parametrize("widths", [("fpi", "fpi"), ("aki", "fpi"), ("fpi", "aki"), ("aki", "aki"), ("direct", "fpi")])
def test_fused_is_sequence_bit_for_bit(
    middle: tuple[int, int, int, int], last: tuple[int, int, int, int], widths: tuple[str, str]
) -> None:
    small, model = source("BertForPreTraining")
    b, c = bert_config(*middle[:3], layers=middle[3]), bert_config(*last[:3], layers=last[3])
    one, two = plan_growth(small, b, width=widths[0], seed=1), plan_growth(b, c, width=widths[1], seed=2)
    fused = then(one, two)
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        read = reader({state: {n: p.float() for n, p in parameters(model).items()}})
        between = {n: realise(p, state, read) for n, p in one.tensors.items()}
        both = values(fused, [read])
        for name, tensor in two.tensors.items():
            expected, rows = realise(tensor, state, reader({state: between})), tensor.shape[0]
            assert torch.equal(both(name, state, 0, rows), expected), (state, name)
            assert torch.equal(both(name, state, rows // 3, rows - 1), expected[rows // 3 : rows - 1]), (state, name)
    assert fused.digest() not in (one.digest(), two.digest())
    assert fused.roots("cls.predictions.bias") == ((0, "cls.predictions.bias"),)
