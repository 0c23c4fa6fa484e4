"""Native DeepSpeed ZeRO checkpoints of stage 1, 2 or 3 for one world size, as DeepSpeed 0.19.8 lays them out.

`engine.load_checkpoint` of an unmodified script resumes them when its optimizer groups are built like the target's
(`groups`), its world size, precision and stage are those written, and its options `round_robin_gradients` and
`parameter_alignment` are off (the defaults). Two choices differ from DeepSpeed's own files on purpose: padding is
zero, not garbage, so equal input gives equal bytes; and `clip_grad` is left out, for stages 1 and 2 would take it
from the file over the config's value.

Expert-parallel targets: `expert_parallel.writer`. Stages and world sizes are checked by `Target`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bert2bert.checkpoints.job import FilePlan, Job, TargetGroup, flat_values, zeros
from bert2bert.checkpoints.zero.contents import (
    DS_VERSION,
    adam_state,
    hyper_parameters,
    model_states,
    scaler_fields,
    sizes,
    stored_config,
)
from bert2bert.checkpoints.zero.layout import SUB_GROUP_SIZE, Piece, SubGroup, Zero12Layout, zero3_layout, zero12_layout
from bert2bert.files import torch_writer
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank, Foreign


def zero_files(job: Job, stage: int, world: int, sub_group_size: int = SUB_GROUP_SIZE) -> list[FilePlan]:
    """The files of a native checkpoint, each independent of the others.

    ``sub_group_size``: the engine's option of stage 3, in elements of a rank.
    """
    layout = _Zero3(job, world, sub_group_size) if stage == 3 else Zero12(job, stage, world)
    return rank_files(job, layout, world)


def rank_files(job: Job, layout: Zero12 | _Zero3, world: int) -> list[FilePlan]:
    """All files of a layout: those with the model's states, and an optimizer file of each rank."""
    name = ("bf16_" if job.spec.precision == "bf16" else "") + "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    optim = [FilePlan(name.format(r), layout.payload(r), partial(layout.optim, r)) for r in range(world)]
    return [*layout.models(), *optim]


@dataclass(frozen=True)
class Held:
    """What one rank holds of one flat group. ``group``: hyper-parameters, step and moments; ``layout``: how the group
    is cut, and ``part``: which part is the rank's; ``own``: the engine's names of what the layout counts; ``names``: of
    the whole tensors, and ``pieces`` of those (an expert-parallel engine has other tensors)."""

    group: TargetGroup
    layout: Zero12Layout
    part: int
    own: Sequence[str]
    names: Sequence[str]
    pieces: Sequence[Piece]


class Zero12:
    """Stages 1 and 2: every group flattened, padded and cut into equal partitions."""

    def __init__(self, job: Job, stage: int, world: int) -> None:
        self.job, self.spec, self.stage, self.world = job, job.spec, stage, world
        self._layouts = [zero12_layout([job.spec.numel(n) for n in g.names], world) for g in job.spec.groups]

    def held(self, rank: int) -> list[Held]:
        """Of every flat group, in order."""
        return [
            Held(group, layout, rank, group.names, group.names, layout.pieces[rank])
            for group, layout in zip(self.spec.groups, self._layouts, strict=True)
        ]

    def models(self) -> list[FilePlan]:
        """One file: the live low-precision weights until the first step, so they must be the rounded master."""
        elements = sum(self.spec.numel(name) for name in self.spec.shapes)
        return [FilePlan("mp_rank_00_model_states.pt", elements * self.spec.dtype.itemsize, self._model)]

    def _model(self, file: Sink) -> int:
        return torch_writer.save(file, self.tree(list(self.spec.shapes)), self.job.tally.wrote)

    def tree(self, names: Sequence[str]) -> dict[str, Any]:
        """The content of the model-states file, with the weights of these parameters."""
        spec, module = self.spec, self.job.module(names)
        param_shapes = [sizes(spec, group.names) for group in spec.groups]
        frozen = {name: module[name] for name in spec.without_gradient if name in module}
        return model_states(spec, module, param_shapes, self.stage, self.world, fragments=frozen)

    def payload(self, rank: int) -> int:
        """Bytes of tensor data in a rank's optimizer file."""
        return 4 * sum(
            held.layout.partition
            - held.layout.paddings[held.part]
            + sum(self._length(held, state) for state in held.group.moments)
            for held in self.held(rank)
        )

    @staticmethod
    def _length(held: Held, state: str) -> int:
        """Elements of a rank's flat tensor of a moment."""
        if _whole(held.group, state):
            return sum(held.layout.numels[piece.param] for piece in held.layout.pieces[held.part])
        return held.layout.partition

    def _moment(self, held: Held, state: str) -> Blank:
        length = self._length(held, state)
        if not _whole(held.group, state):
            return _shard(self.job, held.names, held.pieces, state, length)
        return Blank((length,), torch.float32, partial(self._matrices, held.group, held.pieces, state))

    def _matrices(self, group: TargetGroup, pieces: Sequence[Piece], state: str) -> Iterator[torch.Tensor]:
        """Whole parameters of which the rank owns pieces; only the pieces are entered in the tally, for others hold
        the rest."""
        for piece in pieces:
            name = group.names[piece.param]
            rest = partial(flat_values, self.job.values, self.spec, name, state)
            if state not in self.spec.states:
                yield from zeros(self.spec.numel(name))
                continue
            yield from rest(0, piece.start)
            yield from self.job.elements(name, state, piece.start, piece.stop)
            yield from rest(piece.stop, self.spec.numel(name))

    def optim(self, rank: int, file: Sink) -> int:
        """Write a rank's optimizer file."""
        groups, states, master, mappings = [], {}, [], []
        flats = self.held(rank)
        paddings = [held.layout.paddings[held.part] for held in flats]
        for i, held in enumerate(flats):
            states[i] = adam_state(held.group, partial(self._moment, held))
            length = held.layout.partition - paddings[i]
            master.append(_shard(self.job, held.names, held.pieces, "fp32", length))
            groups.append({**hyper_parameters(held.group), "params": [i]})
            mappings.append(OrderedDict((held.own[p.param], _fragment(p)) for p in held.layout.pieces[held.part]))
        tree = {
            **scaler_fields(self.spec),
            "base_optimizer_state": {"state": states, "param_groups": groups},
            "single_partition_of_fp32_groups": master,  # unlike the moments, without the padding
            "zero_stage": self.stage,
            "group_paddings": paddings,
            "param_alignment_paddings": [list(held.layout.gaps) for held in flats],
            "partition_count": [held.layout.world for held in flats],
            "ds_version": DS_VERSION,
            "param_slice_mappings": mappings,
        }
        return _save_optim(self.job, self.stage, tree, file)


