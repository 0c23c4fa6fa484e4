"""Native checkpoints of ZeRO 1 and 2 for expert-parallel engines (`expert_parallel`), as DeepSpeed 0.19.8 has them.

    layer_L_expert_E_mp_rank_00_model_states.pt    weights of expert E of the L-th layer with experts, in low precision
    mp_rank_00_model_states.pt                     all other weights; what rank 0 holds of each optimizer group
    zero_pp_rank_R_mp_rank_00_optim_states.pt      master weights and moments of rank R, whose groups of experts are cut
                                                   among the ranks with the same experts: R, R ± E, R ± 2 E, …

Refuses, as InvalidConfig: a model without experts that DeepSpeed splits; a size that divides neither the ranks nor
the experts; Muon. Stage 3 splits experts in another way: `Target` refuses it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch

from bert2bert.checkpoints.expert_parallel.layout import (
    Block,
    Cut,
    blocks,
    cut,
    local_counts,
    of_expert,
    parts,
    renamer,
    spread,
)
from bert2bert.checkpoints.job import FilePlan, Job, TargetSpec
from bert2bert.checkpoints.zero.layout import Piece, zero12_layout
from bert2bert.checkpoints.zero.writer import Held, Zero12, rank_files
from bert2bert.errors import InvalidConfig
from bert2bert.files import torch_writer
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank

_VERSION = 0.4  # of DeepSpeed's universal checkpoints, which its converter looks for


def check(spec: TargetSpec, world: int) -> None:
    """Raise InvalidConfig for a target that DeepSpeed could not load."""
    size = spec.expert_parallel.size if spec.expert_parallel else 0
    if size < 1 or world % size:
        raise InvalidConfig(
            f"--expert-parallel {size} does not divide --world-size {world}: as many ranks share the experts. Choose "
            f"one of {_divisors(world)}."
        )
    found = blocks(spec.shapes)
    if not found:
        raise InvalidConfig(
            f"--expert-parallel {size}: the model has no experts that DeepSpeed splits (experts.gate_up_proj and "
            "down_proj of transformers' mixtures, or deepspeed_experts.N). Leave the option out."
        )
    for block in found:
        if block.experts % size:
            raise InvalidConfig(
                f"--expert-parallel {size} does not divide the {block.experts} experts of {block.prefix[:-1]}: every "
                f"rank holds as many. Choose one of {_divisors(block.experts)}."
            )
    for group in spec.groups:
        if group.hyper.get("use_muon"):
            raise InvalidConfig(
                f"--expert-parallel {size}: {group.names[0]} and others of its group are trained with Muon, whose "
                "momentum has no known place in expert-parallel files. Leave the option out."
            )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def expert_zero_files(job: Job, stage: int, world: int) -> list[FilePlan]:
    """The files of the checkpoint, each independent of the others. Raises InvalidConfig as `check` does."""
    check(job.spec, world)
    return rank_files(job, _Experts(job, stage, world), world)


class _Experts(Zero12):
    """Stages 1 and 2 of an expert-parallel engine."""

    def __init__(self, job: Job, stage: int, world: int) -> None:
        super().__init__(job, stage, world)
        spec = job.spec
        if spec.expert_parallel is None:
            raise ValueError("the target is not expert-parallel")
        self._how, self._blocks = spec.expert_parallel, blocks(spec.shapes)
        self._size, last = self._how.size, bool(self._how.last)
        auto = [block.prefix for block in self._blocks if block.auto]
        self._auto, self._rename = auto, renamer(list(spec.shapes), auto)
        back = {self._rename(name): name for name in spec.shapes}
        self._cuts = cut([group.names for group in spec.groups], spec.shapes, self._size, last)
        self._held = local_counts([name for each in self._cuts for name in each.shapes])
        self._layouts = []
        self._names: list[list[str]] = []  # of whole tensors, of each group that is not of experts
        for each in self._cuts:
            ranks = world // self._size if each.experts else world
            self._layouts.append(zero12_layout([prod(shape) for shape in each.shapes.values()], ranks))
            self._names.append([] if each.experts else [back[name] for name in each.shapes])
        self._whole = {name for block in self._blocks for name in block.whole}

    def held(self, rank: int) -> list[Held]:
        found = []
        for each, layout, names in zip(self._cuts, self._layouts, self._names, strict=True):
            group = self.spec.groups[each.group]
            own = tuple(each.shapes)
            if not each.experts:
                named = replace(group, hyper={"name": group.part, **group.hyper})
                found.append(Held(named, layout, rank, own, names, layout.pieces[rank]))
                continue
            part, name = rank // self._size, f"ep_size_{self._size}"
            named = replace(group, hyper={**group.hyper, "name": name, "moe": True})
            whole, pieces = self._gathered(each, layout.pieces[part], rank % self._size)
            found.append(Held(named, layout, part, own, whole, pieces))
        return found

    def _gathered(self, each: Cut, pieces: Sequence[Piece], rank: int) -> tuple[list[str], list[Piece]]:
        """Names of whole tensors, and the pieces of those that expert-parallel rank ``rank`` has."""
        found = spread(pieces, [parts(name, shape, rank, self._held) for name, shape in each.shapes.items()])
        index: dict[str, int] = {}
        result = [Piece(index.setdefault(name, len(index)), start, stop, at) for name, start, stop, at in found]
        return list(index), result

    # --- model states ------------------------------------------------------------------------------------------

    def models(self) -> list[FilePlan]:
        """The model's file, and one for each expert of each layer."""
        size = self.spec.dtype.itemsize
        dense = [name for name in self.spec.shapes if name not in self._whole]
        plans = [
            FilePlan("mp_rank_00_model_states.pt", sum(map(self.spec.numel, dense)) * size, partial(self._dense, dense))
        ]
        for layer, block in enumerate(self._blocks):
            for expert in range(block.experts):
                numel = sum(prod(shape) for _, shape, _ in of_expert(block, expert).values())
                name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
                plans.append(FilePlan(name, numel * size, partial(self._expert, block, expert)))
        return plans

    def _expert(self, block: Block, expert: int, file: Sink) -> int:
        tree = {}
        for key, (name, shape, start) in of_expert(block, expert).items():
            values = partial(self.job.rounded, name, start, start + prod(shape))
            tree[key] = Blank(shape, self.spec.dtype, values)
        return torch_writer.save(file, OrderedDict(tree), self.job.tally.wrote)

    def _dense(self, names: Sequence[str], file: Sink) -> int:
        tree, rename = self.tree(names), self._rename
        module = OrderedDict(_keys(tree["module"], rename))
        if self._how.captured:  # the same module under the name that the model's recorder of outputs looks for
            for prefix in self._auto:
                routers = {name: value for name, value in module.items() if name.startswith(f"{prefix}router.")}
                module |= {f"{prefix}gate.{n.removeprefix(prefix + 'router.')}": value for n, value in routers.items()}
        tree["module"] = module
        tree["buffer_names"] = [rename(name) for name in tree["buffer_names"]]
        tree["shared_params"] = {rename(a): rename(b) for a, b in tree["shared_params"].items()}
        for key in ("frozen_param_shapes", "frozen_param_fragments"):
            if tree[key] is not None:
                kept = {name: value for name, value in tree[key].items() if name not in self._whole}
                tree[key] = OrderedDict(_keys(kept, rename))
        tree["param_shapes"] = [
            OrderedDict((name, torch.Size(shape)) for name, shape in each.shapes.items()) for each in self._cuts
        ]
        tree["num_experts"] = [block.experts for block in self._blocks]
        layers = [self._layer(i, block) for i, block in enumerate(self._blocks) if block.auto] or None
        tree["ds_autoep_layers"] = layers
        if layers:
            tree["universal_checkpoint_info"] = {
                "universal_checkpoint_version": _VERSION,
                "expert_parameter_patterns": [r".*\.experts\.w[123]$"],
                "ds_autoep_layers": layers,
            }
        return torch_writer.save(file, tree, self.job.tally.wrote)

    def _layer(self, index: int, block: Block) -> dict[str, Any]:
        """What DeepSpeed's files say of one of AutoEP's layers, as rank 0 has it."""
        size, held = self._size, block.experts // self._size
        up = block.whole[f"{block.prefix}experts.gate_up_proj"]
        ffn, embed = up[1] // 2, up[2]
        shapes = {"w1": (ffn, embed), "w2": (embed, ffn), "w3": (ffn, embed)}
        placed = [{"rank": rank, "experts": list(range(rank * held, (rank + 1) * held))} for rank in range(size)]
        return {
            "moe_layer_id": index,
            "module_path": block.prefix[:-1],
            "num_experts": block.experts,
            "num_local_experts": held,
            "ep_size": size,
            "expert_placement": {"version": 1, "num_experts": block.experts, "ep_size": size, "ranks": placed},
            "affine_maps": {
                "version": 1,
                "params": {f"{block.prefix}experts.{k}": _affine(block.experts, size, s) for k, s in shapes.items()},
            },
            "expert_key_prefix": f"{block.prefix}experts",
            "checkpoint_format": "per_expert_files",
            "checkpoint_format_version": None,
            "ep_group_name": f"ep_size_{size}",
            "ep_rank": 0,
            "expert_data_parallel_rank": 0,
            "expert_data_parallel_world_size": self.world // size,
            "global_expert_start": 0,
            "global_expert_end": held,
        }


def _affine(experts: int, size: int, shape: tuple[int, int]) -> dict[str, Any]:
    """DeepSpeed's description of a tensor of experts that is cut along its first dim."""
    held, each = experts // size, prod(shape)
    strides = [each, shape[1], 1]

    def piece(rank: int) -> dict[str, Any]:
        source, dest = [rank * held * each, list(strides)], [0, list(strides)]
        return {"shape": [held, *shape], "source": source, "dest": dest, "locations": [rank]}

    ranks = {rank: {"shard_shape": [held, *shape], "pieces": [piece(rank)]} for rank in range(size)}
    return {"logical_shape": [experts, *shape], "ranks": ranks}


def _keys(table: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(name): value for name, value in table.items()}
