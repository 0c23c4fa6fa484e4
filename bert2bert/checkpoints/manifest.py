"""The manifest ``bert2bert.json`` of a checkpoint: what it holds, how it came about, and digests to check it against.

The one place where a manifest is read (`read_manifest`) and written (`write_manifest`). It is written last, so a folder
that has one is complete. Refuses, as InvalidCheckpoint, a manifest of another format version, one with an entry of
another type or a file name that leads out of the folder, and (`check_sizes`) files that are not those it lists. What
is now called ``format`` was called ``form`` in manifests of before, which are read as well. Longer than other modules:
every entry is declared once here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import xxhash

from bert2bert.checkpoints.factors import Factors, GrowthFactors, wrong
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.disk import inside, replace
from bert2bert.files.json_types import mismatch
from bert2bert.files.texts import read_json

MANIFEST = "bert2bert.json"
FORMAT_VERSION = 1
_SEAL = "digest"  # entry that holds the manifest's digest of itself
_NUMBER = (int, float)
_SHAPES: dict[str, Any] = {
    "kind": str, "format": str, "form": str, "tag": (str, None), "stage": (int, None), "world_size": (int, None),
    "expert_parallel": int,
    "precision": (str, None), "group_layout": (str, None), "model": ({}, None), "aliases": {"*": str},
    "groups": [{"part": str, "decay": bool, "names": [str], "hyper": {}, "step": int}],
    "buffers": [str],
    "tensors": {"*": {"shape": [int], "digest": {"*": str}}},
    "files": {"*": int}, "digests": ({"kind": str, "tensors": str, "files": {"*": str}}, None),
    "counters": {"*": (int, None)}, "versions": ({}, None),
    "growth": ({
        "operators": {}, "plan_digest": str, "source": {}, "with": {}, "source_config": {},
        "source_spent": ({"*": _NUMBER}, None), "tokenizer_digest": (str, None), "prefix": str,
        "exactness": {"*": [str]}, "warnings": [str], "drift": ({}, None), "versions": {},
        "inserted": [str], "source_training": ({}, None), "factors": ({
            "groups": [{"lr": _NUMBER, "decay": _NUMBER, "eps": _NUMBER, "parameters": [str]}],
            "without": [{"why": str, "parameters": [str]}],
        }, None),
    }, None),
    "training": ({
        "recipe": {}, "phase": int, "phase_step": int, "step": int, "spent": {"*": _NUMBER}, "data": {"rows": int},
        "growths": int, "ended": [int], "memory": {}, "followed": _NUMBER,
    }, None),
    "reshard": ({"source": {}, "plan_digest": str, "notes": [str], "versions": {}}, None),
}  # fmt: skip
"""Key -> type, as `json_types.mismatch` takes it."""
_IDENTITIES = ("source", "other")
"""Entries that are a `Source.identity`, by the names of the fields."""
_NEEDED = {"groups": ("names",), "tensors": ("shape",)}


class _Section:
    """A dataclass that is an object in JSON. Its field ``more`` has the entries that are not fields of it."""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """From an object whose entries have the types of `_SHAPES`."""
        known = {entry.name for entry in fields(cls)} - {"more"}  # type: ignore[arg-type]
        found = {key: _current(v) if key in _IDENTITIES and isinstance(v, dict) else v for key, v in found.items()}
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in found.items() if key in known}
        given["more"] = {key: value for key, value in found.items() if key not in known}
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The object."""
        return {**{key: value for key, value in vars(self).items() if key != "more"}, **vars(self)["more"]}


@dataclass(frozen=True)
class Grown(_Section):
    """The section ``growth``: how a checkpoint was grown."""

    operators: Mapping[str, Any] = field(default_factory=dict)  # operators and options, from which the plan is rebuilt
    plan_digest: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)  # `Source.identity` of the checkpoint that was grown
    other: Mapping[str, Any] | None = None  # "with" in JSON: of the checkpoint that it was interpolated with
    source_config: Mapping[str, Any] = field(default_factory=dict)  # Hugging Face config of the source
    source_spent: Mapping[str, float] | None = None  # training cost of the source and of what it was grown from
    tokenizer_digest: str | None = None  # of the tokenizer that the source was trained with
    prefix: str = ""  # what the training script puts before the model's names
    exactness: Mapping[str, Sequence[str]] = field(default_factory=dict)  # promise -> reasons why it is not kept
    warnings: Sequence[str] = ()
    drift: Mapping[str, Any] | None = None  # measured change of the function
    factors: GrowthFactors | None = None  # on the optimizer's rates; None in manifests of before
    versions: Mapping[str, Any] = field(default_factory=dict)  # package -> version
    inserted: Sequence[str] = ()  # parts of the layers that the source did not have, see `groups.Group`
    source_training: Mapping[str, Any] | None = None  # the source's own section ``training``, where its run stood
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """From an object whose entries have the types of `_SHAPES`."""
        named = {"other" if key == "with" else key: value for key, value in found.items()}
        if named.get("factors") is not None:
            named["factors"] = GrowthFactors.from_json(named["factors"])
        return super().from_json(named)

    def to_json(self) -> dict[str, Any]:
        """The object."""
        found = {"with" if key == "other" else key: value for key, value in super().to_json().items()}
        found["factors"] = self.factors and self.factors.to_json()
        return {key: value for key, value in found.items() if key not in ("with", "factors") or value is not None}


