"""The growth operators in Python, by name: ``from bert2bert import growths as g``.

    g.then(g.stack(2), g.fpi(embed=768, choice="left")).plan(config)
    g.interpolate(g.grow(), g.decoalesce(2), 0.5).plan(large, small)

Every operator that ``bert2bert operators`` lists is here: g.NAME(factor), which multiplies what it grows (a shrinking
one divides), g.NAME(axis=size, …), or g.NAME(config) to grow into; all with the operator's options, seed, breaker and
moments. A name of several kinds grows both width and depth by a factor, or those whose sizes are given. The depth
operator ``interpolate`` is g.grow(depth="interpolate", layers=…), for the name is taken here by the mean of two models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bert2bert.errors import did_you_mean
from bert2bert.growth.steps import KINDS, Step, grow, interpolate, named, then
from bert2bert.operators.registry import OPERATORS

__all__ = ["Step", "grow", "interpolate", "then"]


def __getattr__(name: str) -> Callable[..., Step]:
    known = _names()
    if name not in known:
        raise AttributeError(f"bert2bert.growths has no operator {name!r}; {did_you_mean(name, known)}")
    return partial(named, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_names()})


def _names() -> list[str]:
    return sorted({name for kind in KINDS for name in OPERATORS[kind]})
