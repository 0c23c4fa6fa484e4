"""Read checkpoints of ZeRO stage 0: one ``mp_rank_00_model_states.pt``, whole tensors, the torch optimizer's state.

The optimizer's state has no names, only positions in its groups. Names come from, in this order: this project's
manifest; ``param_names``, which torch keeps for an optimizer that was given named parameters; in 16 bits, the master
weights, which rounded are the model's; in fp32, the usual ways to build groups (`groups`, and scripts' other
rules for what does not decay), of which one must fit every group's length and every moment's shape. Both of DeepSpeed's
16-bit forms are read: master weights tensor by tensor (FP16_UnfusedOptimizer) and flat by group (FP16_Optimizer, for
FusedAdam). Steps are as stored; the first of the two forms steps once, on zero gradients, when the engine starts, so
its count is one ahead.

Refuses, as InvalidCheckpoint: an optimizer whose parameters cannot be distinguished, contents that contradict each
other, and whatever model states refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.groups import LAYOUTS, Place, by_name, param_groups
from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.optimizers import KNOWN, held, moment_keys, unknown
from bert2bert.checkpoints.source import STATES, Source, TensorMeta
from bert2bert.checkpoints.zero.model_states import ModelStates, hyper, take
from bert2bert.checkpoints.zero.tag_files import MODEL, find_files
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader

_SHAPED = {key for keys in KNOWN for key in keys.values()}
_FEW = 64  # elements compared before a whole tensor is
_SCALER = {  # DeepSpeed's names at stage 0 -> those of its loss scaler objects at the other stages
    "cur_scale": "cur_scale", "cur_iter": "cur_iter", "last_overflow_iter": "last_overflow_iter",
    "scale_factor": "scale_factor", "scale_window": "scale_window", "dynamic_loss_scale": "dynamic",
}  # fmt: skip


def is_stage0(folder: Path) -> bool:
    """Whether a tag's folder holds a checkpoint of ZeRO stage 0."""
    if any(folder.glob("*_optim_states.pt")) or not (folder / MODEL).is_file():
        return False
    found = torch_reader.load(folder / MODEL, ("param_shapes",))
    return isinstance(found, dict) and "param_shapes" in found and found["param_shapes"] is None


