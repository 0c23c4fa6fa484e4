"""A checkpoint that is open: names, shapes, and any rows of any tensor's any state, whatever its format.

The base class of all readers; `open` finds which of them a folder needs. Rows come from memory-mapped files, and no
whole model is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bert2bert.checkpoints.expert_parallel.layout import ExpertParallel
from bert2bert.checkpoints.manifest import Manifest
from bert2bert.errors import InvalidCheckpoint, did_you_mean
from bert2bert.files.torch_reader import USUAL
from bert2bert.files.unpickle import foreign

STATES = ("fp32", "exp_avg", "exp_avg_sq")
MALFORMED = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, RecursionError, MemoryError,
    AssertionError, SafetensorError,
)  # fmt: skip
"""What Python, torch and safetensors raise for contents that are not what they should be."""
_EDGE = 64 * 1024  # bytes; the end of a torch file holds the checksums of its records


@dataclass(frozen=True)
class TensorMeta:
    """One tensor as stored. ``dtype``: of its "fp32" state, as torch names it ("float32"); ``group``: its place in
    ``Source.groups``, None for a parameter that the optimizer does not own (frozen) or where no groups are known."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int | None
    trainable: bool

    @property
    def numel(self) -> int:
        """Elements of one state."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RankState:
    """What the file of one rank of ZeRO 3 holds of its own beside partitions; DeepSpeed gives each rank its own back.
    ``module``: values of buffers and extra states."""

    client_state: dict[str, Any]
    module: dict[str, Any]


class Source:
    """An open checkpoint. Subclasses fill the fields and give `_rows`.

    ``tensors``: names as stored, in the model's order where the checkpoint tells it, tied tensors once;
    ``aliases``: absent tied name -> kept name; ``states``: those that can be read; ``other_states``: what the optimizer
    keeps besides and this project does not carry (see `moments`); ``groups``: optimizer groups as hyper-parameters plus
    "names"; ``moments``: for each group, state -> its name in the files (Adam's are `moments.ADAM`; a state that is
    not there reads as zeros); ``fused``: trained with DeepSpeed's FusedAdam; ``clip_grad``: the run's gradient
    clipping, None where it is not known; ``expert_parallel``: of a run whose experts are split over ranks;
    ``extras``: of the model's state dict what is neither parameter nor buffer (these, buffers, client state and
    scheduler may hold objects that were not opened); ``lists_frozen``: whether the files list what is frozen;
    ``frozen_later``: parameters of a group that require no gradient any more, as a script may have it after the start;
    ``untrained``: parameters that are in no group, and of which the files do not say that they are frozen;
    ``unlisted``: entries of the state dict that the files list neither as parameters nor as buffers;
    ``second_names``: those of tied frozen parameters that the run left out of its files by their first ones -> the
    first, and the value; ``unread``: names the model has whose values the checkpoint does not hold;
    ``of_ranks``: of ZeRO 3, what each rank's file says of client state, buffers and extras, which are the first rank's
    here; ``notes``: what else a user should know of how it was read, in sentences.
    """

    format: str = ""

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None) -> None:
        self.path, self.folder, self.manifest = path, folder, manifest
        self.tag: str | None = None
        self.stage: int | None = None
        self.world_size: int | None = None
        self.precision = "fp32"
        self.config: dict[str, Any] | None = None
        self.tensors: dict[str, TensorMeta] = {}
        self.aliases: dict[str, str] = {}
        self.states: tuple[str, ...] = ("fp32",)
        self.other_states: tuple[str, ...] = ()
        self.groups: list[dict[str, Any]] = []
        self.moments: list[dict[str, str]] = []
        self.fused = False
        self.clip_grad: float | None = None
        self.counters: dict[str, int] = {}
        self.lr_scheduler: dict[str, Any] | None = None
        self.expert_parallel: ExpertParallel | None = None
        self.loss_scaler: dict[str, Any] | None = None
        self.client_state: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self.extras: dict[str, Any] = {}
        self.lists_frozen = False
        self.frozen_later: tuple[str, ...] = ()
        self.untrained: tuple[str, ...] = ()
        self.unlisted: tuple[str, ...] = ()
        self.second_names: dict[str, tuple[str, Any]] = {}
        self.unread: tuple[str, ...] = ()
        self.of_ranks: tuple[RankState, ...] = ()
        self.notes: list[str] = []
        self.files: list[Path] = []  # all files that make up the checkpoint, for `identity` and `inspect`
        self._steps: dict[str, int] = {}

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of dimension 0; any shape of the right number of elements."""
        raise NotImplementedError

    def unopened(self) -> list[str]:
        """Classes and functions that are named in what the checkpoint holds beside tensors, and were not opened."""
        names = map(str, foreign([self.client_state, self.buffers, self.extras, self.lr_scheduler]))
        return sorted(name for name in names if name not in USUAL and not name.startswith("torch."))

    @property
    def kept(self) -> list[str]:
        """What there is of a parameter, by its names in the files: fp32, then what each group's optimizer keeps."""
        names = [name for group in self.moments for name in group.values()] or self.states[1:] * (not self.moments)
        return [self.states[0], *dict.fromkeys(names)]

    def meta(self, name: str) -> TensorMeta:
        """The tensor's description; tied names lead to the kept one. InvalidCheckpoint if there is none."""
        found = self.tensors.get(self.aliases.get(name, name))
        if found is None:
            hint = " The model has it, but this checkpoint does not hold its values." if name in self.unread else ""
            raise InvalidCheckpoint(
                f"{self.folder}: no tensor '{name}' among its {len(self.tensors)};{hint} "
                f"{did_you_mean(name, self.tensors) if len(self.tensors) < 30 or not hint else ''}".rstrip(" ;")
            )
        return found

    def parts(self, name: str) -> list[str]:
        """The stored tensors of a tensor: itself, or several where these are seen as one (see `stacked`)."""
        return [name]

    def step(self, name: str) -> int:
        """Adam's step count of a tensor; 0 if it was never stepped."""
        return self._steps.get(self.meta(name).name, 0)

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of dimension 0 of a tensor's state, on the CPU, in the dtype stored.

        A view of the memory map where one stored piece covers the rows (do not write to it), else a copy of just those
        rows. A tensor without dimensions has one row: (0, 1) gives shape (). Moments of a parameter that was never
        stepped are zeros. Raises InvalidCheckpoint for an unknown tensor or an absent state, IndexError for bad rows.
        """
        meta = self.meta(name)
        if state not in self.states:
            if state not in STATES:
                raise ValueError(f"unknown state {state!r}; known: {', '.join(STATES)}")
            raise InvalidCheckpoint(f"{self.folder}: holds no '{state}' of '{name}', only {', '.join(self.states)}")
        rows = meta.shape[0] if meta.shape else 1
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows [{start}, {stop}) of '{name}', which has {rows}")
        shape = (stop - start, *meta.shape[1:]) if meta.shape else (stop - start,)[: 1 - stop + start]
        try:
            return self._rows(meta, state, start, stop).reshape(shape)
        except MALFORMED as error:
            raise InvalidCheckpoint(f"{self.folder}: '{name}' ({state}) cannot be read: {cause(error)}") from error

    def identity(self) -> dict[str, Any]:
        """What names this checkpoint in a growth manifest.

        ``sha256`` is over every file's name, size, first and last 64 KiB (where torch keeps the checksums of the rest)
        and the metadata read: equal copies in different places are equal.
        """
        total = hashlib.sha256()
        for file in sorted(self.files):
            size = file.stat().st_size
            total.update(f"{file.relative_to(self.folder).as_posix()} {size}\n".encode())
            with file.open("rb") as stream:
                total.update(stream.read(_EDGE))
                stream.seek(max(0, size - _EDGE))
                total.update(stream.read(_EDGE))
        read = [[m.name, m.shape, m.dtype, m.group, self._steps.get(m.name, 0)] for m in self.tensors.values()]
        total.update(json.dumps([read, self.groups, self.counters, self.aliases], default=str).encode())
        return {
            "path": str(self.path),
            "tag": self.tag,
            "format": self.format,
            "stage": self.stage,
            "world_size": self.world_size,
            "sha256": total.hexdigest(),
        }


def cause(error: BaseException) -> str:
    """An error's type and the start of its text, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
