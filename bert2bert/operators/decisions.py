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
        other = {*TOKENS, "experts", *self.table.sizes.depth, *self.table.sizes.follows}
        return tuple(a for a in self.table.sizes.axes if a not in other and self.small[a] != self.large[a])

    @property
    def output_biases(self) -> frozenset[str]:
        """Patterns of biases that write the residual stream, of the rows that name a weight and its bias together."""
        rows = [r for r in self.table.rows if r.depth and r.name.endswith("{weight,bias}")]
        writers = [r.name for r in rows if "embed" in axes_of(r.spec) - read_axes(r.spec)]
        return frozenset(name.replace("{weight,bias}", "bias") for name in writers)

    @property
    def layers(self) -> int:
        """How many layers of one stack the source has at most."""
        return max(self.small[axis] for axis in self.table.sizes.depth)

    def draws(self, axis: str) -> int:
        """How many maps an axis has: one a layer for units, else one for the whole network; one without layers, too."""
        return max(1, self.layers) if axis in self.table.sizes.units and axis not in self.table.sizes.aligned else 1

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for one choice."""
        return np.random.default_rng((self.seed, *key))


@dataclass(frozen=True)
class Copying:
    """Which entries of the source a tensor is made of, beyond what the maps of its axes say."""

    nothing: bool = False
    """Nothing at all: every tensor is drawn at random."""
    borrow: int = 0
    """Where fresh units come from, as an offset to their layer (1: the layer above)."""
    blocks: int = 0
    """Weights that both write and read grown axes are block-diagonal in this many blocks; 0 = they are not."""
    given: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Tensor -> rows of new tokens, in the source's coordinates."""
    terms: Callable[[Any, Parameter], tuple[Term, ...]] | None = None
    """Makes all terms of a tensor, which are summed, in place of the maps and of the depth operator; its first argument
    is the `Builder`."""

    def __or__(self, other: Copying) -> Copying:
        return replace(self, given={**self.given, **other.given})


@dataclass(frozen=True)
class Fresh:
    """What entries are that the source does not have, where that is not the initialisation of training from scratch."""

    blank: frozenset[str] = frozenset()
    """Axes, '~' in front where read, whose silent positions are zero."""
    std: Mapping[str, float] = field(default_factory=dict)
    """Factors on the standard deviation by axis, '~' in front where read; under '' what replaces the config's."""

    def __or__(self, other: Fresh) -> Fresh:
        return Fresh(self.blank | other.blank, {**self.std, **other.std})


@dataclass(frozen=True)
class Norms:
    """What becomes of the model's norms."""

    eps: float = 1.0
    """Factor on their epsilon."""
    averaged: bool = False
    """They are exact, or known not to be, though features have unequally many copies."""


@dataclass(frozen=True)
class Reasons:
    """Why an operator does not keep what it could keep, and its advice."""

    function: tuple[str, ...] = ()
    softmax: tuple[str, ...] = ()
    """Those of ``function`` by which only probabilities change, not the logits of old tokens."""
    moments: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Advice to print."""

    def __or__(self, other: Reasons) -> Reasons:
        return Reasons(
            self.function + other.function,
            self.softmax + other.softmax,
            self.moments + other.moments,
            self.notes + other.notes,
        )


@dataclass(frozen=True)
class Width:
    """What an operator decides on the axes of a model: on its width, tokens, positions or experts."""

    name: str
    maps: Mapping[str, Gather | tuple[Gather, ...]] = field(default_factory=dict)
    """Axis -> one map, or one a source layer for unit axes; axes left out follow their table's rule or stay."""
    copying: Copying = Copying()
    fresh: Fresh = Fresh()
    norms: Norms = Norms()
    reasons: Reasons = Reasons()
    keeps_moments: bool = False
    """Moments of old entries are kept as they are, not mapped."""
    noise: float = 0.0
    """Scale of null-space noise, of the config's initializer_range; 0 = none."""
    recorded: str = ""
    """The operator and its options as a recipe stores them, '' = as they were given."""

    def __or__(self, other: Width) -> Width:
        """This width and what an operator on tokens, positions or experts adds."""
        return replace(
            self,
            maps={**self.maps, **other.maps},
            copying=self.copying | other.copying,
            fresh=self.fresh | other.fresh,
            reasons=self.reasons | other.reasons,
        )


@dataclass(frozen=True)
class Layer:
    """Where a target layer comes from."""

    source: int | None
    """The source layer; None: drawn at random."""
    identity: bool = False
    """Its residual branches write zero, so that it changes nothing where norms are inside the branches."""
    moment: float = 1.0
    """Factor on the source's gradients."""
    step: float = 1.0
    """Factor on the weights and biases by which its residual branches write the stream, whose gradients it divides."""
    runs: int = 1
    """How many times the source runs this layer, with shared weights."""

    def __str__(self) -> str:
        return f"{'new' if self.source is None else self.source}{'+0' if self.identity else ''}"