class Stage0Source(Source):
    """A checkpoint of ZeRO stage 0; ``world_size`` is that of the run, and says nothing about the file."""

    format = "zero"

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(path, folder, manifest)
        self.files, _, _ = find_files(folder)
        model = self._model = ModelStates(self.files, sharded=False, whole=True, manifest=manifest)
        self.stage, self.world_size, self.precision = 0, model.world_size, model.precision()
        self.counters, self.lr_scheduler = model.counters, model.lr_scheduler
        self.client_state, self.buffers, self.extras = model.client_state, model.buffers, model.extras
        self.aliases, self.unread = model.aliases, model.unread
        self.second_names, self.unlisted = model.second_names, model.unlisted
        self.clip_grad = model.clip_grad()
        self._values: dict[str, dict[str, torch.Tensor]] = {}  # flat
        try:
            self._read(model.optimizer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = "the manifest beside it" if manifest else "each other"
            raise InvalidCheckpoint(
                f"{self.files[0]}: its contents do not fit {what} ({type(error).__name__} {error}): they are of two "
                "checkpoints. Restore the file or use another tag."
            ) from None

    def _read(self, optimizer: dict[str, Any] | None) -> None:
        model = self._model
        if optimizer is None:  # an engine without one: weights alone
            self.tensors = {
                n: TensorMeta(n, s, str(model.module[n].dtype)[6:], None, True) for n, s in model.frozen.items()
            }
            self._values = {n: {"fp32": model.module[n].reshape(-1)} for n in self.tensors}
            return
        inner = optimizer.get("optimizer_state_dict", optimizer)
        live, states = inner["param_groups"], inner["state"]
        flat: Any = optimizer.get("fp32_groups_flat")
        masters: Any = optimizer.get("fp32_groups")
        names = self._names(live, states, flat, masters)
        shapes = dict(model.frozen)
        model.own(names)
        self.untrained = model.untrained
        self.fused = flat is not None
        self.clip_grad = optimizer.get("clip_grad", self.clip_grad)
        if "cur_scale" in optimizer:
            self.loss_scaler = {own: optimizer[key] for key, own in _SCALER.items() if key in optimizer}
        kept = [[states.get(index, {}) for index in group["params"]] for group in live]
        found = [set().union(*map(held, group)) for group in kept]
        self.other_states = unknown(found)
        self.moments = [{} if self.other_states else moment_keys(keys) or {} for keys in found]
        if any(self.moments):
            self.states = STATES
        for g, group in enumerate(live):
            self.groups.append({**hyper(group), "names": names[g]})
            self.groups[-1].pop("param_names", None)
            at = 0
            for i, name in enumerate(names[g]):
                shape, numel = shapes[name], math.prod(shapes[name])
                state = kept[g][0 if flat is not None else i]
                part = slice(at, at + numel) if flat is not None else slice(0, numel)
                at += numel
                master = model.module[name]
                if flat is not None or masters is not None:
                    master = flat[g] if flat is not None else masters[g][i]
                parts = {"fp32": master} | {s: state[key] for s, key in self.moments[g].items() if held(state)}
                self._values[name] = {s: tensor.reshape(-1)[part] for s, tensor in parts.items()}
                if bad := [s for s, tensor in self._values[name].items() if tensor.numel() != numel]:
                    raise ValueError(f"{bad[0]} of '{name}' does not have the {numel} elements of shape {shape}")
                self._steps[name] = int(state.get("step", group.get("step", 0)))
            if flat is not None and at != flat[g].numel():
                raise ValueError(f"optimizer group {g} holds {flat[g].numel()} elements, its parameters {at}")
        self.tensors, self._frozen = model.describe(self.groups, lambda name: self._values[name]["fp32"].dtype)

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        row = math.prod(meta.shape[1:])
        low, high = start * row, stop * row
        if not meta.trainable:
            return take(self._frozen[meta.name], low, high) if state == "fp32" else torch.zeros(high - low)
        values = self._values[meta.name].get(state)
        return torch.zeros(high - low) if values is None else values[low:high]  # None: never stepped

    # --- which parameter is whose ------------------------------------------------------------------------------

    def _names(self, live: list[Any], states: dict[int, Any], flat: Any, masters: Any) -> list[list[str]]:
        recorded = [group.names for group in self.manifest.groups] if self.manifest else []
        recorded = recorded or [group.get("param_names") for group in live]
        if all(recorded):
            names = [list(group) for group in recorded]
            lengths = [len(group) for group in (names if flat is not None else [g["params"] for g in live])]
            if [len(group) for group in names] != lengths or len(names) != len(live):
                raise ValueError(f"{[len(g) for g in names]} parameters in the groups, {lengths} in the optimizer")
            return names
        if flat is not None:
            return self._by_value([[group] for group in flat], joined=True)
        if masters is not None:
            return self._by_value(masters, joined=False)
        kept = [[states.get(index, {}) for index in group["params"]] for group in live]
        return self._by_rule(kept, muon=any(group.get("use_muon") for group in live))

    def _by_value(self, masters: list[list[torch.Tensor]], joined: bool) -> list[list[str]]:
        """The parameters whose values, tensor after tensor, are the rounded master weights of each group.

        ``masters``: one tensor a parameter, or (``joined``) one for all of a group. Of parameters with equal values
        throughout (never trained zeros) the model's first is taken first.
        """
        left = {name: self._model.module[name].reshape(-1) for name in self._model.frozen}
        groups: list[list[str]] = []
        for g, group in enumerate(masters):
            groups.append([])
            for master in group:
                flat, at = master.reshape(-1), 0
                while at < flat.numel():
                    name = self._matching(flat[at:], left, None if joined else tuple(master.shape))
                    if name is None:
                        raise InvalidCheckpoint(
                            f"{self.files[0]}: no parameter of the model has the master weights of optimizer group {g} "
                            f"from element {at} on, after {groups[-1][-1:] or 'none'}: model and optimizer are of two "
                            "checkpoints, or the weights were changed after the last step. Restore the file."
                        )
                    groups[-1].append(name)
                    at += left.pop(name).numel()
        return groups

    def _matching(self, flat: torch.Tensor, left: dict[str, torch.Tensor], shape: tuple[int, ...] | None) -> str | None:
        found = []
        for name, weight in left.items():
            few = min(_FEW, weight.numel())
            fits = 0 < weight.numel() <= flat.numel() and shape in (None, self._model.frozen[name])
            if fits and torch.equal(flat[:few].to(weight.dtype), weight[:few]):
                found.append(name)
        if len(found) > 1:
            found = [n for n in found if torch.equal(flat[: left[n].numel()].to(left[n].dtype), left[n])]
        return found[0] if found else None

    def _by_rule(self, states: list[list[dict[str, Any]]], muon: bool) -> list[list[str]]:
        """The groups of the one usual layout that fits the lengths of the groups and the shapes of the moments."""
        names: list[str] = list(self._model.frozen)
        fits: list[list[list[str]]] = []
        for groups in _usual(self._model.frozen, self._model.aliases):
            if muon:
                groups = [half for group in groups for half in self._halves(group) if half]
            if [len(group) for group in groups] == [len(group) for group in states] and all(
                tuple(state[key].shape) == self._model.frozen[name]
                for group, kept in zip(groups, states, strict=True)
                for name, state in zip(group, kept, strict=True)
                for key in _SHAPED & held(state)
            ):
                fits += [groups] if groups not in fits else []
        if len(fits) == 1:
            return fits[0]
        raise InvalidCheckpoint(
            f"{self.files[0]}: ZeRO stage 0 keeps no names with the optimizer's state, and its {len(states)} groups "
            f"of {', '.join(str(len(group)) for group in states[:8])} parameters are not just one of the usual "
            f"groupings of the model's {len(names)} in their order (one group; with and without decay, by the rule of "
            "transformers' Trainer, by the number of dimensions, or by 'bias' and 'LayerNorm.weight' in a name; a pair "
            "a layer); if some are frozen, nothing here says which. Save it again with the optimizer built from named "
            "parameters (torch then keeps their names), or under ZeRO 1, or hand over the weights as a Hugging Face "
            "folder (save_pretrained)."
        )

    def _halves(self, group: list[str]) -> tuple[list[str], list[str]]:
        """The two groups that DeepSpeed makes of one for Muon: matrices except embeddings and output, the largest
        first; the rest."""
        wide = [
            name for name in group
            if len(self._model.frozen[name]) > 1 and not any(word in name.lower() for word in ("embed", "lm_head"))
        ]  # fmt: skip
        return sorted(wide, key=self._model.frozen.__getitem__, reverse=True), [
            name for name in group if name not in wide
        ]


_NO_DECAY = (("bias",), ("bias", "LayerNorm.weight"), ("bias", "LayerNorm.weight", "layer_norm.weight"))
"""Parts of names by which transformers' example scripts and older Trainers say what does not decay."""


def _usual(shapes: dict[str, tuple[int, ...]], aliases: dict[str, str]) -> Iterable[list[list[str]]]:
    """The groupings that scripts use, in the model's order inside each group."""
    rule = by_name(shapes, aliases)
    rules = [
        rule,
        {name: Place("all", len(shape) > 1) for name, shape in shapes.items()},
        *({name: Place("all", not any(part in name for part in parts)) for name in shapes} for parts in _NO_DECAY),
    ]
    for layout in reversed(LAYOUTS):
        for members in rules if layout == "decay" else [rule]:
            groups = [list(group.names) for group in param_groups(members, layout)]
            yield groups
            if layout == "decay" and len(groups) == 2:
                yield groups[::-1]
