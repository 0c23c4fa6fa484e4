"""Everything about a target except its values, made of its source: groups, steps, counters, scheduler, client state.

Refuses, as UnsupportedGrowth, an optimizer whose states are not known, where the format keeps them, and groups that
join differently trained parameters; as InvalidConfig, the groups of a source that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bert2bert.checkpoints import clients
from bert2bert.checkpoints.groups import LAYOUTS, Member, param_groups, refines
from bert2bert.checkpoints.hub.beside import grown_beside, json_bytes
from bert2bert.checkpoints.job import DTYPES, TargetGroup, TargetSpec
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.source import Source
from bert2bert.checkpoints.target import Target
from bert2bert.errors import InvalidConfig, UnsupportedGrowth

OWN_STATE = ("bert2bert", "universal_checkpoint_info")  # client state that belongs to the format it is written in
_NO_HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class Content:
    """The tensors of a target, in the model's order, and where they come from. All names are those of the files."""

    shapes: Mapping[str, tuple[int, ...]]
    aliases: dict[str, str]
    """Absent tied name -> the name that is kept."""
    config: dict[str, Any]
    """The target's Hugging Face config; empty: there is none."""
    members: Mapping[str, Member]
    """What decides a tensor's optimizer group."""
    made_of: Mapping[str, Sequence[str]]
    """The source's tensors that a tensor is made of; it continues with the first trained one's group and step."""
    known: str | None
    """The layout of the source's groups, see `known_layout`."""
    order: Callable[[list[str]], list[str]]
    """Puts names, given in the model's order, into the order in which the source's groups would hold them."""
    frozen: frozenset[str] = frozenset()
    """Tensors that the run does not train."""
    akin: Mapping[str, str] = field(default_factory=dict)
    """Target's tensor without a source -> the source's tensor whose group it joins."""
    reset: frozenset[str] = frozenset()
    """Tensors whose moments and steps start from zero."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of tensors in a Hugging Face folder that are not of the target's precision, by torch's names."""


def make_spec(source: Source, content: Content, target: Target) -> TargetSpec:
    """Everything about the checkpoint to write except its values. Split experts: `expert_parallel.target`."""
    hub = target.format == "hub"
    if source.other_states and not hub:
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer keeps {', '.join(source.other_states)}. How these grow is not known (known "
            "are the states of Adam, AdamW, LAMB, Lion, Muon, and SGD with momentum).\n"
            "Take the weights alone with --format hub."
        )
    groups = _Groups(source, content, target)
    precision = target.precision or own_precision(source, target.format)
    config = content.config
    beside = clients.beside(source) if not hub else {}
    if beside and config:
        beside["config.json"] = json_bytes(config)
    return TargetSpec(
        shapes=dict(content.shapes),
        aliases=content.aliases,
        config=config | {"dtype": _loaded_as(source, precision, content)} if config and hub else config,
        groups=groups.made(),
        group_layout=groups.layout,
        precision=precision,
        states=source.states if not hub else source.states[:1],
        counters={key: int(source.counters.get(key) or 0) for key in _COUNTERS},
        lr_scheduler=source.lr_scheduler,
        loss_scaler=source.loss_scaler if source.precision == "fp16" else None,  # bf16's is a fixed scale of 1
        client_state={key: value for key, value in source.client_state.items() if key not in OWN_STATE},
        buffers=source.buffers,
        extras=source.extras,
        unread=source.unread,
        extra_files=grown_beside(config, source.folder, source.path) if hub else {},
        tag_name=target.tag or source.tag,
        beside=beside,
        frozen=groups.frozen,
        frozen_later=tuple(n for n, made in content.made_of.items() if {*made[:1]} & {*source.frozen_later})
        if not hub
        else (),
        second_names=source.second_names if target.stage in (1, 2) else {},
        lists_frozen=source.lists_frozen,
        fused=source.fused,
        clip_grad=source.clip_grad,
        dtypes={name: getattr(torch, dtype) for name, dtype in content.dtypes.items() if hub},
    )


