"""What every checkpoint writer receives and shares: the target, where its values come from, and the files to write.

A writer sees neither plans nor operators: only names, shapes and a callable that gives rows. Values are requested in
blocks of whole rows of at most about `BLOCK` elements, so no thread holds more than a few blocks (a single row is the
least it asks for: of fused experts, a whole expert). Refuses a `TargetSpec` that contradicts itself (ValueError: the
caller's mistake, not the user's).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.commit.pending import Pending
from bert2bert.checkpoints.expert_parallel.layout import ExpertParallel
from bert2bert.checkpoints.manifest import TensorEntry
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.source import STATES, RankState
from bert2bert.checkpoints.target import Target
from bert2bert.checkpoints.zero.layout import Piece
from bert2bert.errors import InvalidConfig
from bert2bert.files.digest import combine, digest, hex16
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 1 << 20  # elements read and written at a time: few enough for a cache, and for many threads of many ranks

Values = Callable[[str, str, int, int], torch.Tensor]
"""``values(name, state, start, stop)`` -> fp32 rows [start, stop) of dim 0; a 0-dim tensor is requested with (0, 1)."""


@dataclass(frozen=True)
class TargetGroup:
    """One optimizer group, in the engine's order."""

    part: str
    decay: bool
    names: tuple[str, ...]
    hyper: dict[str, Any]
    """lr, weight_decay, betas, eps; more keys pass through."""
    step: int
    """Adam steps that these parameters have taken."""
    moments: dict[str, str] = field(default_factory=lambda: dict(ADAM))
    """State -> its name in the files, of those that the group's optimizer keeps, see `optimizers`."""


@dataclass(frozen=True)
class TargetSpec:
    """Everything about the checkpoint to write except its values."""

    shapes: dict[str, tuple[int, ...]]
    """Every parameter in the model's order, tied copies absent."""
    aliases: dict[str, str]
    """Absent tied name -> kept name."""
    config: dict[str, Any]
    """The Hugging Face config; empty: there is none."""
    groups: tuple[TargetGroup, ...]
    group_layout: str
    precision: str
    """fp32, bf16 or fp16, of the engine that will load it; of a Hugging Face folder's file, see ``dtypes``."""
    states: tuple[str, ...]
    """What the values can give: ("fp32",) or all of `STATES`. Missing moments are written as zeros."""
    counters: dict[str, int]
    lr_scheduler: dict[str, Any] | None = None
    loss_scaler: dict[str, Any] | None = None
    """Attributes of DeepSpeed's loss scaler, used with fp16 only."""
    client_state: dict[str, Any] = field(default_factory=dict)
    """Extra top-level entries of the model states. Here, in buffers and extras: anything that `torch_writer` writes."""
    buffers: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    """What the model's state dict holds beside parameters and buffers."""
    of_ranks: tuple[RankState, ...] = ()
    """Of stage 3 on the source's number of ranks: what each rank has instead of these, by name. Empty: nothing."""
    unread: tuple[str, ...] = ()
    """Names in that dict whose values the source does not hold. A strict load at stage 3 looks for the names alone."""
    extra_files: dict[str, bytes] = field(default_factory=dict)
    """Name -> content, put beside the weights, such as a tokenizer."""
    frozen: tuple[str, ...] = ()
    """Parameters that are in no group, for the engine does not train them."""
    frozen_later: tuple[str, ...] = ()
    """Parameters of a group that the engine no longer trains; it looks for them among the frozen ones too."""
    second_names: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Of frozen parameters that the checkpoint lacks otherwise -> the first name, and the value, see `Source`."""
    lists_frozen: bool = True
    """Whether the model is known to have no other such parameters."""
    fused: bool = False
    """The engine uses DeepSpeed's FusedAdam. Matters at 16-bit stage 0 only, as does ``clip_grad``."""
    clip_grad: float | None = None
    """The engine's gradient clipping."""
    expert_parallel: ExpertParallel | None = None
    """How the engine splits its experts; native shards of stages 1 and 2 only."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """Of tensors in a Hugging Face folder that are not of ``precision``."""
    tag_name: str | None = None
    """Of the checkpoint's folder; None: DeepSpeed's name for this step."""
    beside: dict[str, bytes] = field(default_factory=dict)
    """Name -> content, put beside that folder: what a training program keeps there."""

    def __post_init__(self) -> None:
        grouped = [*(name for group in self.groups for name in group.names), *self.frozen]
        if len(grouped) != len(set(grouped)) or set(grouped) != set(self.shapes):
            odd = set(grouped) ^ set(self.shapes) or {name for name in grouped if grouped.count(name) > 1}
            raise ValueError(f"every parameter must be in one optimizer group or frozen; not so: {sorted(odd)[:5]}")
        if self.precision not in DTYPES or self.states not in (STATES[:1], STATES):
            raise ValueError(f"unknown precision {self.precision!r} or states {self.states}")
        if not all(kept in self.shapes and absent not in self.shapes for absent, kept in self.aliases.items()):
            raise ValueError("aliases must map an absent tied name to a name in shapes")

    def of_rank(self, rank: int) -> TargetSpec:
        """The target as the file of one rank describes it."""
        if not self.of_ranks:
            return self
        client, mine = self.of_ranks[rank].client_state, self.of_ranks[rank].module
        buffers, extras = ({name: mine.get(name, held[name]) for name in held} for held in (self.buffers, self.extras))
        return replace(self, client_state=client, buffers=buffers, extras=extras, of_ranks=())

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """Parameters that the engine looks for among the frozen ones."""
        return (*self.frozen, *self.frozen_later)

    @property
    def tag(self) -> str:
        """The name of the checkpoint's folder, DeepSpeed's for this step where no other was chosen."""
        return self.tag_name or f"global_step{self.counters['global_steps']}"

    @property
    def dtype(self) -> torch.dtype:
        """The low (module) precision."""
        return DTYPES[self.precision]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Of a tensor in a Hugging Face folder."""
        return self.dtypes.get(name, self.dtype)

    def widest_dtype(self, name: str, format: str) -> torch.dtype:
        """Of the widest copy of a weight that a target of this format stores: a run keeps masters of all but what is
        frozen."""
        if format == "hub":
            return self.stored_dtype(name)
        return self.dtype if name in self.frozen else torch.float32

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return math.prod(self.shapes[name])


