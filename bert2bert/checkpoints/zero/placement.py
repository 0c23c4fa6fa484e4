"""Where each parameter's elements lie in the flat tensors of a native ZeRO checkpoint.

The intervals of `layout`, with the alignments that the files themselves tell, compared with the files' own lists and
sizes. Refuses, as InvalidCheckpoint: alignments, orders and sizes that the parameters' shapes do not explain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bert2bert.checkpoints.zero.layout import NCCL_START_ALIGNMENTS, Piece, Zero12Layout, zero3_sub_group, zero12_layout
from bert2bert.checkpoints.zero.model_states import ModelStates
from bert2bert.errors import InvalidCheckpoint

Flats = Mapping[str, Sequence[Sequence[torch.Tensor | None]]]
"""[state][rank][flat group]"""


class Stored(NamedTuple):
    """Elements [start, ...) of a parameter: ``numel`` of them at ``at`` of flat group ``flat`` of ``rank``."""

    start: int
    numel: int
    rank: int
    flat: int
    at: int


class Team(NamedTuple):
    """Ranks, in order, that a flat group is cut among. ``whole``: one rank's pieces (of the group's tensors as these
    ranks have them) as (name of the whole tensor, start, stop, at)."""

    ranks: Sequence[int]
    whole: Callable[[Sequence[Piece]], Iterable[tuple[str, int, int, int]]]


class Placement:
    """The optimizer files of all ranks (``paths``, their contents ``ranks``, their flat tensors ``flats``) beside the
    shapes that ``model`` gives. robin: saved with round_robin_gradients, so the files' own order is not right; teams:
    of each flat group, those that have different tensors of it (None: all ranks are one)."""

    def __init__(
        self, paths: Sequence[Path], ranks: Sequence[dict[str, Any]], model: ModelStates, flats: Flats, *, stage: int,
        robin: bool, teams: Sequence[Sequence[Team] | None] | None = None,
    ) -> None:  # fmt: skip
        self._paths, self._ranks, self._model, self._flat = paths, ranks, model, flats
        self.stage, self._robin = stage, robin
        self._teams = teams or [None] * len(model.shapes)
        self._place: dict[str, list[Stored]] = {}
        self._momenta: dict[str, list[Stored]] = {}  # where Muon's lie elsewhere

    def lay_out(self, whole: set[int]) -> tuple[dict[str, list[Stored]], dict[str, list[Stored]]]:
        """Where the pieces of each parameter lie, and those of its momentum where they lie elsewhere. whole: the flat
        groups whose momentum is not cut."""
        for flat, shapes in enumerate(self._model.shapes):
            names, numels = list(shapes), [math.prod(s) for s in shapes.values()]
            for team in self._teams[flat] or [Team(range(len(self._ranks)), partial(_named, names))]:
                self._lay_out(flat, names, numels, team, flat in whole)
        if any(self._teams):
            for stored in self._place.values():
                stored.sort()  # the teams' pieces by turns
        return self._place, self._momenta

    def _lay_out(self, flat: int, names: list[str], numels: list[int], team: Team, whole: bool) -> None:
        world = len(team.ranks)
        if self.stage == 3:
            sub = zero3_sub_group(numels, world, range(len(numels)))
            pieces, full, short = sub.pieces, sub.numel, [sub.numel] * world
        else:
            layout = self._aligned(flat, numels, team.ranks)
            pieces, full = layout.pieces, layout.partition
            short = [layout.partition - padding for padding in layout.paddings]
            if not self._robin:
                self._check_order(flat, names, layout, team.ranks)
            if whole:
                self._momentum(flat, names, layout)
        for i, rank in enumerate(team.ranks):
            self._check_sizes(flat, rank, full, short[i], world)
            for name, start, stop, at in team.whole(pieces[i]):
                self._place.setdefault(name, []).append(Stored(start, stop - start, rank, flat, at))

    def _aligned(self, flat: int, numels: list[int], ranks: Sequence[int]) -> Zero12Layout:
        """The layout with the alignments that the file's own paddings and sizes tell (DeepSpeed's parameter_alignment
        and nccl_start_alignment_factor)."""
        world = len(ranks)
        gaps = self._ranks[ranks[0]].get("param_alignment_paddings")
        alignment = 1
        if gaps and any(gaps[flat]):
            fits = [a for a in (4, 8, 2, 16) if list(zero12_layout(numels, world, a).gaps) == list(gaps[flat])]
            if not fits:
                raise InvalidCheckpoint(
                    f"{self._paths[ranks[0]]}: its param_alignment_paddings fit no alignment of the parameters"
                )
            alignment = fits[0]
        master = self._flat["fp32"][ranks[0]][flat]
        paddings = self._ranks[ranks[0]].get("group_paddings")
        found = master.numel() if isinstance(master, torch.Tensor) else 0
        full = {found, found + int(paddings[flat]) if paddings else found}  # BF16_Optimizer's is with the padding
        for start in NCCL_START_ALIGNMENTS:
            layout = zero12_layout(numels, world, alignment, start)
            if layout.partition in full:
                return layout
        return zero12_layout(numels, world, alignment)

    def _momentum(self, flat: int, names: list[str], layout: Zero12Layout) -> None:
        """Where Muon's momentum lies at stages 1 and 2: not cut as the weights are, for its update needs matrices.

        A rank holds that of every parameter of which it owns any part, whole and without gaps, in the order of the
        group (offloaded to the CPU, it is cut like the rest). Taken out of the states that are checked by partition.
        """
        for rank in range(len(self._ranks)):
            buffer = self._flat["exp_avg"][rank][flat]
            owned = [piece.param for piece in layout.pieces[rank]]
            want = sum(layout.numels[i] for i in owned)
            if buffer is None:
                continue
            if not isinstance(buffer, torch.Tensor) or buffer.numel() < want:
                raise InvalidCheckpoint(
                    f"{self._paths[rank]}: the momentum of optimizer group {flat} is shorter than the {want} elements "
                    "of the parameters that the rank owns parts of: files of different checkpoints are mixed."
                )
            at = 0
            for i in owned:
                self._momenta.setdefault(names[i], [Stored(0, layout.numels[i], rank, flat, at)])
                at += layout.numels[i]

    def _check_order(self, flat: int, names: list[str], layout: Zero12Layout, ranks: Sequence[int]) -> None:
        """The file's own list of pieces is what the layout says."""
        for i, rank in enumerate(ranks):
            mappings = self._ranks[rank].get("param_slice_mappings")
            if not mappings:
                continue
            pieces = mappings[flat].items()
            recorded = {self._model.renamed(n): (piece["start"], piece["numel"]) for n, piece in pieces}
            computed = {names[param]: (at, stop - start) for param, start, stop, at in layout.pieces[i]}
            if recorded != computed:
                odd = next(n for n in [*computed, *recorded] if recorded.get(n) != computed.get(n))
                raise InvalidCheckpoint(
                    f"{self._paths[rank]}: '{odd}' lies at (start, length) {recorded.get(odd)} by the file, at "
                    f"{computed.get(odd)} by the order of parameters in {self._model.paths[0].name}: files of "
                    "different checkpoints are mixed, or it was saved with round_robin_gradients."
                )

    def _check_sizes(self, flat: int, rank: int, full: int, short: int, world: int) -> None:
        elsewhere = {stored[0].flat for stored in self._momenta.values()}
        for state, flats in self._flat.items():
            tensor = flats[rank][flat]
            if state != "fp32" and (tensor is None or (flat in elsewhere and state == "exp_avg")):
                continue
            found = tensor.numel() if isinstance(tensor, torch.Tensor) else None
            if isinstance(tensor, torch.Tensor) and not (tensor.is_floating_point() and tensor.is_contiguous()):
                raise InvalidCheckpoint(
                    f"{self._paths[rank]}: flat group {flat} of {state} is a tensor of {tensor.dtype} with strides "
                    f"{tensor.stride()}, expected plain numbers in a row: damaged, or changed by another program."
                )
            if found not in (full, short):
                raise InvalidCheckpoint(
                    f"{self._paths[rank]}: flat group {flat} holds {found} elements of {state}, the parameters in "
                    f"{self._model.paths[0].name} need {full} on each of {world} ranks: files of different "
                    "checkpoints are mixed, or the save was cut short."
                )


def _named(names: Sequence[str], pieces: Sequence[Piece]) -> Iterable[tuple[str, int, int, int]]:
    return ((names[piece.param], piece.start, piece.stop, piece.at) for piece in pieces)
