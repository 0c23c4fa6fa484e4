"""A checkpoint seen as a model: its config, its table, and its tensors by the names that transformers gives them.

Stored names may be those of wrappers, of older versions, or of the base model alone: `names` finds that from one tensor
that every variant has. Which heads there are shows in the tensors, or, for a head that is all tied, in the config's
``architectures`` and the prefix. What transformers does not read (masks, positions, what the class ignores on loading)
is left, and reported; of copies of tied tensors one counts; a head that is not a copy makes the model untied.

Refuses (`InvalidCheckpoint`) a config that does not describe the stored tensors, naming the first tensor and axis that
disagree, and a checkpoint with tensors that the architecture's table does not know: integer ones, adapters that are not
merged, and other heads among them. `mismatch` words these.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert2bert.checkpoints.hub.files import in_cache, is_there, plain
from bert2bert.checkpoints.hub.names import Naming, is_obsolete, read_names
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.stacked import with_fused_experts
from bert2bert.checkpoints.zero.layout import row_blocks
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.files.sniff import instead
from bert2bert.growth.mismatch import (
    check_adapter,
    check_depth,
    check_own,
    check_words,
    half_untied,
    missing,
    not_a_copy,
    unknown_tensors,
    wrong_shape,
)
from bert2bert.growth.unfit import check_numbers
from bert2bert.tables import TABLES, Parameter, Table, table_for

if TYPE_CHECKING:
    from torch import Tensor

    from bert2bert.checkpoints.source import Source, TensorMeta


@dataclass(frozen=True, eq=False)
class CheckpointModel:
    """A source opened as a model. ``parameters``: by canonical name; ``naming``: what they are called in the files;
    ``left``: stored tensors and buffers that are not of the model, each an old one's or ignored by its class."""

    source: Source
    config: dict[str, Any]
    table: Table
    heads: frozenset[str]
    parameters: dict[str, Parameter]
    naming: Naming
    left: tuple[str, ...] = ()
    untied: tuple[str, str] | None = None
    """A stored tensor and that of which the config makes it a copy, where they differ: such a model is not tied."""

    @property
    def trained(self) -> bool:
        """Whether the checkpoint has an optimizer's moments."""
        return len(self.source.states) > 1

    def stored(self, name: str) -> str:
        """The name under which the checkpoint has a canonical tensor (the same rule names a grown checkpoint's)."""
        return self.naming.stored(name)

    def aliases(self) -> dict[str, str]:
        """Absent tied name -> kept name, both canonical."""
        return self.table.aliases(self.config, self.heads)

    def copies(self) -> dict[str, str]:
        """Copies of tied tensors that the source's files hold beside them -> the tensor that counts, stored names."""
        tied = {self.stored(alias): self.stored(kept) for alias, kept in self.aliases().items()}
        return {alias: kept for alias, kept in tied.items() if alias != kept and alias in self.source.tensors}

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0 of a canonical tensor's state."""
        return self.source.read(self.stored(name), state, start, stop)


def named_class(config: Mapping[str, Any]) -> str:
    """The class that a config names, the first where it names several; "" for none."""
    return str((config.get("architectures") or [""])[0])


def class_name(table: Table, config: Mapping[str, Any], name: str) -> str:
    """A canonical tensor's name in the class that a config names."""
    return table.in_class(name, named_class(config))


def beyond_class(table: Table, config: Mapping[str, Any], heads: frozenset[str]) -> list[str]:
    """What to know of tensors that the class of the config does not have, which keeps a strict load from succeeding:
    from_pretrained leaves them, as roberta-base's pooler."""
    cls = named_class(config)
    if cls not in table.names.classes:
        return []
    own = table.parameters(config, table.names.classes[cls])
    rest = [name for name in table.parameters(config, heads) if name not in own]
    return rest and [
        f"{cls}, which the config names, lacks {len(rest)} tensors of the source, first {rest[0]}: they are kept, and "
        "a strict load, as DeepSpeed's, needs a model that has them"
    ]


def short_of_class(table: Table, config: Mapping[str, Any], heads: frozenset[str]) -> list[str]:
    """What to know of tensors that only the class of the config has: from_pretrained draws them, with a warning."""
    cls = named_class(config)
    if cls not in table.names.classes:
        return []
    there = table.parameters(config, heads)
    rest = [name for name in table.parameters(config, table.names.classes[cls]) if name not in there]
    if not rest:
        return []
    return [
        f"{cls}, which the config names, has {len(rest)} tensors that the source lacks, first {rest[0]}: transformers "
        "initialises them randomly, here they are left out, and a strict load needs a model without them"
    ]


