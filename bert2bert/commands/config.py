"""The command ``config``: the config of a larger, a smaller or an untied model, chosen so that its sizes divide.

Writes a folder with config.json, and the tokenizer beside the source if the vocabulary stays, and says what the model
has and which operators make it of the source. Reads no tensor. Refuses what `growth.sizes` refuses, and an output
folder that holds files.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from bert2bert.checkpoints.hub.beside import TOKENIZER, grown_beside, json_bytes
from bert2bert.checkpoints.open import locate
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.files.disk import disk_errors
from bert2bert.growth.candidates import Candidate, Proposal, candidates, proposal
from bert2bert.growth.resize import count
from bert2bert.growth.size_request import SizeRequest
from bert2bert.growth.sizes import resized
from bert2bert.growth.source_model import named_class, open_model, read_config
from bert2bert.growth.untying import check_source
from bert2bert.measure.cost import flops_per_token, row_length
from bert2bert.operators.registry import parse_operator
from bert2bert.tables import table_for

_SHOWN = 240  # characters of a reason


@dataclass(frozen=True)
class Source:
    """What a config is made from. heads: that the checkpoint has, or the class; folders: where its tokenizer may lie;
    checkpoint: whether it can be grown, and is not a config alone."""

    path: Path
    config: dict[str, Any]
    cls: str
    heads: frozenset[str]
    folders: tuple[Path, ...]
    checkpoint: bool


@dataclass(frozen=True)
class Configured:
    """A config that was written, and what is to know of it. Pairs: of source and target."""

    output: Path
    source: Source
    config: dict[str, Any]
    parameters: tuple[int, int]
    forward_flops: tuple[float, float] | None
    """Of a token; None without a language-model head."""
    notes: tuple[str, ...]
    operators: dict[str, list[Candidate]]
    grow: Proposal | None
    refused: str
    """Why no operators make this model of the source, if none do."""

    @property
    def changes(self) -> dict[str, list[Any]]:
        """Config key -> its value in the source and the target."""
        keys = dict.fromkeys((*self.source.config, *self.config))
        old = self.source.config
        return {key: [old.get(key), self.config.get(key)] for key in keys if old.get(key) != self.config.get(key)}

    @property
    def command(self) -> list[str] | None:
        """The command line that grows the source into this model; TARGET is the folder to write."""
        if self.grow is None:
            return None
        source = str(self.source.path) if self.source.checkpoint else "CHECKPOINT"
        return ["bert2bert", "grow", source, "TARGET", "--config", str(self.output), *self.grow.options]

    def as_json(self) -> dict[str, Any]:
        """As ``config --json`` prints it."""
        return {
            "output": str(self.output),
            "class": self.source.cls,
            "config": self.config,
            "changes": self.changes,
            "notes": list(self.notes),
            "parameters": list(self.parameters),
            "forward_flops_per_token": list(self.forward_flops) if self.forward_flops else None,
            "row_length": row_length(self.config),
            "operators": {
                kind: [
                    {"name": c.name, "exact": c.exact, "reasons": list(c.reasons), "refused": c.refused or None}
                    for c in found
                ]
                for kind, found in self.operators.items()
            },
            "command": self.command,
            "reasons": list(self.grow.reasons) if self.grow else None,
            "refused": self.refused or None,
        }

    def text(self) -> str:
        """For a terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        small, large = self.parameters
        yield f"source   {self.source.path} ({self.source.cls})"
        for key, (old, new) in self.changes.items():
            yield f"change   {key} {_value(old)} -> {_value(new)}"
        yield from (f"note     {text}" for text in self.notes)
        yield f"size     {small:,} -> {large:,} parameters ({large / small:.2f}x)"
        if self.forward_flops:
            old, new = self.forward_flops
            rows = f"in rows of {row_length(self.config):,}"
            yield f"compute  {old / 1e6:.4g} -> {new / 1e6:.4g} MFLOP a token forward, {rows} ({new / old:.2f}x)"
        for kind, found in self.operators.items():
            for what, names in (
                ("exact", [c.name for c in found if c.exact]),
                ("not exact", [c.name for c in found if c.reasons]),
                ("refused", [c.name for c in found if c.refused]),
            ):
                if names:
                    yield f"{kind:8} {what}: {', '.join(names)}"
        yield f"written  {self.output}"
        if self.grow is None:
            yield f"note     no operator makes this model of the source in one growth: {self.refused}"
            return
        kept = "; ".join(shorten(reason, _SHOWN) for reason in self.grow.reasons)
        yield f"function {'not exact: ' + kept if kept else 'exact'}"
        yield f"grow     {shlex.join(self.command or [])}"


