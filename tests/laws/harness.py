"""What every law needs: a scrambled model, its growth, and the laws themselves as functions that a test calls.

All in float64 against transformers' own models; logits are compared, never best guesses. What counts as equal is stated
in tests/rounding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import Read, realise, values
from bert2bert.tables import table_for
from tests import tiny
from tests.planning import plan_growth
from tests.rounding import ROUNDING, allowed, gap, squared

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def reader(states: Mapping[str, Mapping[str, Tensor]]) -> Read:
    """Tensors in memory as a checkpoint's reader."""
    return lambda name, state, start, stop: states[state][name][start:stop]


def scrambled(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A model with random values everywhere."""
    model = tiny.build(config)
    tiny.scramble(model, seed)
    return model


def detached(model: torch.nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """Canonical name -> value."""
    return {n: p.detach().clone() for n, p in tiny.parameters(model, config).items()}


@tiny.remembered
def source_of(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """The scrambled model of a config and a seed, which many growths start from."""
    return scrambled(config, seed)


@tiny.remembered
def source_logits(config: dict[str, Any], seed: int) -> Tensor:
    return tiny.logits(source_of(config, seed), config)


@tiny.remembered
def source_gradients(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    return gradients(source_of(config, seed), config)


def gradients(model: torch.nn.Module, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Canonical name -> gradient of the loss; parameters that do not enter it are left out."""
    model.zero_grad()
    tiny.loss(model, config, seed).backward()
    return {n: p.grad.clone() for n, p in tiny.parameters(model, config).items() if p.grad is not None}


def realised(plan: GrowthPlan, read: Read | list[Read], state: str = "fp32") -> dict[str, Tensor]:
    """Every tensor of a plan in float64, those it rests on included."""
    rows = values(plan, read if isinstance(read, list) else [read], torch.float64)
    return {n: rows(n, state, 0, p.shape[0]) for n, p in plan.tensors.items()}


@dataclass
class Grown:
    """A scrambled source model, a plan, and what the plan makes of it."""

    config: dict[str, Any]
    plan: GrowthPlan
    seed: int = 0

    @cached_property
    def source(self) -> torch.nn.Module:
        return source_of(self.config, self.seed)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return detached(self.source, self.config)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return realised(self.plan, reader({"fp32": self.weights}))

    @cached_property
    def target(self) -> torch.nn.Module:
        return tiny.load(self.plan.config, self.state)

    def drift(self) -> float:
        """The `gap` of the logits of source and target (of the source's vocabulary)."""
        return self.drift_of(self.target, self.plan.config)

    def drift_of(self, target: torch.nn.Module, config: dict[str, Any]) -> float:
        """The same of another target."""
        a = source_logits(self.config, self.seed)

        def logits() -> Tensor:
            return tiny.logits(target, config)[:, : a.shape[1]]

        found = logits()
        return gap(found, a, allowed(logits, plain=found))


def grow(name: str, sizes: Mapping[str, int] | None = None, seed: int = 1, keys: Mapping[str, Any] | None = None,
         target: Mapping[str, Any] | None = None, **how: Any) -> Grown:  # fmt: skip
    """Grow a variant of tests.tiny: sizes by axis, ``keys`` of its config changed first, ``target``'s keys changed only
    in the grown config."""
    config = tiny.config_of(name, **(keys or {}))
    large = table_for(config).resize(config, dict(sizes or {})) | dict(target or {})
    return Grown(config, plan_growth(config, large, seed=seed, **how))


def assert_same_logits(grown: Grown) -> None:
    """The function is kept, and the plan says so."""
    assert grown.plan.exactness.function == (), grown.plan.exactness
    assert grown.drift() <= ROUNDING


def assert_gradient_rule(grown: Grown) -> int:
    """Gradients, and so the moments, of the grown network are what the plan says; the number of tensors checked."""
    assert grown.plan.exactness.moments == (), grown.plan.exactness
    g, measured = source_gradients(grown.config, grown.seed), gradients(grown.target, grown.plan.config)
    limits = allowed(lambda: gradients(grown.target, grown.plan.config), plain=measured)
    states = reader({"exp_avg": g, "exp_avg_sq": {n: x.square() for n, x in g.items()}})
    checked = 0
    for name, tensor in grown.plan.tensors.items():
        if name not in measured or any(s not in g for s in tensor.sources):
            continue
        m, v = (realise(tensor, state, states, torch.float64) for state in ("exp_avg", "exp_avg_sq"))
        assert gap(m, measured[name], limits[name]) <= ROUNDING, name
        assert gap(v, measured[name].square(), squared(limits[name], measured[name])) <= ROUNDING, name
        checked += 1
    assert checked >= 0.8 * len(grown.plan.tensors)
    return checked


def assert_slices(plan: GrowthPlan, weights: Mapping[str, Tensor]) -> None:
    """A narrowed plan is a slice of the whole, bit for bit, in float32 and for every state: from the middle of every
    tensor, and its first row, its last and none, each for one of the states."""
    single = {n: w.float() for n, w in weights.items()}
    read = reader(dict.fromkeys(STATES, single))
    for i, tensor in enumerate(plan.tensors.values()):
        for j, state in enumerate(STATES):
            whole = realise(tensor, state, read)
            n = len(whole)
            for start, stop in ((n // 3, n - 1), ((0, 1), (n - 1, n), (n // 2, n // 2))[(i + j) % 3]):
                part = tensor.narrow(start, max(start, stop))
                assert torch.equal(realise(part, state, read), whole[start : max(start, stop)]), (tensor.name, state)