@dataclass(frozen=True)
class Trained(_Section):
    """The section ``training``: where a run of this project's trainer stood."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    phase: int = 0  # index of the phase of the next step, or the number of phases
    phase_step: int = 0  # steps done in that phase
    step: int = 0  # optimizer steps done
    spent: Mapping[str, float] = field(default_factory=dict)  # "flops", "seconds", "tokens", "steps"
    data: Mapping[str, Any] = field(default_factory=dict)  # "digest", "tokenizer_digest"; "rows" given out
    growths: int = 0  # growths of the recipe that are done
    ended: Sequence[int] = ()  # the step after which each phase before this one ended
    memory: Mapping[str, Any] = field(default_factory=dict)  # what the phase's trigger looks back on
    followed: float = 0.0  # share, of 0 to 1, to which the last step obeyed the growth's factors
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resharded(_Section):
    """The section ``reshard``: of a checkpoint that was written again in another format or layout."""

    source: Mapping[str, Any] = field(default_factory=dict)  # `Source.identity` of the checkpoint that was read
    plan_digest: str = ""
    notes: Sequence[str] = ()  # what the target does not hold, or holds otherwise
    versions: Mapping[str, Any] = field(default_factory=dict)  # package -> version
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupEntry(_Section):
    """An optimizer group."""

    part: str = ""  # see `groups.Group`
    decay: bool = False
    names: Sequence[str] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)  # hyper-parameters: "lr", "weight_decay", ...
    step: int = 0  # Adam's
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorEntry(_Section):
    """A tensor."""

    shape: Sequence[int] = ()
    digest: Mapping[str, str] = field(default_factory=dict)  # state -> `files.digest` of its elements
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Digests(_Section):
    """Digests of the files, and by which functions they and the tensors' were computed."""

    kind: str = ""
    tensors: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A manifest. Fields that an older manifest lacks are None or empty."""

    kind: str | None = None  # "growth" or "train": what a run that continues from it has to restore
    tag: str | None = None
    format: str | None = None  # "zero", "universal" or "hub"
    stage: int | None = None  # ZeRO stage, of format zero
    world_size: int | None = None  # ranks, of format zero
    precision: str | None = None  # "fp32", "bf16" or "fp16"
    group_layout: str | None = None  # see `groups.LAYOUTS`; "source" for another layout
    model: Mapping[str, Any] | None = None  # Hugging Face config
    aliases: Mapping[str, str] = field(default_factory=dict)  # absent tied name -> name that is kept
    groups: Sequence[GroupEntry] = ()
    buffers: Sequence[str] | None = None  # names; None for a checkpoint of the trainer, whose files list them
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)  # in the model's order
    files: Mapping[str, int] = field(default_factory=dict)  # name -> bytes
    digests: Digests | None = None
    counters: Mapping[str, int | None] = field(default_factory=dict)
    versions: Mapping[str, Any] | None = None  # package -> version
    growth: Grown | None = None
    training: Trained | None = None
    expert_parallel: int | None = None  # ranks that share the experts
    reshard: Resharded | None = None
    intact: bool = field(default=True, compare=False)  # no digest of itself that differs: not changed since written

    @classmethod
    def from_json(cls, found: Mapping[str, Any], path: Path = Path(MANIFEST)) -> Manifest:
        """From the object in a manifest's file (``path``, for messages). Raises InvalidCheckpoint for the first entry
        that has another type than this program writes."""
        if found.get("format_version") != FORMAT_VERSION:
            raise InvalidCheckpoint(
                f"{path}: format version {found.get('format_version')!r}, this program reads {FORMAT_VERSION}. "
                "Use the version of bert2bert that wrote it."
            )
        _check(path, found)
        named = _current(found)
        given = {entry.name: named[entry.name] for entry in fields(cls) if entry.name in named}
        sections: tuple[tuple[str, type[_Section]], ...] = (
            ("digests", Digests), ("growth", Grown), ("training", Trained), ("reshard", Resharded)
        )  # fmt: skip
        for key, section in sections:
            if given.get(key) is not None:
                given[key] = section.from_json(given[key])
        given["groups"] = tuple(GroupEntry.from_json(group) for group in found.get("groups", ()))
        given["tensors"] = {name: TensorEntry.from_json(entry) for name, entry in found.get("tensors", {}).items()}
        return cls(**{**given, "intact": found.get(_SEAL, seal := _seal(found)) == seal})

    def factors(self) -> dict[str, Factors] | None:
        """Parameter -> the factors by which a run from here follows the run of the growth's source; those that have
        none are left out. None where no growth recorded any."""
        if self.growth is None or self.growth.factors is None:
            return None
        return {name: factors for name in self.tensors if (factors := self.growth.factors.of(name))}

    def factors_in_force(self) -> GrowthFactors:
        """What the rates had last been multiplied by: of a growth that was not trained its factors, for the run to
        follow is still that of its source; of a trained one, these to the share that the run obeyed them."""
        recorded = self.growth.factors if self.growth else None
        if recorded is None or self.kind != "train":
            return recorded or GrowthFactors()
        share = self.training.followed if self.training else 0.0
        return GrowthFactors({name: f**share for name, f in recorded.other.items() if share})

    def to_json(self) -> dict[str, Any]:
        """The object for a manifest's file, without the digest of itself."""
        found = {"format_version": FORMAT_VERSION, **vars(self)}
        del found["intact"]
        found["groups"] = [group.to_json() for group in self.groups]
        found["tensors"] = {name: entry.to_json() for name, entry in self.tensors.items()}
        for key in ("digests", "growth", "training", "reshard"):
            found[key] = None if found[key] is None else found[key].to_json()
        optional = ("buffers", "digests", "expert_parallel", "reshard")
        return {key: value for key, value in found.items() if key not in optional or value is not None}