@dataclass(frozen=True)
class FilePlan:
    """One file of the checkpoint: name relative to its folder, bytes of tensor data, and how to write it.

    ``write`` returns the bytes of tensor data it wrote, which must equal ``payload``.
    """

    name: str
    payload: int
    write: Callable[[Sink], int]


def write_bytes(content: bytes, file: Sink) -> int:
    """Write a small file; it counts as no tensor data."""
    file.write(content)
    return 0


def pending(folder: Path, spec: TargetSpec, target: Target) -> Pending:
    """The folder to write: ``folder/<tag>``, or ``folder`` itself for a Hugging Face folder."""
    return Pending(folder, None if target.format == "hub" else spec.tag)


def check_folder(folder: Path, spec: TargetSpec, target: Target) -> None:
    """Refuse (InvalidConfig), before any work is done, a folder where `write.write_checkpoint` would not write."""
    pending(folder, spec, target).refuse()
    for name, content in spec.beside.items():
        file = folder / name
        if file.exists() and not (file.is_file() and file.read_bytes() == content):
            raise InvalidConfig(f"{file} is there already and is another than the source's. Name a new folder.")


class Stopped(Exception):
    """Raised in a thread that writes, once another has failed."""


class Tally(threading.local):
    """What is written: of each thread its own digests of master values and moments, of all together the bytes for the
    progress callback. ``stop``, set by anybody, ends all that write."""

    def __init__(self, lock: threading.Lock, stop: threading.Event, progress: Callable[[int], None] | None) -> None:
        self.digests: dict[tuple[str, str], int] = {}
        self.stop = stop
        self._lock, self._progress = lock, progress

    @classmethod
    def new(cls, progress: Callable[[int], None] | None = None) -> Tally:
        """``progress(bytes)``: called with the bytes of tensors as they are written, by one thread at a time."""
        return cls(threading.Lock(), threading.Event(), progress)

    def digest(self, name: str, state: str, piece: torch.Tensor, start: int) -> None:
        """Add the stored elements ``piece`` (flat index ``start`` on) of a tensor's state."""
        key = (name, state)
        self.digests[key] = combine(self.digests.get(key, 0), digest(piece, start))

    def wrote(self, count: int) -> None:
        """Report bytes of tensor data as written. Raises Stopped."""
        if self.stop.is_set():
            raise Stopped
        if self._progress is not None:
            with self._lock:
                self._progress(count)