def read_config(path: Path) -> dict[str, Any]:
    """A Hugging Face config: a JSON file, or a folder that holds config.json, or one of the hub's cache. Raises
    InvalidConfig, InvalidCheckpoint for a folder of the cache that is not whole."""
    file = in_cache(path) / "config.json" if path.is_dir() else path
    is_there(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidConfig(
            f"{file}: no such file; give a Hugging Face config file or a folder with config.json"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{file}: not a readable JSON config{instead(file, 'text') or f' ({error})'}") from None
    if not isinstance(config, dict):
        raise InvalidConfig(f"{file}: holds a JSON {type(config).__name__}; a Hugging Face config is an object")
    check_type(config, str(file))
    return plain(config)


def check_type(config: Mapping[str, Any], where: str, names: Collection[str] = ()) -> None:
    """Refuse a config without model_type (InvalidConfig). names: of the checkpoint's tensors, which may tell it."""
    if isinstance(config.get("model_type"), str):
        return
    anchors = {kind: f".{table.names.prefix}{table.names.anchor}" for kind, table in TABLES.items()}
    like = [kind for kind, anchor in anchors.items() if any(f".{name}".endswith(anchor) for name in names)]
    guess = f"; its tensors are named as those of {' or '.join(like)}" if like else f"; known: {', '.join(TABLES)}"
    raise InvalidConfig(
        f"{where}: the config has no 'model_type', which says what architecture it describes (configs of before 2020 "
        f'lack it){guess}.\nAdd a line such as "model_type": "{(like or ["bert"])[0]}" to it.'
    )


def open_model(path: Path, source_config: Path | None = None, tag: str | None = None) -> CheckpointModel:
    """Open a checkpoint and match it with its config. Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth."""
    source = open_source(path, tag)
    config = read_config(source_config) if source_config else source.config
    if config is None:
        raise InvalidCheckpoint(
            f"{path}: the checkpoint does not say which model it holds (no bert2bert.json, no config.json).\n"
            f"Give the model's Hugging Face config with --source-config FILE."
        )
    check_type(config, f"{source_config or path}", source.tensors)
    return match(with_fused_experts(source), config, source_config)


def match(source: Source, config: Mapping[str, Any], file: Path | None = None) -> CheckpointModel:
    """Find the names and the heads of a checkpoint, and check every shape against the config. file: that holds the
    config, where it is not the checkpoint's own. Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth."""
    try:
        if source.config and file:
            check_own(source, config, file)
        check_depth(source, config)
        return _match(source, config)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # sizes that are not numbers
        raise InvalidConfig(
            f"{file or source.path}: the config is not one of a {config.get('model_type')} "
            f"({type(error).__name__}: {error}). Give the model's own with --source-config FILE."
        ) from error


def _match(source: Source, config: Mapping[str, Any]) -> CheckpointModel:
    check_adapter(source)
    tied = table_for(config).retied(config, True) if source.format == "hub" else config  # a run trains what it says
    model = _described(source, tied)
    model = model if tied is config or "lm" in model.heads else _described(source, config)
    if differing := _differing(model):
        untied = {**config, "tie_word_embeddings": False}
        own, stored = model.table.parameters(untied, model.heads), _tensors(model)
        lacks = [name for name in own if name not in stored]
        if differing[0] not in own:
            raise not_a_copy(source, model.table, stored, *differing)
        if lacks:
            raise half_untied(source, stored, *differing, model.naming, lacks[0], model.aliases())
        names = model.stored(differing[0]), model.stored(differing[1])
        model = replace(_described(source, untied), untied=names if tied is config else None)  # as transformers does
        if differing := _differing(model):  # a copy that every model of the architecture ties
            raise not_a_copy(source, model.table, _tensors(model), *differing)
    check_words(source, model.table, model.config, _tensors(model), model.heads, named_class(config))
    return model


def _described(source: Source, config: Mapping[str, Any]) -> CheckpointModel:
    """The model whose parameters are all stored in the shapes of the config; whether copies are equal is not read."""
    table = table_for(config)
    heads = frozenset.union(*table.names.classes.values())
    ties = table.aliases(config, heads)
    full = table.parameters(config, heads).keys() | ties.keys()
    naming, strange = read_names(source.tensors, table.names.anchor, table.names.prefix, full, ties, str(source.path))
    canonical = {name: source.tensors[stored] for name, stored in naming.known.items()}
    left = {name for name in canonical if name not in full and is_obsolete(name)} | _ignored(table, config, canonical)
    canonical = {name: meta for name, meta in canonical.items() if name not in left}
    heads = _heads(table, config, canonical, bool(naming.lacks))
    parameters = table.parameters(config, heads)
    for name, parameter in parameters.items():
        if name not in canonical:
            raise missing(source, table, config, naming.stored(name))
        if canonical[name].shape != parameter.shape:
            raise wrong_shape(source, table, config, parameter, canonical[name].shape)
    check_numbers(source, (canonical[name] for name in parameters))
    copies = {a for a, k in table.aliases(config, heads).items() if k in parameters}
    strange += [meta.name for name, meta in canonical.items() if name not in parameters and name not in copies]
    if source.format == "hub":  # in a run's files, buffers are marked as buffers
        strange += [name for name in source.buffers if not is_obsolete(name)]
    if strange:
        raise unknown_tensors(source, table, strange)
    gone = [naming.known[name] for name in naming.known if name in left] + [*source.buffers] * (source.format == "hub")
    return CheckpointModel(source, dict(config), table, heads, parameters, naming, tuple(gone))


def _tensors(model: CheckpointModel) -> dict[str, TensorMeta]:
    """The stored tensors by canonical name, copies among them, without those that are left."""
    return {n: model.source.tensors[old] for n, old in model.naming.known.items() if old not in model.left}


def _differing(model: CheckpointModel) -> tuple[str, str] | None:
    """The first stored copy of a tied tensor that differs from it, and the tensor, canonical names."""
    stored = _tensors(model)
    for absent, kept in model.aliases().items():
        if absent in stored and kept in model.parameters and not _same(model.source, stored[absent], stored[kept]):
            return absent, kept
    return None


def _ignored(table: Table, config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Tensors that transformers leaves unread without a word: of any class, or of that which the config names."""
    patterns = [pattern for name in {"", named_class(config)} for pattern in table.names.ignores.get(name, ())]
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _heads(table: Table, config: Mapping[str, Any], stored: Mapping[str, TensorMeta], bare: bool) -> frozenset[str]:
    """The heads whose tensors are there, and those without own tensors that the class or the prefix implies.

    They are those of the class that explains the stored tensors best, of the config's own where several do, and what
    there is besides: of several heads with these names (a classifier of labels, of choices) those of the stored shapes.
    """
    none = frozenset[str]()
    plain = {*table.parameters(config, none), *table.aliases(config, none)}

    def own(heads: frozenset[str]) -> tuple[set[str], set[str]]:
        """The names of the heads' tensors, and with those of their tied copies, which need not be stored."""
        tensors = table.parameters(config, heads).keys() - plain
        return tensors, tensors | (table.aliases(config, heads).keys() - plain)

    every = frozenset.union(*table.names.classes.values())
    there = own(every)[1] & set(stored)
    names = {heads: own(heads) for heads in {*table.names.classes.values(), none}}
    lacks = {heads: len(tensors - there) for heads, (tensors, _) in names.items()}
    wrong = {heads: lacks[heads] + len(there - all_) for heads, (_, all_) in names.items()}
    best = [(name, has) for name, has in {**table.names.classes, "": none}.items() if wrong[has] == min(wrong.values())]
    named = [has for cls in config.get("architectures") or () for name, has in best if name == cls]
    heads = (named or sorted((h for _, h in best), key=lambda h: (lacks[h], len(h) if bare else -len(h))))[0]
    besides = there - names[heads][1]
    more = {head: own(frozenset({head}))[1] & besides for head in every}
    fits = set()
    for head, tensors in more.items():
        shapes = {name: p.shape for name, p in table.parameters(config, frozenset({head})).items() if name in tensors}
        if tensors and all(stored[name].shape == shape for name, shape in shapes.items()):
            fits.add(head)
    explained = {name for head in fits for name in more[head]}
    heads |= fits | {head for head, tensors in more.items() if tensors - explained}
    # A head that is all tied has no tensors to show: the class that the config names has it, whatever else is stored.
    cls = named_class(config)
    named_heads = [table.names.classes[cls]] if cls in table.names.classes else []
    # Where it names none, both functions are kept; a classifier of T5 has no rows beside a tied head.
    tied = [has for has in names if "lm" in has and not bare and len(table.sizes.depth) == 1]
    return heads.union(*(has for has in named_heads or tied if names[has][0] <= set(stored)))


def _same(source: Source, copy: TensorMeta, kept: TensorMeta) -> bool:
    """Whether a stored copy of a tied tensor is one: if not, growing the kept tensor alone would lose it."""
    return copy.shape == kept.shape and all(
        source.read(copy.name, "fp32", *rows).equal(source.read(kept.name, "fp32", *rows))
        for rows in row_blocks(kept.shape)
    )
