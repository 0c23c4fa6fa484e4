"""Which layers run and which learn in one optimizer step. Torch-free.

A layer program never changes a result: it runs the layers it names, in its order, and decides how far back the gradient
goes. Refused, because it could not cost nothing or would be ambiguous: learning layers that are not the top of the run,
a layer that is frozen at one place and learns at another, embeddings that learn below frozen layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from bert2bert.errors import InvalidConfig


@dataclass(frozen=True)
class LayerProgram:
    """run: layer numbers, in the order in which they run. learn: the last len(learn) of them, they get gradients.

    embeddings_learn: whether the gradient goes on into the embeddings (then every layer that runs must learn). The word
    embedding of a tied masked-LM head gets the head's gradient either way, for the head always learns.
    Raises InvalidConfig when the three contradict each other.
    """

    run: tuple[int, ...]
    learn: tuple[int, ...]
    embeddings_learn: bool

    def __post_init__(self) -> None:
        if not self.run:
            raise InvalidConfig("layer program: no layer runs; expected at least one layer number in `run`")
        frozen = self.run[: len(self.run) - len(self.learn)]
        if self.run[len(frozen) :] != self.learn:
            raise InvalidConfig(
                f"layer program: the layers that learn, {self.learn}, are not the last ones that run, {self.run}; "
                "expected `learn` to be the end of `run`, since the gradient stops below the lowest learning layer"
            )
        if both := sorted(set(frozen) & set(self.learn)):
            raise InvalidConfig(
                f"layer program: layer {both[0]} runs both frozen and learning (run {self.run}, learn {self.learn}); "
                "expected each layer to do one of the two"
            )
        if self.embeddings_learn and frozen:
            raise InvalidConfig(
                f"layer program: the embeddings learn but layers {frozen} above them are frozen; "
                "expected every layer of `run` in `learn`, or embeddings_learn=False"
            )

    @property
    def frozen(self) -> tuple[int, ...]:
        """The layers that run without gradient, in order."""
        return self.run[: len(self.run) - len(self.learn)]

    def check(self, layers: int) -> LayerProgram:
        """The program itself; InvalidConfig when it names a layer that a model of `layers` layers does not have."""
        for layer in self.run:
            if not 0 <= layer < layers:
                raise InvalidConfig(
                    f"layer program: runs layer {layer}, the model has layers 0 to {layers - 1}; "
                    "correct the recipe's layer program or the model's num_hidden_layers"
                )
        return self


def full(layers: int) -> LayerProgram:
    """Every layer of a model of `layers` layers runs and learns, and so do the embeddings."""
    return LayerProgram(run=tuple(range(layers)), learn=tuple(range(layers)), embeddings_learn=True)
