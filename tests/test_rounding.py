"""The bounds themselves: another order of summation keeps them, a coefficient wrong in its fourth digit does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bert2bert.algebra import axes
from bert2bert.algebra.realise import realise
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import Grown, gradients, grow, reader
from tests.rounding import FEW, ROUNDING, WRONG, allowed, elementary, gap, unit

aten = torch.ops.aten


class OtherKernels(TorchDispatchMode):
    """Matrix products add their terms in two halves, each from the last to the first, as another library might."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default):
            a, b = args
            half = a.shape[-1] // 2
            return sum(func(x.flip(-1), y.flip(-2)) for x, y in ((a[..., half:], b[..., half:, :]),
                                                                (a[..., :half], b[..., :half, :])))  # fmt: skip
        if func is aten.addmm.default:
            return self.__torch_dispatch__(aten.mm.default, types, args[1:]) + args[0]
        return func(*args, **(kwargs or {}))


def doubled(name: str, **how: Any) -> Grown:
    return grow(name, {"embed": 2 * table_for(tiny.config_of(name)).axis_sizes(tiny.config_of(name))["embed"]}, **how)


def test_a_nudge_measures_what_cancels() -> None:
    x = torch.rand(1000, dtype=torch.float64) + 1
    plain = allowed(lambda: x.sum())
    assert unit(torch.float64) * x.sum() < plain < 1e4 * unit(torch.float64) * x.sum()
    assert 1e5 * plain < allowed(lambda: (x + 1e6).sum() - 1e9)
    assert allowed(lambda: x.sum()) == plain
    assert allowed(lambda: {"sum": x.sum()}) == {"sum": plain} and allowed(lambda: (x.sum(),)) == [plain]
    with pytest.raises(AssertionError, match="float32"):
        allowed(lambda: x.float().sum())


def test_masks_written_results_and_views_are_left_alone() -> None:
    scores = torch.tensor([[1.0, torch.finfo(torch.float64).min], [-torch.inf, 2.0]], dtype=torch.float64)

    def compute() -> Tensor:
        out = torch.zeros(2, 2, dtype=torch.float64)
        out.view(4)[1:3].add_(1.0)
        return scores.softmax(-1) + out

    assert compute().isfinite().all() and allowed(compute) < 1e-11


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("breaker", [None, "noise:scale=20"])
def test_other_kernels_stay_within_the_bounds(name: str, breaker: str | None) -> None:
    grown = doubled(name, breaker=breaker)
    config, limits = grown.plan.config, allowed(lambda: gradients(grown.target, grown.plan.config))
    limits["logits"] = allowed(lambda: tiny.logits(grown.target, config))
    plain = gradients(grown.target, config) | {"logits": tiny.logits(grown.target, config)}
    with OtherKernels():
        other = gradients(grown.target, config) | {"logits": tiny.logits(grown.target, config)}
    gaps = {n: gap(other[n], x, limits[n]) for n, x in plain.items()}
    assert 0 < max(gaps.values()) <= ROUNDING, gaps


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("breaker", [None, "noise:scale=5"])
def test_a_wrong_share_in_one_tensor_is_no_rounding(name: str, breaker: str | None) -> None:
    """0.5001 where a half is right: in the weights seen in the logits, in the moments seen in the gradients."""
    grown = doubled(name, breaker=breaker)
    wrong = next(n for n, p in grown.plan.tensors.items() if "ffn" in axes.axes_of(p.spec) and len(p.shape) > 1)
    state = {n: x * (0.5001 / 0.5 if n == wrong else 1) for n, x in grown.state.items()}
    assert grown.drift() <= ROUNDING
    assert grown.drift_of(tiny.load(grown.plan.config, state), grown.plan.config) > WRONG
    if breaker is None:
        measured = gradients(grown.target, grown.plan.config)
        limit = allowed(lambda: gradients(grown.target, grown.plan.config))[wrong]
        read = reader({"exp_avg": gradients(grown.source, grown.config)})
        ours = realise(grown.plan.tensors[wrong], "exp_avg", read, torch.float64)
        assert gap(ours, measured[wrong], limit) <= ROUNDING
        assert gap(ours * (0.5001 / 0.5), measured[wrong], limit) > WRONG


def test_few_operations_need_no_measurement() -> None:
    x = torch.rand(100)
    assert gap(x / 3 * 3, x) <= ROUNDING / 16
    assert gap(x * (0.5001 / 0.5), x) > ROUNDING
    assert gap(x.double() * (0.5001 / 0.5), x.double()) > WRONG
    assert elementary(x, x.double()) == FEW * unit(torch.float32) * x.max().item()
    assert gap([1.0, 2.0], [1.0, 2.00001]) <= ROUNDING < gap([1.0, 2.0], [1.0, 2.0002])
    assert gap(torch.zeros(3), torch.zeros(3)) == 0 and gap(torch.zeros(3), torch.ones(3), 0.0) == float("inf")
