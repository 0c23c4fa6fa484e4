"""How far apart rounding may bring two computations of the same numbers: the one place that says so, for all tests.

A constant such as 1e-12 tests the machine: other kernels add in another order, and a computation with large terms that
cancel magnifies what they do by thousands. So the bound is measured on the computation itself. It is run once more with
every operand of every operation, forward and backward, moved at random by up to `NUDGE` = 2^-30 of itself, as rounding
moves it by up to 2^-53. What the results move by, divided by NUDGE, is how much this computation magnifies rounding. It
is the same number on every machine, for 2^-30 stands far above rounding and far below what is not linear. Times 2^-53,
it is about what the logits of two kernels differ by, be it 10 or 10 million units, and a few times less than what small
gradients may. Allowed is `SPARE` times as much. A law that is wrong in the fourth digit is still off by a thousand
times that and more: tests/test_rounding.py tries it.

`gap` gives the difference of two results as a multiple of what is allowed. State a law as ``gap(...) <= ROUNDING`` and
its guard, that something else is not the same, as ``gap(...) > WRONG``. What comes of a few operations on each entry
needs no measurement: without one, `gap` allows `FEW` units of rounding of the largest entry, in the coarser dtype of
the two. Results of the same operations on the same numbers are compared bit for bit.

With ROUNDING_LOG=file in the environment, every gap is appended to the file, with the test that asked for it: those of
laws should be at most 1/16, those of guards at least 16000.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

NUDGE = 2.0**-30
SPARE = 1024
FEW = 128
ROUNDING = 1.0
WRONG = 1000.0
SINGLE = FEW * 2.0**-24  # the limit of what is relative already, in float32
_MASK = 1e30  # larger scores are masks, and the most negative number is none any more when it is moved


class Nudged(TorchDispatchMode):
    """Every floating-point operand is moved by up to NUDGE of itself, except what an operation writes to or views."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = torch.Generator().manual_seed(0)

    def nudge(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        factor = torch.rand(x.shape, generator=self.draws, dtype=x.dtype).mul_(2 * NUDGE).add_(1 - NUDGE)
        return torch.where(x.abs() < _MASK, x * factor, x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = func._schema.arguments
        args = [x if a.alias_info is not None else tree_map(self.nudge, x) for x, a in zip(args, taken, strict=False)]
        return func(*args, **(kwargs or {}))


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype: 2^-53 in float64."""
    return torch.finfo(dtype).eps / 2


def largest(x: Tensor) -> float:
    """The largest magnitude."""
    return x.detach().abs().max().item() if x.numel() else 0.0


def allowed(
    compute: Callable[[], Any], dtype: torch.dtype = torch.float64, spare: float = SPARE, plain: Any = None
) -> Any:
    """What rounding to a dtype may make of a result, at most; of a dict of results, or several, for each.

    ``compute`` runs in float64 whatever the dtype is, for a nudge of 2^-30 shows in no other. plain: what it gives,
    where that is known already.
    """

    def limit(plain: Tensor, moved: Tensor) -> float:
        assert plain.dtype == torch.float64, plain.dtype
        return spare * unit(dtype) * max(largest(moved - plain) / NUDGE, largest(plain))

    plain = compute() if plain is None else plain
    with Nudged():
        moved = compute()
    if isinstance(plain, Mapping):
        return {name: limit(x, moved[name]) for name, x in plain.items()}
    if isinstance(plain, list | tuple):
        return [limit(x, y) for x, y in zip(plain, moved, strict=True)]
    return limit(plain, moved)


def elementary(*operands: Tensor) -> float:
    """What rounding may make of a few operations on each entry: FEW units of the largest, in the coarsest dtype."""
    return FEW * max(unit(x.dtype) for x in operands) * max(map(largest, operands))


def squared(limit: float, x: Tensor) -> float:
    """What rounding may make of a square, given what it may make of the value."""
    return (2 * largest(x) + limit) * limit


def gap(found: Any, expected: Any, limit: float | None = None) -> float:
    """The largest difference of any entry as a multiple of the limit, by default of what is `elementary`.

    Numbers that are no tensors, such as losses, count as float32.
    """
    found, expected = (torch.as_tensor(x) for x in (found, expected))
    if limit is None:
        limit = elementary(found, expected)
    difference = largest(found.double() - expected.double())
    ratio = difference / limit if limit else float("inf") if difference else 0.0
    if log := os.environ.get("ROUNDING_LOG"):
        with open(log, "a") as file:
            file.write(f"{ratio:.3g} {os.environ.get('PYTEST_CURRENT_TEST')}\n")
    return ratio