def tensor_entries(spec: TargetSpec, tallies: Iterable[dict[tuple[str, str], int]]) -> dict[str, TensorEntry]:
    """The manifest's ``tensors``: shapes, and each state's digest summed over the ranks' tallies."""
    totals: dict[tuple[str, str], int] = {}
    for tally in tallies:
        for key, value in tally.items():
            totals[key] = combine(totals.get(key, 0), value)
    return {
        name: TensorEntry(shape, {state: hex16(totals[name, state]) for state in STATES if (name, state) in totals})
        for name, shape in spec.shapes.items()
    }


def flat_values(
    values: Values, spec: TargetSpec, name: str, state: str, start: int, stop: int
) -> Iterator[torch.Tensor]:
    """Elements [start, stop) of a flattened tensor as consecutive flat fp32 pieces, read in bounded blocks of rows."""
    if start >= stop:
        return
    shape = spec.shapes[name]
    width = math.prod(shape[1:])
    last = -(-stop // width)
    for row in range(start // width, last, step := max(1, BLOCK // width)):
        end = min(row + step, last)
        block = values(name, state, row, end)
        expected = (end - row, *shape[1:]) if shape else ()
        if tuple(block.shape) != expected or block.dtype != torch.float32:
            raise ValueError(f"{name} {state}: got {tuple(block.shape)} {block.dtype}, wanted {expected} torch.float32")
        first = row * width
        yield block.reshape(-1)[max(start - first, 0) : min(stop, end * width) - first]


def zeros(count: int) -> Iterator[torch.Tensor]:
    """``count`` fp32 zeros in bounded blocks."""
    for at in range(0, count, BLOCK):
        yield torch.zeros(min(BLOCK, count - at))


@dataclass(frozen=True)
class Job:
    """One rank's share of writing a target: what, from where, and the tally of what was written."""

    spec: TargetSpec
    values: Values
    tally: Tally

    def elements(self, name: str, state: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """`flat_values`, every piece entered in the tally; zeros, not entered, for a state that does not exist."""
        if state not in self.spec.states:
            yield from zeros(stop - start)
            return
        for piece in flat_values(self.values, self.spec, name, state, start, stop):
            self.tally.digest(name, state, piece, start)
            start += piece.numel()
            yield piece

    def rounded(self, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Weights as the engine's module holds them; in the tally for a frozen parameter, which has no other."""
        for piece in flat_values(self.values, self.spec, name, "fp32", start, stop):
            low = piece.to(self.spec.dtype)
            if name in self.spec.frozen:
                self.tally.digest(name, "fp32", low, start)
            start += piece.numel()
            yield low

    def module(self, names: Iterable[str]) -> dict[str, Blank]:
        """The engine's own weights of these parameters, and of the tied copies of them."""
        spec = self.spec
        blanks = {n: Blank(spec.shapes[n], spec.dtype, partial(self.rounded, n, 0, spec.numel(n))) for n in names}
        return blanks | {absent: blanks[kept] for absent, kept in spec.aliases.items() if kept in blanks}

    def shard(self, names: Sequence[str], state: str, pieces: Iterable[Piece], length: int) -> Iterator[torch.Tensor]:
        """A rank's flat tensor of ``length`` elements: pieces (of ``names``) at their places, zeros elsewhere."""
        at = 0
        for piece in pieces:
            yield from zeros(piece.at - at)
            yield from self.elements(names[piece.param], state, piece.start, piece.stop)
            at = piece.at + piece.stop - piece.start
        yield from zeros(length - at)
