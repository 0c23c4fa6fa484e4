"""Read DeepSpeed universal checkpoints: one folder a parameter under ``zero/``, one file a state.

Both dialects of DeepSpeed's ``ds_to_universal``: from ZeRO 1 and 2 (shaped tensors in dicts, ``step.pt``) and from
ZeRO 3 (flat tensors, steps in ``optimizer_state.pt``), and folders that hold both. Parameters are those that the
model-states file names; files open when they are first read. A parameter without moments reads as zeros, step 0.

Refuses, as InvalidCheckpoint: missing or foreign files, a tensor of the wrong size, what was converted from a run with
``round_robin_gradients`` (the converter does not undo it), and whatever model states refuse.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.source import STATES, Source, TensorMeta
from bert2bert.checkpoints.zero.model_states import ModelStates, autoep_layers, optimizer_groups, plain_scaler, take
from bert2bert.checkpoints.zero.tag_files import MODEL, find_files
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader
from bert2bert.files.disk import inside

_OPEN_FILES = 256  # each is a memory map; the kernel allows 65,530


class UniversalSource(Source):
    """A universal checkpoint; it has no stage and no world size."""

    format = "universal"

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(path, folder, manifest)
        paths = [folder / MODEL] if (folder / MODEL).is_file() else find_files(folder)[0]
        model = self._model = ModelStates(paths, sharded=paths[0].name != MODEL, manifest=manifest)
        if model.sharded and len(paths) != model.world_size:
            raise InvalidCheckpoint(f"{folder}: {len(paths)} model-states files, saved by {model.world_size} ranks")
        if (model.ds_config.get("zero_optimization") or {}).get("round_robin_gradients") is True:
            raise InvalidCheckpoint(
                f"{folder}: converted from a run with zero_optimization.round_robin_gradients, whose order DeepSpeed's "
                "converter does not undo: its values lie under wrong names. Use the native checkpoint that it was "
                "made of."
            )
        if autoep_layers(model.ranks[0]):
            raise InvalidCheckpoint(
                f"{folder}: a universal checkpoint converted from a run of AutoEP: a layer's experts are whole, under "
                "AutoEP's names, and the shapes are those of one rank's experts, which this program does not read. Use "
                "the native checkpoint that it was made of, if that is of ZeRO stage 1 or 2."
            )
        self.precision = model.precision()
        self.counters, self.lr_scheduler = model.counters, model.lr_scheduler
        self.client_state, self.buffers, self.extras = model.client_state, model.buffers, model.extras
        self.aliases, self.unread, self.untrained = model.aliases, model.unread, model.untrained
        self.second_names, self.unlisted = model.second_names, model.unlisted
        self.lists_frozen, self.frozen_later = model.lists_frozen, model.frozen_later
        self._zero = folder / "zero"
        self._open: dict[Path, torch.Tensor] = {}
        self._lock = threading.Lock()  # of these, which several threads ask for
        optimizer = self._zero / "optimizer_state.pt"
        found = torch_reader.load(optimizer)
        if not isinstance(found, dict) or "param_groups" not in found:
            raise InvalidCheckpoint(
                f"{optimizer}: no optimizer state of a universal checkpoint, it has no 'param_groups'"
            )
        self.loss_scaler = plain_scaler(found)
        self.groups, _ = optimizer_groups(found["param_groups"], model.shapes, optimizer)
        self._find_states()
        self._read_steps((found.get("optimizer_state_dict") or {}).get("state", {}))
        self.tensors, self._frozen = self._model.describe(self.groups, lambda _: torch.float32)
        self.files = sorted(p for p in folder.rglob("*.pt") if p.is_file())

    def _find_states(self) -> None:
        """Which names have moments; every name must have its fp32 values."""
        for name in self._model.flat_names:
            inside(self._zero, name)
        present = {n: [(self._zero / n / f"{s}.pt").is_file() for s in STATES] for n in self._model.flat_names}
        for name, (fp32, *moments) in present.items():
            if not fp32 or len(set(moments)) > 1:
                lack = [s for s in STATES if not (self._zero / name / f"{s}.pt").is_file()]
                raise InvalidCheckpoint(
                    f"{self._zero / name}: lacks {', '.join(f'{s}.pt' for s in lack)}, though the model states name "
                    "the parameter: an incomplete conversion or copy. Convert or copy it again."
                )
        self._moments = {name for name, there in present.items() if there[1]}
        if self._moments:
            self.states = STATES
            self.moments = [dict(ADAM) for _ in self.groups]

    def _read_steps(self, states: dict[int, dict[str, Any]]) -> None:
        for flat, shapes in enumerate(self._model.shapes):
            for name in shapes:
                file = self._zero / name / "step.pt"
                if name not in self._moments:
                    continue
                step = torch_reader.load(file) if file.is_file() else states.get(flat, states.get(0, {})).get("step", 0)
                self._steps[name] = int(step)

    def _tensor(self, meta: TensorMeta, state: str) -> torch.Tensor:
        """The flat tensor of a state, its size checked (DeepSpeed's own loader does not)."""
        with self._lock:
            return self._opened(meta, self._zero / meta.name / f"{state}.pt")

    def _opened(self, meta: TensorMeta, file: Path) -> torch.Tensor:
        if file not in self._open:
            found = torch_reader.load(file)
            tensor = found.get("param") if isinstance(found, dict) else found
            if not isinstance(tensor, torch.Tensor) or tensor.numel() != meta.numel:
                what = f"{tensor.numel()} elements" if isinstance(tensor, torch.Tensor) else "no tensor"
                raise InvalidCheckpoint(f"{file}: holds {what}, shape {meta.shape} needs {meta.numel}")
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[file] = tensor.reshape(-1)
        return self._open[file]

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        row = math.prod(meta.shape[1:])
        low, high = start * row, stop * row
        if state != "fp32" and meta.name not in self._moments:
            return torch.zeros(high - low)
        if not meta.trainable:
            return take(self._frozen[meta.name], low, high)
        return self._tensor(meta, state)[low:high]
