"""What the operators see and decide: the two models of a growth, a width (maps on axes) and a depth (layers).

Holds data only; knows no operator. Refuses (`UnsupportedGrowth`) other labels in the target than in the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra.axes import axes_of, read_axes
from bert2bert.algebra.maps import Gather
from bert2bert.algebra.plan import Term
from bert2bert.errors import UnsupportedGrowth
from bert2bert.tables import Parameter, Table, table_for

TOKENS = ("vocab", "pos", "types", "classes", "labels")  # axes that index tokens or classes: no width grows them


def check_labels(table: Table, source: Mapping[str, Any], target: Mapping[str, Any], heads: frozenset[str]) -> None:
    """Refuse (UnsupportedGrowth) other labels in the target, where a head has them. table: the source's."""
    have, want = (table_for(config).axis_sizes(config)["labels"] for config in (source, target))
    if have != want and any("labels" in axes_of(p.spec) for p in table.parameters(source, heads).values()):
        raise UnsupportedGrowth(
            f"the target's {table.key('labels')} makes {want} labels, the source's {have}: no operator grows them; "
            f"give the target config the source's {table.key('labels')}"
        )


@dataclass(frozen=True)
class Pair:
    """The source and the target model: configs and axis sizes by the target's table; seed of every choice; heads that
    the checkpoint has."""

    table: Table
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    small: Mapping[str, int]
    large: Mapping[str, int]
    seed: int = 0
    heads: frozenset[str] = frozenset()

    @property
    def grown(self) -> tuple[str, ...]:
        """The axes whose size changes and that a width operator maps, in the table's order."""
        other = {*TOKENS, "experts", *self.table.depth, *self.table.follows}
        return tuple(a for a in self.table.sizes if a not in other and self.small[a] != self.large[a])

    @property
    def output_biases(self) -> frozenset[str]:
        """The patterns of the biases, among those that stand with their weight, of what writes the residual stream."""
        rows = [r for r in self.table.rows if r.depth and r.name.endswith("{weight,bias}")]
        writers = [r.name for r in rows if "embed" in axes_of(r.spec) - read_axes(r.spec)]
        return frozenset(name.replace("{weight,bias}", "bias") for name in writers)

    @property
    def layers(self) -> int:
        """How many layers of one stack the source has at most."""
        return max(self.small[axis] for axis in self.table.depth)

    def draws(self, axis: str) -> int:
        """How many maps an axis has: one a layer for units, else one for the whole network."""
        return self.layers if axis in self.table.units and axis not in self.table.aligned else 1

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for one choice."""
        return np.random.default_rng((self.seed, *key))


@dataclass(frozen=True)
class Width:
    """What a width operator decides.

    maps[axis]: one map, or one per source layer for unit axes; axes left out follow their table's rule or stay as they
    are. borrow: where fresh units come from, as an offset to their layer (1: the layer above). copy: False when nothing
    is copied. blocks: weights that both write and read grown axes are block-diagonal in this many blocks.
    blank: axes, '~' in front where read, whose silent positions are filled with zeros, not at random.
    kept: moments of old entries are kept as they are. noise: scale of null-space noise, as --break-symmetry noise has.
    eps: factor on the norms' epsilon. averaged: a norm is exact though features have unequally many copies.
    std: factors on the standard deviation of fresh entries by axis ('~' in front where read); under '' what takes the
    place of the config's own. function, moments: reasons why those are not kept; softmax: those of ``function`` by
    which only probabilities change. notes: advice to print.
    given: rows of new tokens by tensor, in the source's coordinates. said: the operator and its options as a recipe
    stores them, '' = as they were given.
    terms: makes all terms of a tensor, which are summed, in place of the maps and of the depth operator too; its first
    argument is the `Builder`.
    """

    name: str
    maps: Mapping[str, Gather | tuple[Gather, ...]] = field(default_factory=dict)
    borrow: int = 0
    copy: bool = True
    blocks: int = 0
    blank: frozenset[str] = frozenset()
    kept: bool = False
    noise: float = 0.0
    eps: float = 1.0
    averaged: bool = False
    std: Mapping[str, float] = field(default_factory=dict)
    function: tuple[str, ...] = ()
    softmax: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    given: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    said: str = ""
    terms: Callable[[Any, Parameter], tuple[Term, ...]] | None = None

    def __or__(self, other: Width) -> Width:
        """This width and what an operator on tokens, positions or experts adds."""
        return replace(
            self,
            maps={**self.maps, **other.maps},
            blank=self.blank | other.blank,
            given={**self.given, **other.given},
            function=self.function + other.function,
            softmax=self.softmax + other.softmax,
            moments=self.moments + other.moments,
            notes=self.notes + other.notes,
        )


@dataclass(frozen=True)
class Layer:
    """Where a target layer comes from: a source layer (None: drawn at random); identity: its residual branches write
    zero, so that it changes nothing where norms stand inside the branches; moment: factor on the source's gradients;
    runs: how many times the source runs this layer, with shared weights."""

    source: int | None
    identity: bool = False
    moment: float = 1.0
    runs: int = 1

    def __str__(self) -> str:
        return "new" if self.source is None else f"{self.source}{'+0' if self.identity else ''}"
