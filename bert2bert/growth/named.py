"""The tensors of a growth by the names of files: those of its source, and those of the checkpoint that it writes.

Refuses (UnsupportedGrowth) what `Stacked.check_alike` refuses, and native shards whose order is not known.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from bert2bert.algebra.realise import values
from bert2bert.checkpoints.stacked import Part, Stacked
from bert2bert.errors import UnsupportedGrowth
from bert2bert.growth.script_order import script_order
from bert2bert.growth.second_names import second_names
from bert2bert.growth.source_model import class_name

if TYPE_CHECKING:
    from torch import Tensor

    from bert2bert.checkpoints.source import Source
    from bert2bert.growth.opened import Growth
    from bert2bert.growth.source_model import CheckpointModel


@dataclass(frozen=True, eq=False)
class Named:
    """A growth whose tensors, canonical in its plan, have names in files."""

    growth: Growth
    source: Source
    """By the names of its files."""
    stored: dict[str, list[str]]
    """The source's tensors: canonical name -> names in its files, several where experts are stored one by one."""
    parts: dict[str, Part]
    """The target's tensors: name -> canonical name of what it is, or is a part of, in the plan."""
    aliases: dict[str, str]
    """The target's: absent tied name -> the name that is kept."""
    lacking: tuple[str, ...] = ()
    """Names of the source's state dict that the target's lacks, each of a tensor that has another name."""
    unread: tuple[str, ...] = ()
    """Names of no parameter that the source's state dict has without values, and so has the target's."""
    unknown: tuple[str, ...] = ()
    """Such names in layers of which the target has others."""

    @classmethod
    def of(cls, growth: Growth, format: str) -> Named:
        """Of a target of this format, with the second names of the script's modules in a run's files."""
        named, model = cls._of(growth, format), growth.model
        if "hub" in (growth.model.source.format, format):
            return named
        order = script_order(list(named.source.tensors), list(named.parts))
        if order is None and format == "zero":
            raise UnsupportedGrowth(
                f"{model.source.path}: its script registers modules in another order than transformers, and "
                "the grown model has some that the source has not, so the order of its native shards is not known.\n"
                "Use --format universal, which is addressed by name."
            )
        named = replace(named, parts={name: named.parts[name] for name in order or named.parts})
        own = _tied_names(model)
        before = [name for names in named.stored.values() for name in names]
        second, lacking = second_names(named.source.aliases, own, before, list(named.parts))
        unread = [name for name in named.source.unread if name not in own]
        deeper = set(before) != set(named.parts)
        unknown = tuple(name for name in unread if deeper and any(map(str.isdigit, name.split("."))))
        return replace(
            named, aliases={**second, **named.aliases}, lacking=tuple(lacking), unknown=unknown,
            unread=tuple(name for name in unread if name not in unknown),
        )  # fmt: skip

    @classmethod
    def _of(cls, growth: Growth, format: str) -> Named:
        """Of a target of this format: in a Hugging Face folder, and from one whose names have no prefix, the names are
        those of transformers; else the training script's own, as in the source."""
        model, plan = growth.model, growth.plan
        source, own = model.source, model.stored
        if format == "hub" or (source.format == "hub" and not model.naming.prefix):
            names = {name: class_name(model.table, plan.config, name) for name in (*plan.tensors, *plan.aliases)}
        else:
            names = {name: own(name) for name in (*plan.tensors, *plan.aliases)}
            for absent, kept in model.aliases().items():
                if own(absent) == own(kept):  # each has the other's name, or, untied, its own
                    names[absent if absent in plan.aliases else kept] = model.naming.spelled(kept)
        aliases = {names[absent]: names[kept] for absent, kept in plan.aliases.items()}
        if isinstance(source, Stacked) and "hub" not in (source.format, format):
            source.check_alike()
            stored = {name: source.parts(own(name)) for name in model.parameters}
            canonical = {names[name]: name for name in plan.tensors}
            apart = source.apart({names[name]: tensor.shape for name, tensor in plan.tensors.items()})
            parts = {name: part._replace(name=canonical[part.name]) for name, part in apart.items()}
            return cls(growth, source.single, stored, parts, aliases)
        parts = {names[name]: Part(name, tensor.shape) for name, tensor in plan.tensors.items()}
        return cls(growth, source, {name: [own(name)] for name in model.parameters}, parts, aliases)

    def made_of(self) -> dict[str, list[str]]:
        """The source's tensors that each target tensor is made of, the one with the most steps first of those that are
        stored apart."""
        step = self.source.step
        first = {name: sorted(stored, key=step, reverse=True) for name, stored in self.stored.items()}
        made = {
            name: [own for root in self.growth.roots(name) for own in first[root]] for name in self.growth.plan.tensors
        }
        return {name: made[part.name] for name, part in self.parts.items()}

    def notes(self) -> list[str]:
        """What to know of the names, in sentences."""
        notes = []
        if self.lacking:
            notes.append(
                f"{len(self.lacking)} names of the source's state dict are left out, first {self.lacking[0]}: second "
                "names of tensors that have another one; a script that looks for them loads with "
                "load_module_strict=False"
            )
        if first := next((own for own in self.stored.values() if len(own) > 1), None):
            notes.append(
                f"experts are written one by one, as the source has them (first {first[0]}): for the script that wrote "
                "it; models of transformers 5 have them fused, and take the weights alone (--format hub)"
            )
        return notes

    def read(self) -> Read:
        """Rows of the target's tensors by their names."""
        return Read(self)


def _tied_names(model: CheckpointModel) -> dict[str, str]:
    """Absent tied name -> kept one, by the names of the files. Of a head that its script registers before the
    embedding, a run's files have the name that transformers ties, in place of the other."""
    found = {}
    for absent, kept in model.aliases().items():
        swapped = model.stored(absent) == model.stored(kept)
        found[model.naming.spelled(kept) if swapped else model.stored(absent)] = model.stored(kept)
    return found


class Read:
    """Gives rows [start, stop) of dim 0 of a target's tensor, by its name, in float32. Of an expert that is written by
    itself all is computed at once; each thread keeps the last."""

    def __init__(self, named: Named) -> None:
        self._named, self._values = named, values(named.growth.plan, named.growth.reads)
        self._last = threading.local()

    def __call__(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """The rows."""
        part = self._named.parts[name]
        whole = self._named.growth.plan.tensors[part.name].shape
        if part.shape == whole:
            return self._values(part.name, state, start, stop)
        expert, at = divmod(part.start, prod(whole[1:]))
        row = at // prod(part.shape[1:])
        key = (part.name, state, expert)
        if getattr(self._last, "key", None) != key:
            self._last.key = None  # so that two are never held
            self._last.value = None
            self._last.value = self._values(part.name, state, expert, expert + 1)[0]
            self._last.key = key
        value: Tensor = self._last.value
        return value[row + start : row + stop]
