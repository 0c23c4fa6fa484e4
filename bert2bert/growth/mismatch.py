"""A checkpoint and a config that do not fit together: what is refused, and the remedy.

Refuses (`InvalidCheckpoint`) unmerged adapters, a config of more layers than the checkpoint has tensors or that
contradicts the checkpoint's own, parameters that are missing or of another shape, tensors that the architecture's table
does not know, tied copies that differ, and heads that cannot grow together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bert2bert.algebra import axes
from bert2bert.errors import InvalidCheckpoint
from bert2bert.growth.unfit import instead_of
from bert2bert.tables import Parameter, Table, table_for

if TYPE_CHECKING:
    from pathlib import Path

    from bert2bert.checkpoints.hub.names import Naming
    from bert2bert.checkpoints.source import Source, TensorMeta

_ADAPTED = re.compile(r"(^|\.)((lora|vera|hada|lokr|oft|boft|ia3)_|(base_layer|modules_to_save|original_module)\.)")
"""In names of a model with an adapter that can be merged."""
_OF_DEEPSPEED = re.compile(r"(^|\.)lora_(right_weight|left_weight|weight_[12])(\.|$)")
"""In those of DeepSpeed-Chat's layers and of DeepSpeed's LoRAOptimizedLinear."""


def check_adapter(source: Source) -> None:
    """Refuse (InvalidCheckpoint) an adapter beside its base model, or without it, as a run saves it."""
    if own := next(filter(_OF_DEEPSPEED.search, source.tensors), None):
        raise InvalidCheckpoint(
            f"{source.path}: {own} is of a LoRA layer of DeepSpeed's that is not merged. Add the product of its two "
            "matrices to the weight as the layer does (DeepSpeed-Chat: convert_lora_to_linear_layer), save the model "
            "with plain layers, then grow that."
        )
    if any(_ADAPTED.search(name) for name in source.tensors):
        raise InvalidCheckpoint(
            f"{source.path}: its names are those of a PEFT model whose adapter is not merged. Load it with its base "
            "model, call merge_and_unload() and save_pretrained(), then grow what that wrote."
        )


def check_depth(source: Source, config: Mapping[str, Any]) -> None:
    """A config with more layers than there are tensors is not that of the checkpoint, however many it names."""
    table = table_for(config)
    for axis in table.sizes.depth:
        if int(config.get(table.key(axis)) or 0) > len(source.tensors):
            raise InvalidCheckpoint(
                f"{source.path}: the config says {table.key(axis)}={config[table.key(axis)]}, the checkpoint has "
                f"{len(source.tensors)} tensors in all.\nIs this the config of this checkpoint?"
            )


def check_own(source: Source, config: Mapping[str, Any], file: Path) -> None:
    """A config given beside the checkpoint's own must not contradict it: not every key shows in the shapes."""
    table, own = table_for(config), source.config or {}
    mine, theirs = dict(config), dict(own)
    if (key := "rope_parameters") in table.compatible.must_agree:  # older configs say it in other words, or not
        mine[key], theirs[key] = (table.settled(c)[key] for c in (config, own))
    for key in dict.fromkeys((*map(table.key, table.sizes.axes), *table.compatible.must_agree)):
        if key in mine and key in theirs and mine[key] != theirs[key]:
            raise InvalidCheckpoint(
                f"{file}: {key} is {mine[key]!r}, the config that {source.path} itself holds says {theirs[key]!r}.\n"
                f"Leave --source-config out."
            )


def missing(source: Source, table: Table, config: Mapping[str, Any], stored: str) -> InvalidCheckpoint:
    """A parameter of the config's model is not there. stored: its name in the files."""
    keys = {table.key(axis): config.get(table.key(axis)) for axis in table.sizes.depth}
    keys["tie_word_embeddings"] = table.tied(config)
    return InvalidCheckpoint(
        f"{source.path}: tensor {stored} is missing, which the config asks for "
        f"({', '.join(f'{k}={v}' for k, v in keys.items())}).\n{instead_of(source, stored)}"
    )


def unknown_tensors(source: Source, table: Table, names: Sequence[str]) -> InvalidCheckpoint:
    """Stored tensors are of no parameter and no tied copy of the config's model."""
    return InvalidCheckpoint(
        f"{source.path}: {len(names)} tensors are not part of a {table.model_type} of this config, first "
        f"{names[0]}.\nKnown heads: {', '.join(table.names.classes)}. Remove what is not part of the model (other "
        "heads, adapters, counters) before growing, or check the config's number of layers and tie_word_embeddings."
    )


