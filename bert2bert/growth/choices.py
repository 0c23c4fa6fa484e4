"""What a user chooses of a growth, parsed: an operator for each kind of axis, the moments' policy, the seed.

Refuses unknown operators and options (`UnsupportedGrowth`, `InvalidConfig`), a policy that does not exist, and negative
seeds (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bert2bert.operators  # noqa: F401  (registers them)
from bert2bert.errors import InvalidConfig
from bert2bert.operators.registry import Chosen, parse_operator

EXTRA = {"vocab": "vocab", "positions": "pos", "experts": "experts"}
"""Kind of operator, besides width and depth -> the axis that it grows."""
KINDS = ("width", "depth", *EXTRA)
MOMENTS = ("exact", "carried", "reset", "asymmetric")


@dataclass(frozen=True)
class Choices:
    """How a model grows."""

    width: Chosen
    depth: Chosen
    vocab: Chosen | None = None
    positions: Chosen | None = None
    experts: Chosen | None = None
    breaker: Chosen | None = None
    """What tells copies apart (--break-symmetry)."""
    moments: str | None = None
    """A policy of `MOMENTS` in place of the operators' own."""
    seed: int = 0
    embeddings: Chosen | None = None
    """What becomes of tied embeddings; None: they are as in the source."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InvalidConfig(f"--seed is {self.seed}; expected a whole number of at least 0")
        if self.moments is not None and self.moments not in MOMENTS:
            raise InvalidConfig(f"--moments is {self.moments!r}; expected one of {', '.join(MOMENTS)}")

    @classmethod
    def parse(
        cls,
        *,
        width: str = "fpi",
        depth: str = "stack",
        vocab: str | None = None,
        positions: str | None = None,
        experts: str | None = None,
        breaker: str | None = None,
        moments: str | None = None,
        seed: int = 0,
        embeddings: str | None = None,
    ) -> Choices:
        """From ``NAME[:key=value,…]`` for each operator. Raises UnsupportedGrowth, InvalidConfig."""
        chosen = parse_operator(width, "width")
        if depth == chosen.operator.name == "ligo":
            depth = "stack"  # its maps cover the depth; so its recipe has it, from which verify plans it again
        optional = {
            "vocab": vocab, "positions": positions, "experts": experts, "breaker": breaker, "embeddings": embeddings,
        }  # fmt: skip
        found = {kind: parse_operator(text, kind) for kind, text in optional.items() if text is not None}
        found_depth = parse_operator(depth, "depth")
        return cls(chosen, found_depth, **found, moments=moments, seed=seed)

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any]) -> Choices:
        """From the recipe that is stored with a grown checkpoint. Raises UnsupportedGrowth, InvalidConfig."""
        texts = {key: recipe[key] for key in (*KINDS, "moments", "seed", "embeddings") if key in recipe}
        return cls.parse(**texts, breaker=recipe["break_symmetry"])

    def recipe(self) -> dict[str, Any]:
        """As a recipe stores them: operators that were not chosen are left out."""
        extra = {kind: chosen.text for kind, chosen in self.extra.items()}
        breaker = self.breaker.text if self.breaker else None
        common = {"break_symmetry": breaker, "moments": self.moments, "seed": self.seed}
        extra |= {"embeddings": self.embeddings.text} if self.embeddings else {}
        return {"width": self.width.text, "depth": self.depth.text, **extra, **common}

    @property
    def shrinks(self) -> bool:
        """Whether they make a model smaller."""
        return self.width.operator.shrinks or self.depth.operator.shrinks

    @property
    def extra(self) -> dict[str, Chosen]:
        """The operators on tokens, positions and experts, by kind, that were chosen."""
        found = {"vocab": self.vocab, "positions": self.positions, "experts": self.experts}
        return {kind: chosen for kind, chosen in found.items() if chosen is not None}
