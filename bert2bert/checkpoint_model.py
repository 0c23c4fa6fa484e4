"""A checkpoint seen as a model: its config, its table, and its tensors by the names that transformers gives them.

A run may have saved a model inside wrappers, so stored names can carry a prefix (``module.``, ``model.``), and a bare
model lacks the outer name of the full one (``bert.``, ``transformer.``); both are found from one tensor that every
variant has, and reported. Which heads there are shows in the tensors, or, for a head that is all tied, in the config's
``architectures`` and the outer name. Old Hugging Face files also hold masks and copies of tied tensors, which are left;
a head that is no copy makes the model untied.

Refuses (`InvalidCheckpoint`) a config that does not describe the stored tensors, naming the first tensor and axis that
disagree, and a checkpoint with tensors that the architecture's table does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert import axes
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.shards.layout import row_blocks
from bert2bert.tables import Parameter, Table, table_for

if TYPE_CHECKING:
    from torch import Tensor

    from bert2bert.shards.source import Source, TensorMeta

_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*rotary_emb.inv_freq")
"""What older versions of transformers stored beside the parameters: causal masks, rotary frequencies."""


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """A source opened as a model. ``parameters``: by canonical name; ``prefix``: what stored names carry in front;
    ``bare``: whether they lack the table's outer name."""

    source: Source
    config: dict[str, Any]
    table: Table
    heads: frozenset[str]
    parameters: dict[str, Parameter]
    prefix: str
    bare: bool

    def stored(self, name: str) -> str:
        """The name under which the checkpoint has a canonical tensor (the same rule names a grown checkpoint's)."""
        if self.bare:
            name = name.removeprefix(self.table.outer)
        return self.prefix + name

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0 of a canonical tensor's state."""
        return self.source.read(self.stored(name), state, start, stop)


def read_config(path: Path) -> dict[str, Any]:
    """A Hugging Face config: a JSON file, or a folder that holds config.json. Raises InvalidConfig."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise InvalidConfig(
            f"{file}: no such file; give a Hugging Face config file or a folder with config.json"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidConfig(f"{file}: not a readable JSON config ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InvalidConfig(f"{file}: a Hugging Face config is an object with 'model_type'; this one has none")
    return config


def open_model(path: Path, source_config: Path | None = None, tag: str | None = None) -> CheckpointModel:
    """Open a checkpoint and match it with its config. Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth."""
    from bert2bert.shards.source import open_source

    source = open_source(path, tag)
    config = read_config(source_config) if source_config else source.config
    if config is None:
        raise InvalidCheckpoint(
            f"{path}: the checkpoint does not say which model it holds (no bert2bert.json, no config.json).\n"
            f"Give the model's Hugging Face config with --source-config FILE."
        )
    try:
        if source.config and source_config:
            _check_own(source, config, source_config)
        _check_depth(source, config)
        return match(source, config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # sizes that are no numbers
        raise InvalidConfig(
            f"{source_config or path}: the config is not one of a {config.get('model_type')} "
            f"({type(error).__name__}: {error}). Give the model's own with --source-config FILE."
        ) from error


def _check_depth(source: Source, config: Mapping[str, Any]) -> None:
    """A config with more layers than there are tensors is not that of the checkpoint, however many it names."""
    table = table_for(config)
    for axis in table.depth:
        if int(config.get(table.key(axis)) or 0) > len(source.tensors):
            raise InvalidCheckpoint(
                f"{source.path}: the config says {table.key(axis)}={config[table.key(axis)]}, the checkpoint has "
                f"{len(source.tensors)} tensors in all.\nIs this the config of this checkpoint?"
            )


def _check_own(source: Source, config: Mapping[str, Any], file: Path) -> None:
    """A config given beside the checkpoint's own must not contradict it: not every key shows in the shapes."""
    table, own = table_for(config), source.config or {}
    mine, theirs = dict(config), dict(own)
    if (key := "rope_parameters") in table.must_agree:  # which older configs say in other words, or leave out
        mine[key], theirs[key] = (table.settled(c)[key] for c in (config, own))
    for key in dict.fromkeys((*map(table.key, table.sizes), *table.must_agree)):
        if key in mine and key in theirs and mine[key] != theirs[key]:
            raise InvalidCheckpoint(
                f"{file}: {key} is {mine[key]!r}, the config that {source.path} itself holds says {theirs[key]!r}.\n"
                f"Leave --source-config out."
            )