def not_a_copy(
    source: Source, table: Table, stored: Mapping[str, TensorMeta], copy: str, kept: str
) -> InvalidCheckpoint:
    """A copy differs from the tensor that every model of the architecture ties it to. stored: by canonical name."""
    return InvalidCheckpoint(
        f"{source.path}: {stored[copy].name} differs from {stored[kept].name}, of which it should be a copy: a "
        f"{table.model_type} ties the two whatever its config says.\nIs this the config of this checkpoint, and are "
        f"all files of one save? If {stored[kept].name} counts, remove {stored[copy].name}."
    )


def half_untied(
    source: Source,
    stored: Mapping[str, TensorMeta],
    copy: str,
    kept: str,
    naming: Naming,
    lack: str,
    aliases: Mapping[str, str],
) -> InvalidCheckpoint:
    """A copy differs, so that the model is untied, and another tensor that it would then have is not there: where
    transformers unties the one and not the other, here both are tied, or neither. lack: that tensor, canonical."""
    name = naming.stored(lack)
    return InvalidCheckpoint(
        f"{source.path}: {stored[copy].name} differs from {stored[kept].name}, so it is not a tied copy, but {name}, "
        f"which a model without tied tensors has as well, is missing.\nIf the difference is meant, store {name} too, "
        f"as a copy of {naming.stored(aliases.get(lack, lack))}; if not, remove {stored[copy].name}."
    )


def check_words(
    source: Source,
    table: Table,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorMeta],
    heads: frozenset[str],
    cls: str,
) -> None:
    """Refuse (InvalidCheckpoint) a head beside one of words, where the table has no rows for both (a T5's decoder), or
    where the words' one, of the class in the config, lacks only biases: transformers starts those at 0 and
    has it. stored: by canonical name; cls: the class that the config names."""
    more = table.names.classes.get(cls, frozenset[str]())
    words = table.parameters(config, heads | more if "lm" in more else heads)
    lacks = [name for name in words if name not in stored]
    alone = table.parameters(config, heads - {"lm"})
    other = [name for name in alone if name not in table.parameters(config, more | {"lm"})]
    if "lm" in heads:
        beside = {head for has in table.names.classes.values() if "decoder" in has for head in has - {"decoder", "lm"}}
        clash = heads & beside and any(p.spec != words[name].spec for name, p in alone.items())
    else:
        clash = "lm" in more and table.tied(config) and all(name.endswith(".bias") for name in lacks)
    if not clash or not other:
        return
    fits = ", ".join(name for name, has in table.names.classes.items() if has == heads - {"lm"})
    do = f"store {lacks[0]}, zeros" if lacks else f"remove {stored[other[0]].name} and its like"
    raise InvalidCheckpoint(
        f"{source.path}: the config's architectures names {cls or 'no class'}, whose head of words reads the same norm "
        f"as {stored[other[0]].name}{f' and lacks only {lacks[0]}' if lacks else ''}: these cannot grow together.\n"
        f"For the other head, name its class in architectures{f' ({fits})' if fits else ''}; for the words, {do}."
    )


def wrong_shape(
    source: Source, table: Table, config: Mapping[str, Any], parameter: Parameter, found: tuple[int, ...]
) -> InvalidCheckpoint:
    """A parameter's stored shape is not that of the config: the first axis that disagrees."""
    text = f"{source.path}: {parameter.name}   {parameter.spec}\n  the checkpoint has {found}, the config expects "
    text += f"{parameter.shape}."
    if "labels" in parameter.spec and found[1:] == parameter.shape[1:]:
        count, labels = config.get("num_labels", "2, the default"), config.get("id2label")
        says = f"num_labels={count}" if labels is None else f"id2label of {len(labels)}"
        return InvalidCheckpoint(
            f"{text}\n  The config has {says}, {parameter.name} has {found[0]} rows, one a label.\n  Set "
            f"num_labels to {found[0]} in the config (and id2label, if it is there), or remove {parameter.name} if "
            "no head reads it."
        )
    for dim, have, want in zip(axes.parse(parameter.spec), found, parameter.shape, strict=False):
        if have != want:
            named = [a.axis for product in dim for a in product]
            of = dict.fromkeys(table.key(a) for a in named if table.sizes.follows.get(a, a) in table.sizes.axes)
            keys = ", ".join(f"{key}={config[key]}" for key in of if key in config)
            text += f"\n  axis '{' '.join(named)}': {have} features, expected {want} from {keys or 'the table'}."
            break
    return InvalidCheckpoint(text + "\n  Is this the config of this checkpoint (--source-config)?")
