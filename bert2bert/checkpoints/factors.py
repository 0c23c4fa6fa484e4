"""Factors on Adam's learning rate, weight decay and epsilon, by which a grown run follows the run of its source.

A growth finds them (`growth.factors`), the manifest records them, the trainer may obey them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any


@dataclass(frozen=True)
class Factors:
    """What the learning rate, the weight decay and epsilon of a parameter are multiplied by."""

    lr: float = 1.0
    decay: float = 1.0
    """Of AdamW, which multiplies it by the learning rate: the two together stay as they were."""
    eps: float = 1.0

    def __mul__(self, other: Factors) -> Factors:
        """Those of one growth after another."""
        return Factors(self.lr * other.lr, self.decay * other.decay, self.eps * other.eps)

    def __pow__(self, share: float) -> Factors:
        """Obeyed by a share from 0, not at all, to 1: lr and decay multiply to 1 all the while."""
        return Factors(self.lr**share, self.decay**share, self.eps**share)


ONE = Factors()
_NUMBERS = tuple(entry.name for entry in fields(Factors))


@dataclass(frozen=True)
class GrowthFactors:
    """The factors of every parameter of a grown model."""

    other: Mapping[str, Factors] = field(default_factory=dict)
    """Parameter -> its factors, of those that have others than 1."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Parameter that has no factors -> why."""

    def of(self, name: str) -> Factors | None:
        """Of a parameter; None for one that has none."""
        return None if name in self.without else self.other.get(name, ONE)

    def distinct(self, names: Iterable[str]) -> set[Factors]:
        """The different factors of these parameters."""
        return {found for name in names if (found := self.of(name)) is not None}

    def renamed(self, name: Callable[[str], str]) -> GrowthFactors:
        """With other names for the parameters."""
        other = {name(old): factors for old, factors in self.other.items()}
        return GrowthFactors(other, {name(old): why for old, why in self.without.items()})

    def of_each(self, names: Mapping[str, str]) -> GrowthFactors:
        """Of other parameters. names: each -> the one here whose factors it has."""
        other = {new: self.other[old] for new, old in names.items() if old in self.other}
        return GrowthFactors(other, {new: self.without[old] for new, old in names.items() if old in self.without})

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> GrowthFactors:
        """From the object in a manifest, which `wrong` has no objection to."""
        other: dict[str, Factors] = {}
        for group in found.get("groups", ()):
            numbers = {key: float(group[key]) for key in _NUMBERS if key in group}
            other |= dict.fromkeys(group.get("parameters", ()), Factors(**numbers))
        without = [(name, one.get("why", "")) for one in found.get("without", ()) for name in one.get("parameters", ())]
        return cls(other, dict(without))

    def to_json(self) -> dict[str, Any]:
        """The object: parameters grouped by equal factors, and by equal reasons."""
        groups = [{**vars(factors), "parameters": names} for factors, names in _grouped(self.other).items()]
        without = [{"why": why, "parameters": names} for why, names in _grouped(self.without).items()]
        return {"groups": groups, "without": without}


def wrong(found: Mapping[str, Any] | None) -> str | None:
    """Which number in the object of a manifest is no factor, in words, if any."""
    for group in (found or {}).get("groups", ()):
        for key in _NUMBERS:
            if not 0 < group.get(key, 1.0) < inf:
                return f"growth.factors.groups[].{key} is {group[key]}, expected a positive number"
    return None


def _grouped(found: Mapping[str, Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, value in found.items():
        groups.setdefault(value, []).append(name)
    return groups
