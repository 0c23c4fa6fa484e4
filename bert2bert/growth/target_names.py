"""The names of a checkpoint's tensors in a file of another format.

A run keeps its script's names. A Hugging Face folder may have older names, and an order of its own: its tensors go into
a run's files by the names and in the order of transformers' model, and those of a run into a folder by these names,
where the architecture has a table.

Refuses (UnsupportedGrowth) native shards of a folder whose model's order is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bert2bert.checkpoints.groups import Member, by_name
from bert2bert.errors import UnsupportedGrowth, UserError
from bert2bert.growth.source_model import beyond_class, class_name, match, short_of_class

if TYPE_CHECKING:
    from bert2bert.checkpoints.source import Source


@dataclass(frozen=True)
class Names:
    """stored: target's name -> source's, in the model's order where that is known; aliases: absent tied name -> kept
    name, target's names; members: target's name -> what decides its optimizer group; left: source's names that the
    target does not get, each of an old buffer; copies: those of tied tensors that it does not get -> what they equal,
    source's names; notes: what to know of the names, in sentences; config: the source's, as its files
    show it to be."""

    stored: dict[str, str]
    aliases: dict[str, str]
    members: Mapping[str, Member] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, source: Source, format: str, config: Mapping[str, Any] | None) -> Names:
        """For a target of this format. config: the source's, where it is known."""

        same = {name: name for name in source.tensors}
        guessed = by_name({name: meta.shape for name, meta in source.tensors.items()}, source.aliases)
        try:
            model = match(source, config or {})
        except UserError as error:
            if source.format == "hub" and format == "zero" and not (source.manifest and source.manifest.tensors):
                raise UnsupportedGrowth(
                    f"{source.path}: a Hugging Face folder does not say in which order its model has the tensors, and "
                    f"native shards are addressed by position ({str(error).splitlines()[0]}).\nUse --format universal, "
                    "which goes by names."
                ) from None
            return cls(same, source.aliases, guessed)
        if source.format == format or (source.format != "hub" != format):
            aliases = {model.stored(a): model.stored(k) for a, k in model.aliases().items()}
            members = {model.stored(name): parameter for name, parameter in model.parameters.items()}
            return cls(same, aliases if format == "hub" else source.aliases, {**guessed, **members})
        # a folder that names no class (the first BERTs of the hub) is of that which has these heads
        fits = [name for name, heads in model.table.names.classes.items() if heads == model.heads]
        named = model.config if model.config.get("architectures") else {"architectures": fits}
        known = named is model.config or source.format == "hub"
        known = known and (format == "hub" or not model.naming.prefix)
        called = {
            name: class_name(model.table, named, name) if known else model.stored(name)
            for name in (*model.parameters, *model.aliases())
        }
        recorded = model.table, model.config, model.heads
        return cls(
            {called[name]: model.stored(name) for name in model.parameters},
            {called[a]: called[k] for a, k in model.aliases().items()},
            {called[name]: parameter for name, parameter in model.parameters.items()},
            model.left,
            model.copies(),
            tuple(short_of_class(*recorded) + (beyond_class(*recorded) if format != "hub" else [])),
            model.config,
        )