def match(source: Source, config: Mapping[str, Any]) -> CheckpointModel:
    """Find the name prefix and the heads of a checkpoint, and check every shape against the config."""
    table = table_for(config)
    prefix, bare = _prefix(source, table)
    stored = {name.removeprefix(prefix): meta for name, meta in source.tensors.items() if name.startswith(prefix)}
    heads = frozenset.union(*table.classes.values())
    full = table.parameters(config, heads).keys() | table.aliases(config, heads).keys()
    canonical = {(name if name in full else table.outer + name if bare else name): m for name, m in stored.items()}
    heads = _heads(table, config, canonical, bare)
    parameters = table.parameters(config, heads)
    for name, parameter in parameters.items():
        if name not in canonical:
            said = {table.key(axis): config.get(table.key(axis)) for axis in table.depth}
            said["tie_word_embeddings"] = table.tied(config)
            raise InvalidCheckpoint(
                f"{source.path}: tensor {prefix}{name} is missing, which the config asks for "
                f"({', '.join(f'{k}={v}' for k, v in said.items())}).\nIs this the config of this checkpoint?"
            )
        if canonical[name].shape != parameter.shape:
            raise InvalidCheckpoint(_shape_error(source, table, config, parameter, canonical[name].shape))
    copies = {a: k for a, k in table.aliases(config, heads).items() if a in canonical and k in parameters}
    known = parameters.keys() | copies.keys() | {n for n in canonical if any(fnmatchcase(n, b) for b in _BUFFERS)}
    strange = [canonical[n].name for n in canonical if n not in known]
    strange += [n for n in source.tensors if not n.startswith(prefix)]
    if strange:
        raise InvalidCheckpoint(
            f"{source.path}: {len(strange)} tensors are not part of a {table.model_type} of this config, first "
            f"{strange[0]}.\nKnown heads: {', '.join(table.classes)}. Remove other heads before growing, or check the "
            f"config's number of layers and tie_word_embeddings."
        )
    for absent, kept in copies.items():
        if not _same(source, canonical[absent], canonical[kept]):
            if absent in table.parameters({**config, "tie_word_embeddings": False}, heads):
                return match(source, {**config, "tie_word_embeddings": False})  # as transformers does, too
            raise InvalidCheckpoint(
                f"{source.path}: {canonical[absent].name} differs from {canonical[kept].name}, of which it should be a "
                f"copy.\nIs this the config of this checkpoint, and are all files of one save?"
            )
    return CheckpointModel(source, dict(config), table, heads, parameters, prefix, bare)


def _heads(table: Table, config: Mapping[str, Any], stored: Iterable[str], bare: bool) -> frozenset[str]:
    """The heads whose tensors are there, and those without own tensors that the class or the outer name tells of."""

    def names(*of: str) -> set[str]:
        return {*table.parameters(config, frozenset(of)), *table.aliases(config, frozenset(of))}

    stored, every = set(stored), frozenset.union(*table.classes.values())
    told = frozenset(head for head in every if (names(head) - names()) & stored)
    # a head that is all tied has no tensor of its own, at most a copy
    silent = {head for head in every if names(head) - names() <= table.aliases(config, every).keys()}
    possible = {name: has for name, has in table.classes.items() if told <= has <= told | silent}
    named = [possible[name] for name in config.get("architectures") or () if name in possible]
    return (named or sorted(possible.values(), key=len, reverse=not bare) or [told])[0]


def _same(source: Source, copy: TensorMeta, kept: TensorMeta) -> bool:
    """Whether a stored copy of a tied tensor is one: if not, growing the kept tensor alone would lose it."""
    return copy.shape == kept.shape and all(
        source.read(copy.name, "fp32", *rows).equal(source.read(kept.name, "fp32", *rows))
        for rows in row_blocks(kept.shape)
    )


def _prefix(source: Source, table: Table) -> tuple[str, bool]:
    found = [name for name in source.tensors if ("." + name).endswith("." + table.anchor)]
    if len(found) != 1:
        some = ", ".join(list(source.tensors)[:3])
        raise InvalidCheckpoint(
            f"{source.path}: {len(found)} tensors are named …{table.anchor}, one is expected of a {table.model_type}; "
            f"the checkpoint's first names are {some}.\nIs it a {table.model_type}, and is the config its own?"
        )
    before = found[0].removesuffix(table.anchor)
    bare = not ("." + before).endswith("." + table.outer)
    return (before if bare else before.removesuffix(table.outer)), bare


def _shape_error(
    source: Source, table: Table, config: Mapping[str, Any], parameter: Parameter, found: tuple[int, ...]
) -> str:
    text = f"{source.path}: {parameter.name}   {parameter.spec}\n  the checkpoint has {found}, the config expects "
    text += f"{parameter.shape}."
    for dim, have, want in zip(axes.parse(parameter.spec), found, parameter.shape, strict=False):
        if have != want:
            named = [a.axis for product in dim for a in product]
            of = dict.fromkeys(table.key(a) for a in named if table.follows.get(a, a) in table.sizes)
            keys = ", ".join(f"{key}={config[key]}" for key in of if key in config)
            text += f"\n  axis '{' '.join(named)}': {have} features, expected {want} from {keys or 'the table'}."
            break
    return text + "\n  Is this the config of this checkpoint (--source-config)?"
