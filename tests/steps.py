"""Steps of layer programs for models of one stack, by the numbers of their layers."""

from __future__ import annotations

from collections.abc import Sequence

from bert2bert.model.program import Step, full


def some(run: Sequence[int], learn: Sequence[int], embeddings_learn: bool) -> Step:
    """Some layers run; some of them, the head and maybe the embeddings learn."""
    learning = {"head", *(f"layer.{i}" for i in learn), *(["embeddings"] if embeddings_learn else [])}
    return Step(tuple(run), frozenset(learning))


def whole(layers: int) -> Step:
    """All of so many layers run and learn."""
    return full([f"layer.{i}" for i in range(layers)])
