"""Read expert-parallel checkpoints of ZeRO stages 1 and 2: AutoEP's and those of deepspeed.moe.layer.MoE.

Every tensor is whole and has the model's own name (see `expert_parallel`): experts are gathered from the partitions of
the ranks that hold them, master weights and moments alike. The groups of experts that DeepSpeed took out of the
optimizer's groups are put back, so that ``groups`` are those which the model would be trained with on its own.

Refuses, as InvalidCheckpoint, beside what `zero` refuses: files of experts that are missing, or not of the same save as
the optimizer's; groups of experts that do not say how they are split; Muon, whose momentum is not cut like the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bert2bert.checkpoints.expert_parallel.layout import (
    ExpertParallel,
    Part,
    blocks,
    cut,
    in_file,
    is_expert,
    is_local,
    is_numbered,
    local_counts,
    number,
    parts,
    ranks_of,
    renamer,
    router_of,
    spread,
    whole_shapes,
)
from bert2bert.checkpoints.zero.layout import Piece
from bert2bert.checkpoints.zero.model_states import ModelStates, autoep_layers
from bert2bert.checkpoints.zero.placement import Team
from bert2bert.checkpoints.zero.reader import ZeroSource
from bert2bert.checkpoints.zero.tag_files import MODEL, expert_files
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader

_FEW = 64  # elements of an entry that are compared to tell files of different saves apart
_OWN = ("name", "moe")  # what DeepSpeed adds to a group of experts


class ExpertStates(ModelStates):
    """Model states with the names of the model in place of AutoEP's. ``captured``: the routers were there twice;
    ``experts``: what the files of single experts hold, whole tensor -> flat index of the first element -> elements."""

    experts: dict[str, dict[int, torch.Tensor]] = MappingProxyType({})  # type: ignore[assignment]

    def _checked(self, path: Path, found: Any) -> dict[str, Any]:
        found = dict(super()._checked(path, found))
        prefixes = [f"{layer['module_path']}." for layer in autoep_layers(found)]
        module = dict(found.get("module") or {})
        twice = [name for name in module if name.startswith(tuple(f"{prefix}gate.gate." for prefix in prefixes))]
        self.captured = bool(prefixes and twice)
        self._rename = renamer(list(module), prefixes, back=True)
        found["module"] = {self._rename(name): value for name, value in module.items() if name not in twice}
        found["param_shapes"] = [self._keys(shapes) for shapes in found["param_shapes"]]
        for key in ("frozen_param_shapes", "frozen_param_fragments"):
            if found.get(key) is not None:
                found[key] = self._keys(found[key])
        pairs = (found.get("shared_params") or {}).items()
        found["shared_params"] = {self._rename(a): self._rename(b) for a, b in pairs if a not in twice}
        found["buffer_names"] = [self._rename(name) for name in found.get("buffer_names") or ()]
        return found

    def _keys(self, table: dict[str, Any]) -> dict[str, Any]:
        return {self._rename(name): value for name, value in table.items()}

    def renamed(self, name: str) -> str:
        """The model's own name; experts stay as the rank has them."""
        return self._rename(name)

    def frozen_pieces(self, name: str) -> list[torch.Tensor]:
        """Frozen experts are in the files of single experts."""
        return list(self.experts[name].values()) if name in self.experts else super().frozen_pieces(name)