def configure(
    source: Path,
    output: Path,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    embeddings: str | None = None,
    **sizes: str | None,
) -> Configured:
    """Write the config of a model of other sizes, or of untied embeddings. embeddings: operator on them; sizes: the
    options of `SizeRequest.parse`. Raises UserError of all kinds."""
    untie = None if embeddings is None else parse_operator(embeddings, "embeddings")
    request = SizeRequest.parse(**sizes) if untie is None or any(sizes.values()) else None
    _check_output(output)
    found = _opened(source, source_config, tag)
    classes = table_for(found.config).names.classes[found.cls]
    config = dict(found.config)
    notes: tuple[str, ...] = ()
    if untie is not None:
        check_source(found.config, classes, untie.flag)
        config["tie_word_embeddings"] = False
        if request is not None and request.params is not None:  # times what the tied model has
            number = request.params.of(count(found.config, classes))
            request = replace(request, params=replace(request.params, times=None, number=number))
    if request is not None:
        config, notes = resized(config, classes, request)
    config["architectures"] = found.config.get("architectures") or [found.cls]
    flops = None
    if "lm" in classes:
        flops = flops_per_token(found.config, classes), flops_per_token(config, classes)
    operators = candidates(found.config, config, found.heads)
    grow, refused = None, ""
    try:
        grow = proposal(found.config, config, found.heads, operators)
    except UserError as error:
        refused = str(error).splitlines()[0]
    stays = table_for(config).axis_sizes(config)["vocab"] == table_for(config).axis_sizes(found.config)["vocab"]
    if not stays:
        notes += ("the vocabulary changes, so no tokenizer is copied: put its own beside config.json",)
    _write(output, config, found.folders, stays)
    numbers = count(found.config, classes), count(config, classes)
    return Configured(output, found, config, numbers, flops, notes, operators, grow, refused)


def _opened(path: Path, source_config: Path | None, tag: str | None) -> Source:
    """A checkpoint, or a config: a file, or a folder that holds one and no weights."""
    alone = path.is_file()
    if path.is_dir() and (path / "config.json").is_file() and tag is None:
        try:
            locate(path, None)
        except InvalidCheckpoint:
            alone = True
    if not alone:
        model = open_model(path, source_config, tag)
        folders = (model.source.folder, path)
        return Source(path, model.config, _class_of(model.config, model.heads), model.heads, folders, True)
    if source_config is not None:
        raise InvalidConfig(f"--source-config {source_config}: {path} is a config itself; leave the option out")
    config = read_config(path)
    cls = _class_of(config, None)
    folder = path if path.is_dir() else path.parent
    return Source(path, config, cls, table_for(config).names.classes[cls], (folder,), False)


def _class_of(config: Mapping[str, Any], heads: frozenset[str] | None) -> str:
    """The class that a config names, else one that has these heads, else the architecture's usual one."""
    classes = table_for(config).names.classes
    named = named_class(config)
    return named if named in classes else next((c for c, own in classes.items() if own == heads), next(iter(classes)))


def _check_output(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise InvalidConfig(f"--output {folder}: the folder holds files already; name one that does not exist")
    if folder.exists() and not folder.is_dir():
        raise InvalidConfig(f"--output {folder}: a file; name a folder that does not exist")


def _write(folder: Path, config: Mapping[str, Any], beside: tuple[Path, ...], tokenizer: bool) -> None:
    """All files or none: they are written beside the folder, which then takes its name."""
    files = grown_beside(config, *beside)
    if not tokenizer:
        files = {name: content for name, content in files.items() if not _is_tokenizer(name)}
    files["config.json"] = json_bytes(config)
    folder = folder.resolve()
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with disk_errors(folder):
        try:
            for name, content in files.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).write_bytes(content)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _is_tokenizer(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in TOKENIZER)


def _value(value: Any) -> str:
    """A config's value in a line; a long list by its length."""
    return f"[{len(value)} entries]" if isinstance(value, list) and len(value) > 4 else str(value)
