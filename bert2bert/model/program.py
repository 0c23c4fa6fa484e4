"""Which layers run and which parts learn in one optimizer step. Torch-free.

A step never changes a result: it runs the layers that it names, in its order, and says which parts of the model learn.
A layer named twice runs twice, with the same weights. The gradient goes down to the lowest part that learns, through
layers that rest; below it nothing is computed for it.

Refused (`InvalidConfig`): a step that runs none of the layers there are or teaches nothing, layers and parts that the
model lacks, and a layer that learns without running, for an optimizer would move it without a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bert2bert.errors import InvalidConfig, did_you_mean

SHARES = ("mean", "sum")


@dataclass(frozen=True)
class Step:
    """What one optimizer step does with the layers.

    run: layer numbers, in the order in which they run. learn: parts as the architecture's table names them,
    "embeddings", "layer.3", "head"; a word embedding that is the head's decoder, too, is part of the head, and has the
    gradient of its look-up only where the embeddings learn. share: the gradient of a layer that runs n times, the
    "mean" over its uses or their "sum".
    """

    run: tuple[int, ...]
    learn: frozenset[str]
    share: str = "mean"

    def __post_init__(self) -> None:
        if not self.learn:
            raise InvalidConfig("nothing learns; expected at least one part in `learn`, such as 'head'")
        if self.share not in SHARES:
            raise InvalidConfig(f"share is {self.share!r}; expected 'mean' or 'sum'")

    def check(self, parts: Sequence[str]) -> Step:
        """The step itself. parts: of the model's layers, in order. Raises InvalidConfig where it does not fit them."""
        if parts and not self.run:
            raise InvalidConfig("no layer runs; expected at least one layer number in `run`")
        for layer in self.run:
            if not 0 <= layer < len(parts):
                has = f"layers 0 to {len(parts) - 1}" if parts else "no layers"
                raise InvalidConfig(f"layer {layer} runs, but the model has {has}")
        known = {"embeddings", "head", *parts}
        if unknown := sorted(self.learn - known):
            raise InvalidConfig(f"unknown part {unknown[0]!r} learns: {did_you_mean(unknown[0], sorted(known))}")
        if idle := sorted(self.learn - {"embeddings", "head"} - self.uses(parts).keys()):
            raise InvalidConfig(f"{idle[0]} learns, but does not run; expected it in `run`, or not in `learn`")
        return self

    def uses(self, parts: Sequence[str]) -> Counter[str]:
        """How often each layer runs, by its part."""
        return Counter(parts[layer] for layer in self.run)

    def lowest(self, parts: Sequence[str]) -> int:
        """The place of `run` from which on gradients are computed: 0 if the embeddings learn, len(run) if the head
        learns alone."""
        if "embeddings" in self.learn:
            return 0
        learning = (place for place, layer in enumerate(self.run) if parts[layer] in self.learn)
        return next(learning, len(self.run))


def full(parts: Sequence[str]) -> Step:
    """Every layer runs once and all learn, with embeddings and head. parts: of the layers, in order."""
    return Step(run=tuple(range(len(parts))), learn=frozenset({"embeddings", "head", *parts}))
