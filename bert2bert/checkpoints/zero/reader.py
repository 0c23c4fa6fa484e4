"""Read native ZeRO checkpoints, stages 1, 2 and 3, at any world size, straight from the memory-mapped shard files.

Files hold flat tensors without names; `placement` says where each parameter's elements lie, and Muon's momentum. Both
forms of bf16 optimizer, parameter_alignment and any start alignment, sub-groups, optimizers offloaded to the CPU (the
same files), frozen parameters and never-stepped groups (zeros, step 0) are read. With ``round_robin_gradients``
parameters lie in the order of ``param_shapes``, which is right, not where ``param_slice_mappings`` says.

Refuses, as InvalidCheckpoint: missing, truncated and foreign files; files of different saves, world sizes or stages in
one tag; sizes that do not fit the layout; tensor or pipeline parallel checkpoints, and stage 3 of expert-parallel ones
(stages 1 and 2: see `expert_source`); ``elastic_checkpoint``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.optimizers import held, moment_keys, unknown
from bert2bert.checkpoints.source import STATES, Source, TensorMeta
from bert2bert.checkpoints.zero.layout import round_robin
from bert2bert.checkpoints.zero.model_states import ModelStates, alike, hyper, optimizer_groups, plain_scaler, take
from bert2bert.checkpoints.zero.placement import Placement, Team
from bert2bert.checkpoints.zero.tag_files import MODEL, find_files
from bert2bert.errors import InvalidCheckpoint, some
from bert2bert.files import torch_reader

_FEW = 64  # elements of a rank that are compared to tell files of different saves apart


class ZeroSource(Source):
    """A native checkpoint of ZeRO stage 1, 2 or 3."""

    format = "zero"

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(path, folder, manifest)
        model_paths, self._paths, bf16 = find_files(folder)
        self.files = [*model_paths, *self._paths]
        model = self._model = self._open_model(model_paths)
        self._check_world()
        self._ranks = [self._open(file) for file in self._paths]
        self.world_size = model.world_size
        self.stage = self._check_stage()
        self.precision = "bf16" if bf16 else model.precision()
        self.counters, self.lr_scheduler = model.counters, model.lr_scheduler
        self.client_state, self.aliases = model.client_state, model.aliases
        self.buffers, self.extras = model.buffers, model.extras
        self.lists_frozen, self.frozen_later = model.lists_frozen, model.frozen_later
        self.unread, self.untrained = model.unread, model.untrained
        self.second_names, self.unlisted = model.second_names, model.unlisted
        self.of_ranks = model.of_ranks()
        self.loss_scaler = plain_scaler(self._ranks[0])
        self.clip_grad = self._ranks[0].get("clip_grad", model.clip_grad())
        self._flat: dict[str, list[list[torch.Tensor | None]]] = {}  # [state][rank][flat group]
        self._group_of_flat = self._read_groups()
        self._read_states()
        whole = {
            flat
            for flat, group in enumerate(self._group_of_flat)
            if self.groups[group].get("use_muon") and self.states == STATES and not self._offloaded
        }
        teams = self._teams()
        placed = Placement(
            self._paths, self._ranks, model, self._flat, stage=self.stage, robin=self._robin, teams=teams
        )
        self._place, self._momenta = placed.lay_out(whole)
        self._settle()
        self._describe()
        self._check_weights()

    # --- opening and consistency -------------------------------------------------------------------------------

    def _open_model(self, paths: list[Path]) -> ModelStates:
        return ModelStates(paths, sharded=paths[0].name != MODEL, manifest=self.manifest)

    def _teams(self) -> list[list[Team] | None] | None:
        """See `Placement`; of ranks that have different tensors."""
        return None

    def _settle(self) -> None:
        """Put into the model's own terms what the files say in the engine's."""

    def _check_world(self) -> None:
        world, folder = self._model.world_size, self.folder
        if not self._paths:
            raise InvalidCheckpoint(
                f"{folder}: no *_optim_states.pt beside {self._model.paths[0].name}: the shards of all {world} ranks "
                "are missing. Copy them too (each node writes its own)."
            )
        for kind, count in (("optimizer", len(self._paths)), ("model-states", len(self._model.paths))):
            if count != world and (kind == "optimizer" or self._model.sharded):
                what = f"missing: rank {some(range(count, world), 8)}" if count < world else "too many"
                files = "file" if count == 1 else "files"
                raise InvalidCheckpoint(
                    f"{folder}: {count} {kind} {files}, but it was saved by {world} ranks: {what}. Each node writes "
                    "its own files: copy all, and remove those of other runs."
                )

    def _open(self, path: Path) -> dict[str, Any]:
        found = torch_reader.load(path)
        states = found.get("optimizer_state_dict") if isinstance(found, dict) else None
        if not isinstance(states, dict) or not {"fp32_flat_groups", "single_partition_of_fp32_groups"} & states.keys():
            raise InvalidCheckpoint(f"{path}: no ZeRO optimizer file, it has no flat fp32 groups")
        if found.get("ds_version") != self._model.ds_version:
            raise InvalidCheckpoint(
                f"{path}: written by DeepSpeed {found.get('ds_version')}, {self._model.paths[0].name} by "
                f"{self._model.ds_version}: files of different checkpoints are mixed."
            )
        return states

    def _check_stage(self) -> int:
        stages = [
            int(s["zero_stage"]) if "zero_stage" in s else 3 if "fp32_flat_groups" in s else 1 for s in self._ranks
        ]
        alike(self._paths, stages, "ZeRO stage")
        world = self._model.world_size
        for rank, states in zip(self._paths, self._ranks, strict=True):
            if states.get("ds_zero_partition_groups"):
                raise InvalidCheckpoint(
                    f"{rank}: of an expert-parallel run of ZeRO stage 3, which this program does not read. It reads "
                    "those of stages 1 and 2: save it from such a run."
                )
            counts = states.get("partition_count", world)
            counts = counts if isinstance(counts, list | tuple) else [counts]
            for count, wanted in zip(counts, self._cut_among(states, len(counts)), strict=True):
                if int(count) != wanted:
                    raise InvalidCheckpoint(
                        f"{rank}: a shard of a run of {count} ranks, {self._model.paths[0].name} is of a run of "
                        f"{wanted}: files of different checkpoints are mixed."
                    )
        stage = stages[0]
        if (stage == 3) != self._model.sharded:
            raise InvalidCheckpoint(
                f"{self.folder}: optimizer files of ZeRO stage {stage} beside {self._model.paths[0].name}: files of "
                "different checkpoints are mixed."
            )
        options = self._model.ds_config.get("zero_optimization") or {}
        self._robin = stage < 3 and options.get("round_robin_gradients") is True
        self._offloaded = (options.get("offload_optimizer") or {}).get("device", "none") != "none"
        if stage < 3 and isinstance(self._ranks[0]["base_optimizer_state"], list):
            raise InvalidCheckpoint(
                f"{self.folder}: saved with zero_optimization.elastic_checkpoint, which DeepSpeed itself cannot load. "
                "Save it without, or hand over its weights as a Hugging Face folder."
            )
        return stage

    def _cut_among(self, states: dict[str, Any], count: int) -> list[int]:
        """The number of ranks that each of ``count`` flat groups is cut among."""
        return [self._model.world_size] * count

    # --- optimizer groups and states ---------------------------------------------------------------------------

    def _base(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = self._ranks[rank]["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        return found

    def _read_groups(self) -> list[int]:
        """Fill ``groups``; the optimizer group of each flat group."""
        found = [self._base(rank)["param_groups"] for rank in self._world()]
        alike(self._paths, [len(groups) for groups in found], "number of optimizer groups")
        for i, group in enumerate(found[0]):
            for key in group:
                alike(self._paths, [hyper(groups[i]).get(key) for groups in found], f"'{key}' of optimizer group {i}")
        self.groups, owner = optimizer_groups(found[0], self._model.shapes, self._paths[0])
        for group in self.groups if self._robin else ():
            laid = round_robin(len(group["names"]), len(self._ranks))
            group["names"] = [name for _, name in sorted(zip(laid, group["names"], strict=True))]
        self.fused = any("bias_correction" in group and "amsgrad" not in group for group in self.groups)
        return owner

    def _world(self) -> range:
        return range(len(self._ranks))

    def _read_states(self) -> None:
        """Find the flat tensors of every state; check that all ranks have the same ones at the same step."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        self._flat["fp32"] = [list(states[key]) for states in self._ranks]
        alike(self._paths, [len(flat) for flat in self._flat["fp32"]], "number of flat groups")
        count = len(self._model.shapes)
        if (found := len(self._flat["fp32"][0])) != count:
            raise InvalidCheckpoint(
                f"{self._paths[0]}: holds {found} flat groups, {self._model.paths[0].name} describes {count}: files of "
                "different checkpoints are mixed."
            )
        states = [[self._base(r)["state"].get(f, {}) for f in range(count)] for r in self._world()]
        alike(self._paths, [[sorted(s) for s in rank] for rank in states], "optimizer state")
        steps = [[int(s.get("step", 0)) for s in rank] for rank in states]
        alike(self._paths, steps, "Adam's step")
        found_in: list[set[str]] = [set() for _ in self.groups]
        for flat, state in enumerate(states[0]):
            found_in[self._group_of_flat[flat]] |= held(state)
        self.other_states = unknown(found_in)
        self.moments = [{} if self.other_states else moment_keys(keys) or {} for keys in found_in]
        if any(self.moments):
            self.states = STATES
        for name in self.states[1:]:
            keys = [self.moments[self._group_of_flat[flat]].get(name) for flat in range(count)]
            self._flat[name] = [[s.get(key) for s, key in zip(rank, keys, strict=True)] for rank in states]
        for flat, shapes in enumerate(self._model.shapes):
            counted = "step" in states[0][flat] or not states[0][flat]  # some optimizers count in the group instead
            step = steps[0][flat] if counted else int(self.groups[self._group_of_flat[flat]].get("step", 0))
            self._steps.update(dict.fromkeys(shapes, step))

    def _describe(self) -> None:
        def dtype(name: str) -> torch.dtype:
            stored = self._place.get(name, [])
            kept = self._flat["fp32"][stored[0].rank][stored[0].flat] if stored else None
            return kept.dtype if kept is not None else torch.float32

        self.tensors, self._frozen = self._model.describe(self.groups, dtype)

    def _check_weights(self) -> None:
        """A few master weights of each rank are, up to rounding, those in the model-states file (stages 1 and 2)."""
        checked = set()
        for name, stored in self._place.items():
            weight = self._model.module.get(name)
            if not isinstance(weight, torch.Tensor) or weight.numel() != math.prod(self.tensors[name].shape):
                continue  # stage 3 keeps empty placeholders
            for start, numel, rank, flat, at in stored:
                master = self._flat["fp32"][rank][flat]
                if rank in checked or master is None:
                    continue
                checked.add(rank)
                few = min(numel, _FEW)
                one, other = weight.reshape(-1)[start : start + few].float(), master[at : at + few].float()
                if torch.allclose(one, other, torch.finfo(weight.dtype).eps, 1e-7, equal_nan=True):
                    continue
                odd = (
                    f"the weights of '{name}' in {self._model.paths[0].name} are not the master weights in "
                    f"{self._paths[rank].name}"
                )
                if (self._model.ds_config.get("zero_optimization") or {}).get("zenflow"):
                    raise InvalidCheckpoint(
                        f"{self.folder}: saved with zero_optimization.zenflow: {odd}, and which of them the run goes "
                        "on with is not known here. Save its weights alone (save_pretrained), and use that folder."
                    )
                raise InvalidCheckpoint(
                    f"{self.folder}: files of different checkpoints are mixed: {odd}. Restore the files of one save, "
                    "or use another tag."
                )

    # --- reading -----------------------------------------------------------------------------------------------

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        row = math.prod(meta.shape[1:])
        low, high = start * row, stop * row
        if not meta.trainable:
            if state != "fp32":
                return torch.zeros(high - low)
            return take(self._frozen[meta.name], low, high)
        return self._elements(meta.name, state, low, high)

    def _elements(self, name: str, state: str, low: int, high: int) -> torch.Tensor:
        """Elements [low, high) of a flattened tensor that the optimizer owns."""
        stored = self._place.get(name, [])
        if state == "exp_avg":
            stored = self._momenta.get(name, stored)
        parts = []
        for i in range(max(0, bisect_right(stored, low, key=lambda s: s.start) - 1), len(stored)):
            first, numel, rank, flat, at = stored[i]
            begin, end = max(low, first), min(high, first + numel)
            if begin >= end:
                break
            tensor = self._flat[state][rank][flat]
            if tensor is None:
                return torch.zeros(high - low)  # the group was never stepped
            parts.append(tensor[at + begin - first : at + end - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)
