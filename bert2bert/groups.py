"""Which optimizer parameter group each parameter belongs to: one rule for the trainer and for the checkpoint writer.

A native ZeRO file addresses a parameter by its place inside a flat group, so a checkpoint can be resumed only if writer
and trainer build the groups alike. Layouts:

* ``single``: one group, everything decays (a bare ``model.parameters()``).
* ``decay``: two groups, decay then no-decay, the habit of transformers scripts: biases and norms do not decay.
* ``layers``: this project's own: a (decay, no-decay) pair for the embeddings, for each layer, for the head and for the
  parts that no objective trains (pooler and next-sentence head), so that an optimizer step can skip a layer altogether.

Empty groups are left out. Order inside a group is the order of the names given (the model's own).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYOUTS = ("layers", "decay", "single")

_LAYER = re.compile(r"\.layer\.(\d+)\.")
_NO_DECAY = re.compile(r"(^|\.)(bias|LayerNorm\.weight|layer_norm\.weight|norm\.weight)$")


@dataclass(frozen=True)
class Group:
    """One optimizer group: ``part`` is 'all', 'embeddings', 'layer.<i>', 'head' or 'unused'."""

    part: str
    decay: bool
    names: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        """The layer's number when the group belongs to one, else None."""
        return int(self.part[6:]) if self.part.startswith("layer.") else None


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter: all but biases and normalisation gains."""
    return _NO_DECAY.search(name) is None


def part_of(name: str) -> str:
    """The part of the network a parameter is trained with under the ``layers`` layout.

    The word embedding is the decoder of the tied masked-LM head, so it learns with the head.
    """
    if found := _LAYER.search(name):
        return f"layer.{found[1]}"
    if "seq_relationship" in name or "pooler" in name:
        return "unused"
    if "embeddings" in name and "word_embeddings" not in name:
        return "embeddings"
    return "head"


def param_groups(names: Iterable[str], layout: str) -> list[Group]:
    """Sort parameter names (tied names once, model order) into the groups of a layout.

    Order of groups: embeddings, layers ascending, head, unused; decay before no-decay. Raises ValueError for an
    unknown layout (callers check user input first).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown group layout {layout!r}; known: {', '.join(LAYOUTS)}")
    parts: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        key = ("all" if layout != "layers" else part_of(name), layout == "single" or decays(name))
        parts.setdefault(key, []).append(name)

    def order(key: tuple[str, bool]) -> tuple[int, int, bool]:
        part, decay = key
        if part.startswith("layer."):
            return 1, int(part[6:]), not decay
        return {"all": 0, "embeddings": 0, "head": 2, "unused": 3}[part], 0, not decay

    return [Group(part, decay, tuple(parts[part, decay])) for part, decay in sorted(parts, key=order)]
