"""Which optimizer parameter group each parameter belongs to: one rule for the trainer and for the checkpoint writer.

A native ZeRO file addresses a parameter by its place inside a flat group, so a checkpoint can be resumed only if writer
and trainer build the groups alike. Layouts:

* ``single``: one group, everything decays (a bare ``model.parameters()``).
* ``decay``: two groups, decay then no-decay, as transformers' Trainer builds them: biases, norms and whatever else
  has "bias" in its name (T5's relative positions) do not decay.
* ``layers``: this project's own: a (decay, no-decay) pair for the embeddings, for each layer, for the head and for the
  parts that no objective trains (pooler and next-sentence head), so that an optimizer step can skip a layer altogether.

Where a run obeys the factors of a growth, a group holds parameters of equal ones. Empty groups are left out. Order
inside a group is the order of the parameters given (the model's own). What a parameter is, the table of its
architecture says (`tables.Parameter`); for models without a table `by_name` guesses it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bert2bert.checkpoints.factors import ONE, Factors

LAYOUTS = ("layers", "decay", "single")

# The names by which transformers' Trainer knows what does not decay, besides modules of class nn.LayerNorm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")
_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.")


class Member(Protocol):
    """What decides the group of a parameter. part: of the network, 'embeddings', 'head', 'unused', or a layer, as
    'layer.3' (a stack's name and a number); decay: whether weight decay applies."""

    @property
    def part(self) -> str: ...

    @property
    def decay(self) -> bool: ...


@dataclass(frozen=True)
class Place:
    """A `Member` by itself."""

    part: str
    decay: bool


@dataclass(frozen=True)
class Group:
    """One optimizer group. part: as of `Member`, or 'all'; factors: of its parameters, where a run may obey them."""

    part: str
    decay: bool
    names: tuple[str, ...]
    factors: Factors = ONE


def by_name(shapes: Mapping[str, Collection[int]], aliases: Mapping[str, str] | None = None) -> dict[str, Place]:
    """The parameters of a model of which no table is known, in the model's order, by what names and shapes tell.

    Weights of more than one dimension decay, unless the name is one that transformers' Trainer excludes. A name with a
    number in it is of a layer: 'layer.<number>' in the first stack of layers, '<the stack's name>.<number>' in others.
    Of the rest, what comes before the layers is 'embeddings', what comes after them 'head'. An embedding that is tied
    to an output (aliases: absent tied name -> kept name) learns with the head; beside a language-model head,
    poolers and next-sentence heads are 'unused'.
    """
    outputs = {kept for absent, kept in (aliases or {}).items() if "embed" not in absent}
    lm = bool(outputs) or any(word in name for name in shapes for word in ("lm_head", "predictions"))
    stacks: list[str] = []
    found: dict[str, Place] = {}
    for name, shape in shapes.items():
        if numbered := _NUMBERED.match(name):
            stack, number = numbered.groups()
            stacks += [stack] if stack not in stacks else []
            part = f"{'layer' if stack == stacks[0] else stack}.{number}"
        elif lm and ("seq_relationship" in name or "pooler" in name):
            part = "unused"
        else:
            part = "head" if stacks or name in outputs else "embeddings"
        found[name] = Place(part, len(shape) > 1 and not _NO_DECAY.search(name.lower()))
    return found


def param_groups(
    members: Mapping[str, Member], layout: str, factors: Mapping[str, Factors] | None = None
) -> list[Group]:
    """Sort parameters (tied names once, model order) into the groups of a layout.

    Order of groups: embeddings, layers (stacks as they come, numbers ascending), head, unused; decay before no-decay.
    ``factors``: of parameters by name, those that are not named have none; groups of different ones come in the model's
    order. Raises ValueError for an unknown layout (callers check user input first).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown group layout {layout!r}; known: {', '.join(LAYOUTS)}")
    found: dict[tuple[str, bool, Factors], list[str]] = {}
    for name, member in members.items():
        part, decay = member.part if layout == "layers" else "all", layout == "single" or member.decay
        found.setdefault((part, decay, (factors or {}).get(name, ONE)), []).append(name)
    stacks = list(dict.fromkeys(part.rpartition(".")[0] for part, _, _ in found))

    def order(key: tuple[str, bool, Factors]) -> tuple[int, int, int, bool]:
        part, decay, _ = key
        stack, _, number = part.rpartition(".")
        if stack:
            return 1, stacks.index(stack), int(number), not decay
        return {"all": 0, "embeddings": 0, "head": 2, "unused": 3}[part], 0, 0, not decay

    return [Group(*key[:2], tuple(found[key]), key[2]) for key in sorted(found, key=order)]


def refines(groups: Iterable[Sequence[str]], whole: Iterable[Group]) -> bool:
    """Whether the groups are parts of the whole ones, as those of a run that obeys factors are."""
    of = {name: i for i, group in enumerate(whole) for name in group.names}
    places = [{of.get(name) for name in group} for group in groups]
    return all(len(place) == 1 for place in places) and sorted(of) == sorted(name for group in groups for name in group)
