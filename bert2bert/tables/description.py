"""What a table of an architecture states: its rows and ties, and four parts: names, sizes, norms and compatibility.

Data alone: what follows from it and a config is in `table`; strings are read by the grammars of `expressions`, and
those of specs by `algebra.axes`. Nothing is checked here; tests compare every table with transformers' own models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bert2bert.tables.expressions import depth_axis


@dataclass(frozen=True)
class Row:
    """One line of a table: name pattern, spec, and when the tensor exists."""

    name: str
    """A *name*: ``{weight,bias}`` for two tensors, one depth axis in braces for the number of the layer."""
    spec: str
    """The axes, as `algebra.axes` reads them; a bias has the written ones alone."""
    needs: str = ""
    """Heads that the model must have or not have, a *needs*."""
    tied: bool | None = None
    """Only with (True) or without (False) a language-model head that is the word embedding."""
    when: str = ""
    """A condition on the config, a *when*."""
    only: tuple[int, int | None] = (0, None)
    """The range [first, end) of the layers that have it; None: all above."""
    untrained: bool = False
    """Whether pre-training with a language-model head leaves it alone."""
    decay: bool = True
    """Whether weight decay applies to a tensor of more than one dimension (to others it never does)."""

    @property
    def depth(self) -> str:
        """The depth axis that numbers this row's layers, '' outside the layers."""
        return depth_axis(self.name)

    def has(self, layer: int) -> bool:
        """Whether this layer has the tensor."""
        first, end = self.only
        return layer >= first and (end is None or layer < end)


@dataclass(frozen=True)
class Tie:
    """A tensor that is another one."""

    absent: str
    """Its name; a checkpoint need not hold it."""
    kept: str
    """The name of the other one."""
    needs: str = ""
    """As in `Row`."""
    tied: bool | None = True
    """As in `Row`."""


@dataclass(frozen=True)
class Names:
    """What transformers calls the model's classes and tensors."""

    prefix: str
    """Prefix of the base model's tensors inside the full model, with its dot; '' if none."""
    anchor: str
    """A tensor that every variant has, less the prefix."""
    classes: Mapping[str, frozenset[str]]
    """Transformers class -> its heads; the usual class first."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Transformers class -> its prefix, where it is another one."""
    ties: tuple[Tie, ...] = ()
    """Tensors that are others."""
    tie_default: bool = True
    """Transformers' default of tie_word_embeddings."""
    untie: str = ""
    """The key that tie_word_embeddings: false stands for in a class that is tied until a file stores another head."""
    ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Transformers class, '' for all -> globs of stored tensors that it does not have and leaves unread."""


@dataclass(frozen=True)
class Sizes:
    """The named axes: how long each is, and which of them change together, or cannot."""

    axes: Mapping[str, str]
    """Axis -> the *size* that the config gives it."""
    units: tuple[str, ...]
    """Axes whose features are whole units (heads, neurons), with maps that may differ by layer."""
    constants: Mapping[str, int] = field(default_factory=dict)
    """Axis -> its fixed size."""
    follows: Mapping[str, str] = field(default_factory=dict)
    """Axis -> the axis whose size and map it has: the coordinates after a norm follow the residual stream's."""
    depth: tuple[str, ...] = ("layers",)
    """The axes that number layers."""
    shallowest: int = 0
    """The fewest layers of a stack with which transformers makes the model: embeddings and head alone are one."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Axis of size one -> the axis by the root of whose size the model divides there; its gain: √(target / source)."""
    aligned: frozenset[str] = frozenset()
    """Those of the units that one tensor outside the layers ties together: one map for all layers."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why its size cannot change."""
    multiples: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Model type -> a config key, and the one whose multiple transformers wants it to be."""
    first_position: int = 0
    """Positions from which on rows are for tokens (RoBERTa keeps two for padding)."""


@dataclass(frozen=True)
class Norms:
    """The normalisations. In specs ``rho`` marks a norm's gain, and ``iota`` what norms inside attention read: as the
    others' epsilon changes with the width, so must that."""

    kind: str
    """'layer' or 'rms'."""
    pre: bool
    """Whether norms are inside the residual branches (pre-norm)."""
    eps: tuple[str, float]
    """The config key of their epsilon, and transformers' default."""
    axes: frozenset[str] = frozenset({"embed"})
    """Axes that a norm renormalises."""


@dataclass(frozen=True)
class Compatibility:
    """Which configs the rows describe, which two of them a growth may join, and which layers may replace others."""

    must_agree: Mapping[str, Any]
    """Config key that a growth cannot change -> its *default*."""
    agree_when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of them that matter only when one of these conditions (*when*) holds; 'heads' is a key: the model's."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Config key -> the only value that the rows describe, and its default."""
    kinds: str = ""
    """The config key that lists each layer's kind (attention pattern); '' where layers are alike."""
    every: tuple[str, int] = ("", 0)
    """Where that list is absent, the key, and its default, of the period with which full attention comes; 0: never."""
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Pattern of experts -> the patterns of a dense model's tensors that make one expert, in storage order."""
    dense_types: tuple[str, ...] = ()
    """Model types of the dense models that can be upcycled."""