def _current(found: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a manifest, or of a source's identity in one, with the key ``form`` of before as ``format``."""
    renamed = {"format" if key == "form" else key: value for key, value in found.items()}
    return {**renamed, "format": found["format"]} if "format" in found else renamed


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None if there is none. Its files are not looked at, see `check_sizes`."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = Manifest.from_json(read_json(path), path)
    for name in manifest.files:
        inside(folder, name)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/bert2bert.json`` atomically: the mark that everything else in the folder is there."""
    found = manifest.to_json()
    replace(folder / MANIFEST, json.dumps({**found, _SEAL: _seal(found)}, indent=1) + "\n")


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise InvalidCheckpoint unless the folder holds every file that the manifest lists, at its size."""
    for name, size in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "missing" if found is None else f"{found:,} bytes long"
            raise InvalidCheckpoint(
                f"{file}: {what}, the manifest says {size:,} bytes: lost, truncated or replaced after it was written. "
                "Restore the file or use another tag."
            )


def _seal(found: Mapping[str, Any]) -> str:
    """Digest of all entries of a manifest, except that of the digest itself."""
    plain = json.loads(json.dumps({key: value for key, value in found.items() if key != _SEAL}))
    return xxhash.xxh3_128(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _check(path: Path, found: Mapping[str, Any]) -> None:
    if "files" not in found:
        raise InvalidCheckpoint(f"{path} is not a manifest of this project: no 'files'. Restore the file.")
    for key, wanted in _SHAPES.items():
        if key in found and (bad := mismatch(found[key], wanted, key)):
            raise InvalidCheckpoint(f"{path} is not a manifest of this project: {bad}. Restore the file.")
    if bad := wrong((found.get("growth") or {}).get("factors")):
        raise InvalidCheckpoint(f"{path} is not a manifest of this project: {bad}. Restore the file.")
    for key, needed in _NEEDED.items():
        entries = found.get(key) or ()
        for entry in entries.values() if isinstance(entries, dict) else entries:
            if lack := [name for name in needed if name not in entry]:
                raise InvalidCheckpoint(f"{path} is not a manifest of this project: no {lack[0]!r} in {key}.")
    for name, entry in found.get("tensors", {}).items():
        if any(size < 0 for size in entry["shape"]):
            raise InvalidCheckpoint(f"{path} is not a manifest of this project: {name!r} has shape {entry['shape']}.")