def as_restored(spec: TargetSpec, source: Source, target: Target) -> TargetSpec:
    """The target without the values of parameters in no optimizer group that the source's files do not list, at stage
    3: engines keep a part of each there, and a strict load asks for its name alone."""
    lost = [name for name in source.untrained if name in spec.buffers] if target.stage == 3 else []
    kept = {name: value for name, value in spec.buffers.items() if name not in lost}
    return replace(spec, buffers=kept, unread=(*spec.unread, *lost))


def without_names(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a source's group."""
    return {key: value for key, value in group.items() if key != "names"}


class _Groups:
    """The optimizer groups of a target, made of those of its source. ``layout``: which, ``frozen``: names in none."""

    def __init__(self, source: Source, content: Content, target: Target) -> None:
        self._source, self._content, self._hub = source, content, target.format == "hub"
        # Of these DeepSpeed makes engines with groups that hold nothing but frozen parameters, and counts such groups.
        self._keeps_empty = target.stage == 3 or (target.stage == 0 and not source.fused)
        self._groups = source.groups or []
        self._of = {name: i for i, group in enumerate(self._groups) for name in group["names"]}
        self.layout = self._chosen(target.groups)
        self._origins = {
            name: next(filter(self._trained, found), next(iter(found), None)) for name, found in content.made_of.items()
        }
        # DeepSpeed's partitions have no place for a parameter without elements: it is listed as a frozen one.
        empty = {name for name, shape in content.shapes.items() if 0 in shape}
        if target.stage == 0 and (lost := sorted(empty & content.frozen)) and source.stage != 0:
            raise UnsupportedGrowth(
                f"{source.path}: {lost[0]} has no elements, so its optimizer group is not in the source's files, and "
                "stage 0 counts it.\nChoose another stage, or freeze it in the script and save the run at stage 0."
            )
        frozen = content.frozen | (empty if target.stage != 0 else set())
        self.frozen = tuple(name for name in content.made_of if name in frozen and not self._hub)

    def made(self) -> tuple[TargetGroup, ...]:
        """The groups, in order."""
        return tuple(
            # Where a group joins differently trained layers: too few steps would make Adam's first updates too large.
            TargetGroup(
                part, decay, names, self._hyper(names, decay), max(map(self._step, names)), self._moments(names)
            )
            if names
            else TargetGroup(part, decay, (), without_names(self._groups[i]), 0, self._optimizer(i))
            for part, decay, names, i in self._sets()
        )

    def _chosen(self, asked: str | None) -> str:
        if self._hub or (asked is None and not self._groups):
            return "layers"  # there are none to keep
        chosen = asked or self._content.known or "source"
        if chosen == "source" and not self._groups:
            raise InvalidConfig(
                f"--groups source: {self._source.path} holds weights only, and no optimizer groups; leave it out"
            )
        return chosen

    def _trained(self, name: str) -> bool:
        return self._source.tensors[self._source.aliases.get(name, name)].trainable

    def _group(self, name: str) -> int | None:
        """Number of the source's group that a tensor continues; a new tensor's is that of its kind, else the first that
        decays as it does."""
        if origin := self._origins[name]:
            return self._of.get(origin)
        if (akin := self._content.akin.get(name)) in self._of:
            return self._of[akin]
        decay = self._content.members[name].decay
        fits = (i for i, group in enumerate(self._groups) if bool(group.get("weight_decay")) == decay)
        return next(fits, 0 if self._groups else None)

    def _sets(self) -> list[tuple[str, bool, tuple[str, ...], int]]:
        """Part, decay and names of every group, and the number of the source's group that it is, if it is one."""
        names = [name for name in self._origins if name not in self.frozen]
        if self.layout != "source":
            members = {name: self._content.members[name] for name in names}
            return [(group.part, group.decay, group.names, -1) for group in param_groups(members, self.layout)]
        ordered, found = [name for name in self._content.order(names) if name not in self.frozen], []
        for i, group in enumerate(self._groups):
            kept = [name for name in ordered if self._group(name) == i]
            if group.get("use_muon"):  # DeepSpeed sorts them by shape
                kept.sort(key=self._content.shapes.__getitem__, reverse=True)
            if kept or (self._keeps_empty and not group["names"]):
                found.append((f"group.{i}", bool(group.get("weight_decay")), tuple(kept), i))
        return found

    def _hyper(self, names: Sequence[str], decay: bool) -> dict[str, Any]:
        """The first parameter's group's; in new groups, the decay is that of the first that has any, or none."""
        of = [self._groups[i] for i in map(self._group, names) if i is not None]
        if not of:
            return _NO_HYPER | {"weight_decay": 0.01 if decay else 0.0}
        found = without_names(of[0])
        if self.layout not in ("source", self._content.known) and "weight_decay" in found:
            found["weight_decay"] = next((g["weight_decay"] for g in of if decay and g.get("weight_decay")), 0.0)
        return found

    def _step(self, name: str) -> int:
        origin = self._origins[name]
        if origin is None or name in self._content.reset or len(self._source.states) == 1:
            return 0  # nothing of the source's optimizer is carried over: a fresh one
        return self._source.step(origin)

    def _moments(self, names: Sequence[str]) -> dict[str, str]:
        """State -> its name in the files. Raises UnsupportedGrowth where the tensors' optimizers differ."""
        if self._hub:
            return dict(ADAM)  # there are none
        found: list[dict[str, str]] = []
        for i in map(self._group, names):
            kept = self._optimizer(i)
            found += [] if kept in found else [kept]
        if len(found) > 1:
            raise UnsupportedGrowth(
                f"{self._source.path}: {names[0]} and others of its group ({self.layout}) were trained by different "
                "optimizers, whose states do not mix.\nKeep the groups of the source: --groups source."
            )
        return dict(found[0])

    def _optimizer(self, group: int | None) -> dict[str, str]:
        """The moments of one of the source's groups; Adam's where it has none yet."""
        if group is None:
            return ADAM
        kept = self._source.moments[group] if group < len(self._source.moments) else {}
        return kept or ({"exp_avg": "momentum_buffer"} if self._groups[group].get("use_muon") else ADAM)


def own_precision(source: Source, format: str) -> str:
    """A target's where none was asked for: the source's; a Hugging Face folder keeps a run's fp32 master weights
    whole."""
    return "fp32" if format == "hub" and source.format != "hub" else source.precision


def _loaded_as(source: Source, precision: str, content: Content) -> Any:
    """The dtype that a Hugging Face folder's config tells from_pretrained to load it in. Where tensors keep their own,
    that of the source's config, so that both are loaded alike; where that has none, one that holds them all."""
    low, dtypes = str(DTYPES[precision]).removeprefix("torch."), content.dtypes
    if source.format != "hub" or not dtypes:
        return low
    config = source.config or {}
    known = config.get("dtype") or config.get("torch_dtype")
    if isinstance(known, dict) or known in ("float32", "float16", "bfloat16"):
        return known
    return widest([*dtypes.values(), *([low] if content.shapes.keys() - dtypes.keys() else [])])


def widest(dtypes: Iterable[str]) -> str:
    """The dtype, by torch's name, that holds every number of these unchanged; float32 is the widest that is written."""
    found = set(dtypes)
    return found.pop() if found in ({"float16"}, {"bfloat16"}) else "float32"


def known_layout(source: Source, members: Mapping[str, Member]) -> str | None:
    """The layout that gives exactly the source's groups, in this order, if any: what its manifest says, where that is
    one; also where the source obeyed factors, and had its groups split by them. members: of the source's tensors, what
    decides their groups."""
    have = [tuple(group["names"]) for group in source.groups]
    owned = {name for group in have for name in group}
    if not owned <= members.keys():
        return None
    ordered = {name: members[name] for name in source.tensors if name in owned}
    recorded = source.manifest.group_layout if source.manifest else None
    for layout in sorted(LAYOUTS, key=lambda layout: layout != recorded) if have else ():
        if [group.names for group in param_groups(ordered, layout)] == have:
            return layout
    split = recorded == "layers" and refines(have, param_groups(ordered, recorded))
    return recorded if split else None
