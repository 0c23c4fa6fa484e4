"""The growth before a phase: which sizes the model gets, by which operators. Knows no operator and imports no torch.

Refuses (`InvalidConfig`): no change of the model, a size that is not whole, and a mix without its share. Whether the
operators can do it, `commands.phase_growth.check` says before a run starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from bert2bert.errors import InvalidConfig

_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")


def _any_keys(model: Any) -> dict[str, Any]:
    """Every key that the dict has: which there may be depends on the model before, see `Grow.target`."""
    return dict.fromkeys(model, Any) if isinstance(model, Mapping) else {}


@dataclass(frozen=True)
class Grow:
    """How the model that the phase before has trained becomes this phase's.

    ``model``: the keys of the model's config that change: a value, or a multiple of the one before (``"2x"``); with
    another model_type it is the whole config. ``width`` to ``seed``: as the options of `bert2bert grow`. ``lossy``:
    accept a width that misses its operator's promise. ``mix_with``: an earlier phase, of whose last weights and moments
    1 - ``alpha`` is taken and ``alpha`` of the grown ones. ``max_loss_increase``: nats by which the held-out loss may
    rise at the growth; None: as safety.growth_loss_increase.
    """

    model: Annotated[dict[str, Any], _any_keys]
    width: str = "fpi"
    depth: str = "stack"
    vocab: str | None = None
    positions: str | None = None
    experts: str | None = None
    embeddings: str | None = None
    break_symmetry: str | None = None
    moments: str | None = None
    seed: int = 0
    lossy: bool = False
    mix_with: str | None = None
    alpha: float | None = None
    max_loss_increase: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidConfig('grow.model is empty; expected the sizes that change, such as {"hidden_size": 768}')
        if (self.mix_with is None) != (self.alpha is None):
            raise InvalidConfig("grow.mix_with and grow.alpha belong together: an earlier phase, and the grown's share")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InvalidConfig(f"grow.alpha is {self.alpha!r}; expected a share from 0 to 1")

    def target(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the grown model. before: that of the model which grows. Raises InvalidConfig."""
        kind = self.model.get("model_type", before.get("model_type", "bert"))
        if kind != before.get("model_type", "bert"):
            return dict(self.model)
        return {**before, **{key: _sized(key, before.get(key), value) for key, value in self.model.items()}}

    @property
    def operators(self) -> dict[str, Any]:
        """The keyword arguments of `growth.choices.Choices.parse`."""
        return {
            "width": self.width, "depth": self.depth, "vocab": self.vocab, "positions": self.positions,
            "experts": self.experts, "breaker": self.break_symmetry, "moments": self.moments, "seed": self.seed,
            "embeddings": self.embeddings,
        }  # fmt: skip


def _sized(key: str, old: Any, new: Any) -> Any:
    """A changed value; ``"2x"`` is twice the old."""
    found = _TIMES.fullmatch(new) if isinstance(new, str) else None
    if found is None:
        return new
    if not isinstance(old, int) or isinstance(old, bool):
        raise InvalidConfig(f"grow.model.{key} is {new!r}, but the model before has {old!r} there; write the size")
    size = old * float(found[1])
    if size != int(size):
        raise InvalidConfig(f"grow.model.{key} is {new!r} of {old}, which is {size:g}; expected a whole number")
    return int(size)