class ExpertSource(ZeroSource):
    """An expert-parallel checkpoint of ZeRO stage 1 or 2."""

    _model: ExpertStates

    def _open_model(self, paths: list[Path]) -> ExpertStates:
        if paths[0].name != MODEL:
            raise InvalidCheckpoint(
                f"{self.folder}: files of single experts beside {paths[0].name}: an expert-parallel run of ZeRO "
                "stage 3, which this program does not read, or two checkpoints in one tag. It reads expert-parallel "
                "files of stages 1 and 2: save it from such a run."
            )
        files = expert_files(self.folder)
        self.files += files
        self._entries = [(file, key, value) for file in files for key, value in torch_reader.load(file).items()]
        return ExpertStates(paths, sharded=False)

    def _split(self, states: dict[str, Any]) -> list[int | None]:
        """Of each optimizer group, the number of ranks that its experts are split among; None: it holds no experts."""
        base = states["base_optimizer_state"]
        found: list[int | None] = []
        for i, group in enumerate(base["param_groups"] if isinstance(base, dict) else ()):
            match = re.fullmatch(r"ep_size_(\d+)", str(group.get("name")))
            if group.get("moe") and not (match and int(match[1]) and self._model.world_size % int(match[1]) == 0):
                raise InvalidCheckpoint(
                    f"{self._paths[0]}: optimizer group {i} is one of experts named {group.get('name')!r}, expected "
                    f"'ep_size_N' with an N that divides the {self._model.world_size} ranks. Restore the file."
                )
            if group.get("use_muon"):
                raise InvalidCheckpoint(
                    f"{self._paths[0]}: an expert-parallel run with Muon, whose momentum this program does not find in "
                    "such files. Go on without its optimizer state: DeepSpeed's zero_to_fp32.py, then save_pretrained."
                )
            found.append(int(match[1]) if group.get("moe") and match else None)
        return found

    def _cut_among(self, states: dict[str, Any], count: int) -> list[int]:
        sizes = [*self._split(states), *[None] * count][:count]
        return [self._model.world_size // (size or 1) for size in sizes]

    @property
    def _data_first(self) -> bool:
        return self._model.ds_config.get("use_data_before_expert_parallelism") is True

    def _teams(self) -> list[list[Team] | None]:
        world, first = self._model.world_size, self._data_first
        self._sizes = self._split(self._ranks[0])
        teams: list[list[Team] | None] = []
        held = self._held()
        for size, shapes in zip(self._sizes, self._model.shapes, strict=True):
            if bool(size) != any(map(is_local, shapes)):
                raise InvalidCheckpoint(
                    f"{self.folder}: {next(iter(shapes), 'a group')} and others are in an optimizer group that is "
                    f"{'' if size else 'not '}of experts by {self._paths[0].name}: files of different checkpoints are "
                    "mixed."
                )
            split = range(size or 0)
            whole = [[parts(name, shape, rank, held) for name, shape in shapes.items()] for rank in split]
            ranks = [ranks_of(len(split), rank, world, first) for rank in split]
            teams.append([Team(ranks[rank], partial(_whole, whole[rank])) for rank in split] or None)
        return teams

    def _held(self) -> dict[str, int]:
        """Experts on a rank by layer, of all groups: a layer's may be in several."""
        return local_counts([name for shapes in self._model.shapes for name in shapes])

    # --- the model's own terms ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        model = self._model
        whole: dict[str, tuple[int, ...]] = {}
        of_flat: list[list[str]] = []
        held = self._held()
        for size, shapes in zip(self._sizes, model.shapes, strict=True):
            names = dict[str, None]()
            for name, shape in shapes.items():
                found = whole_shapes(name, shape, size, held) if size else {name: shape}
                self._steps.update(dict.fromkeys(found, self._steps.pop(name, 0)))
                names |= dict.fromkeys(found)
                whole |= found
            of_flat.append(list(names))
        self._read_entries(whole)
        model.order = _with_experts(model.order, list(whole))
        groups = [{**group, "names": names} for group, names in zip(self.groups, of_flat, strict=True)]
        cuts = [list(shapes) for shapes in model.shapes]
        self.groups, self.moments = self._merged(groups, model.order)
        model.shapes = [{name: whole[name] for name in group["names"]} for group in self.groups]
        size = max(size or 1 for size in self._sizes)
        self.expert_parallel = ExpertParallel(size, self._how(whole, size, cuts), model.captured, self._data_first)

    def _read_entries(self, whole: dict[str, tuple[int, ...]]) -> None:
        """Sort the entries of the files of single experts by whole tensor and place; enter in ``whole`` those that the
        optimizer does not own: frozen ones are nowhere else."""
        found: dict[str, dict[int, torch.Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file, key, value in self._entries:
            place = in_file(key, tuple(value.shape)) if isinstance(value, torch.Tensor) else None
            if place is None:
                raise InvalidCheckpoint(f"{file}: its entry {key!r} is not a tensor of an expert. Restore the file.")
            name, start, expert, share = place
            found.setdefault(name, {})[start] = value.reshape(-1)
            many = () if is_numbered(name) else (max(expert + 1, shapes.get(name, (0,))[0]),)
            shapes[name] = (*many, *share)
        frozen = {name: shape for name, shape in shapes.items() if name not in whole}
        self._model.frozen |= frozen
        whole |= frozen
        recorded = self._model.ranks[0].get("num_experts")
        for block in blocks(whole):
            if isinstance(recorded, list) and block.experts not in recorded:
                raise InvalidCheckpoint(
                    f"{self.folder}: the files of single experts hold {block.experts} experts of {block.prefix[:-1]}, "
                    f"and the model has {max(recorded)} a layer: files are missing. Copy all of them (each node writes "
                    "its own)."
                )
        self._model.experts = {name: dict(sorted(pieces.items())) for name, pieces in found.items()}
        for name in dict.fromkeys([*found, *(n for n in whole if is_expert(n))]):
            held = sum(piece.numel() for piece in found.get(name, {}).values())
            if held != math.prod(whole[name]):
                raise InvalidCheckpoint(
                    f"{self.folder}: the files of single experts hold {held} elements of '{name}', which has "
                    f"{math.prod(whole[name])}: files are missing, or of different checkpoints. Copy all of them (each "
                    "node writes its own)."
                )

    def _merged(
        self, groups: list[dict[str, Any]], order: Sequence[str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Groups of experts joined to those that they were taken out of: the same hyper-parameters and, if there are
        several such, the router of the same layer. Else they stay groups. order: the model's."""
        kept, moments = [], []
        for group, size, states in zip(groups, self._sizes, self.moments, strict=True):
            if not size:
                kept.append(group)
                moments.append(states)
        for group, size, states in zip(groups, self._sizes, self.moments, strict=True):
            if not size:
                continue
            plain = _plain(group)
            fits = [i for i, other in enumerate(kept) if _plain(other) == plain and moments[i] == states]
            router = router_of(group["names"][0]) if group["names"] else ""
            fits = [i for i in fits if any(name.startswith(router) for name in kept[i]["names"])] or fits
            if fits:
                joined = {*kept[fits[0]]["names"], *group["names"]}
                kept[fits[0]] = {**kept[fits[0]], "names": [name for name in order if name in joined]}
            else:
                kept.append({**plain, "names": group["names"]})
                moments.append(states)
        return kept, moments

    def _how(self, whole: dict[str, tuple[int, ...]], size: int, cuts: list[list[str]]) -> bool | None:
        """Whether the engine's groups have the routers last; None: not in the model's order, either."""
        groups = [group["names"] for group in self.groups]
        rename = renamer(list(whole), [block.prefix for block in blocks(whole) if block.auto])
        wanted = [[name if is_local(name) else rename(name) for name in names] for names in cuts]
        for last in (False, True):
            if [list(found.shapes) for found in cut(groups, whole, size, last)] == wanted:
                return last
        return None

    def _check_weights(self) -> None:
        """Experts' files, too, hold the master weights up to rounding."""
        super()._check_weights()
        for name, pieces in self._model.experts.items():
            for start, piece in pieces.items() if self.tensors[name].trainable else ():
                few = min(piece.numel(), _FEW)
                master = self._elements(name, "fp32", start, start + few)
                if not torch.allclose(piece[:few].float(), master, torch.finfo(piece.dtype).eps, 1e-7, equal_nan=True):
                    raise InvalidCheckpoint(
                        f"{self.folder}: files of different checkpoints are mixed: the weights of '{name}' in the "
                        "files of single experts are not the master weights in the optimizer's. Restore the files of "
                        "one save, or use another tag."
                    )


def _whole(held: Sequence[Sequence[Part]], pieces: Sequence[Piece]) -> list[tuple[str, int, int, int]]:
    return list(spread(pieces, held))


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in (*_OWN, "names")}


def _with_experts(order: Sequence[str], whole: Sequence[str]) -> list[str]:
    """All names: experts after their router, which the module's file has."""
    layers: dict[str, list[str]] = {}
    for name in whole:
        if is_expert(name):
            layers.setdefault(router_of(name), []).append(name)
    found: list[str] = []
    for name in order:
        found.append(name)
        for router in [r for r in layers if name.startswith(r)]:
            found += sorted(layers.pop(router), key=number)
    return [*found, *(name for names in layers.values() for name in names)]