class _Zero3:
    """Stage 3: every parameter cut by itself, the slices of a sub-group of parameters laid one after another."""

    def __init__(self, job: Job, world: int, sub_group_size: int) -> None:
        self.job, self.spec, self.world = job, job.spec, world
        self.sub_groups: list[tuple[int, SubGroup]] = [
            (i, sub)
            for i, group in enumerate(job.spec.groups)
            for sub in zero3_layout([job.spec.numel(n) for n in group.names], world, sub_group_size)
        ]

    def models(self) -> list[FilePlan]:
        """A file per rank that holds no weights: the partitions of the optimizer file are all there is."""
        name, spec = "zero_pp_rank_{}_mp_rank_00_model_states.pt", self.spec
        frozen = sum(self._cut(name) for name in spec.without_gradient) * spec.dtype.itemsize
        return [FilePlan(name.format(rank), frozen, partial(self._model, rank)) for rank in range(self.world)]

    def _cut(self, name: str) -> int:
        """Elements of a parameter that each rank holds, the last ones padded."""
        return -(-self.spec.numel(name) // self.world)

    def _frozen(self, rank: int, name: str) -> Iterator[torch.Tensor]:
        cut, numel = self._cut(name), self.spec.numel(name)
        start, stop = min(rank * cut, numel), min((rank + 1) * cut, numel)
        yield from self.job.rounded(name, start, stop)
        yield from zeros(cut - stop + start)

    def _model(self, rank: int, file: Sink) -> int:
        spec = self.spec
        module = {name: torch.empty(0, dtype=spec.dtype) for name in (*spec.shapes, *spec.aliases, *spec.unread)}
        param_shapes = [sizes(spec, (spec.groups[i].names[p] for p in sub.params)) for i, sub in self.sub_groups]
        frozen = {n: Blank((self._cut(n),), spec.dtype, partial(self._frozen, rank, n)) for n in spec.without_gradient}
        tree = model_states(spec.of_rank(rank), module, param_shapes, 3, self.world, shared=rank == 0, fragments=frozen)
        return torch_writer.save(file, tree, self.job.tally.wrote)

    def payload(self, rank: int) -> int:
        """Bytes of tensor data in a rank's optimizer file: the same for all."""
        return sum(4 * (1 + len(self.spec.groups[i].moments)) * sub.numel for i, sub in self.sub_groups)

    def optim(self, rank: int, file: Sink) -> int:
        """Write a rank's optimizer file."""
        groups: list[dict[str, Any]] = [{**hyper_parameters(group), "params": []} for group in self.spec.groups]
        states, master = {}, []
        for index, (i, sub) in enumerate(self.sub_groups):
            group, pieces = self.spec.groups[i], sub.pieces[rank]
            states[index] = adam_state(group, partial(_shard, self.job, group.names, pieces, length=sub.numel))
            master.append(_shard(self.job, group.names, pieces, "fp32", sub.numel))
            groups[i]["params"].append(index)
        tree = {
            "zero_stage": 3,
            **scaler_fields(self.spec),
            "partition_count": self.world,
            "optimizer_state_dict": {"state": states, "param_groups": groups},
            "fp32_flat_groups": master,
        }
        return _save_optim(self.job, 3, tree, file)


def _shard(job: Job, names: Sequence[str], pieces: Sequence[Piece], state: str, length: int) -> Blank:
    return Blank((length,), torch.float32, partial(job.shard, names, state, pieces, length))


def _whole(group: TargetGroup, state: str) -> bool:
    """Whether stages 1 and 2 keep a moment by whole parameters: Muon's, whose update needs matrices."""
    return bool(group.hyper.get("use_muon")) and group.moments.get(state) == "momentum_buffer"


def _fragment(piece: Piece) -> Foreign:
    address = {"numel": piece.stop - piece.start, "start": piece.at}
    return Foreign("deepspeed.utils.tensor_fragment", "fragment_address", address)


def _save_optim(job: Job, stage: int, tree: dict[str, Any], file: Sink) -> int:
    content = {"optimizer_state_dict": tree, "ds_config": stored_config(job.spec, stage), "ds_version": DS_VERSION}
    return torch_writer.save(file, content, job.tally.wrote)
