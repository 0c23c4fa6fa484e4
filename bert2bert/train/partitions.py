"""What one rank holds of every parameter and its Adam state, as views into DeepSpeed's flat buffers.

A native ZeRO load knows no names and checks nothing, so the trainer reads, writes and verifies its states through these
views: a fragment says which elements of which named tensor lie where. Works at ZeRO stage 0 (whole tensors), 1, 2 and
3, in every precision, offloaded to the CPU or not.

Refuses (RuntimeError: a defect, not an input) a DeepSpeed whose buffers do not have the sizes that the layout predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from bert2bert.checkpoints.expert_parallel.layout import blocks, parts, renamer, spread
from bert2bert.checkpoints.source import STATES
from bert2bert.checkpoints.zero.layout import parameter_alignment, zero3_sub_group, zero12_layout
from bert2bert.files.digest import digest, hex16

if TYPE_CHECKING:
    from bert2bert.train.engine import Engine

MOMENTS = STATES[1:]


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter ``name``: they lie at ``at`` of this rank's flat ``master``.

    ``group``: index of the optimizer group; ``master``: the fp32 tensor that the torch optimizer steps.
    """

    name: str
    group: int
    start: int
    stop: int
    master: torch.Tensor
    at: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment's elements in a tensor laid out as ``master`` is: a 1-dim view."""
        return flat.detach().view(-1)[self.at : self.at + self.stop - self.start]


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments, in group order (at stage 0 every rank holds everything)."""
    if engine.stage == 0:
        yield from _whole(engine)
    elif engine.stage == 3:
        yield from _stage3(engine)
    else:
        yield from _stage12(engine)


def _numel(engine: Engine, name: str) -> int:
    return int(torch.Size(engine.shape(name)).numel())


def _whole(engine: Engine) -> Iterator[Fragment]:
    masters = [group["params"] for group in engine.optimizer.param_groups]
    for g, group in enumerate(engine.groups):
        for name, master in zip(group.names, masters[g], strict=True):
            yield Fragment(name, g, 0, master.numel(), master, 0)


def _stage12(engine: Engine) -> Iterator[Fragment]:
    outer = engine.ds.optimizer
    prefixes = [block.prefix for block in blocks({n: engine.shape(n) for n in engine.names}) if block.auto]
    whole = renamer(list(engine.parameters), prefixes, back=True) if engine.experts else str
    for g, each in enumerate(engine.cuts):
        live = [id(p) for p in outer.bit16_groups[g]]
        _require([id(engine.parameters[n]) for n in each.shapes] == live, f"the order of optimizer group {g}")
        master = outer.single_partition_of_fp32_groups[g]
        # ranks with the same experts share them out
        size = engine.experts or 1 if each.experts else 1
        layout = zero12_layout([prod(s) for s in each.shapes.values()], engine.world // size, _alignment(engine))
        _require(layout.partition == master.numel(), f"a partition of {layout.partition} elements for group {g}")
        pieces = layout.pieces[engine.rank // size]
        names = list(each.shapes)
        if each.experts:
            held = [parts(name, shape, engine.rank % size, {}) for name, shape in each.shapes.items()]
            for name, start, stop, at in spread(pieces, held):
                yield Fragment(name, each.group, start, stop, master, at)
            continue
        for piece in pieces:
            yield Fragment(whole(names[piece.param]), each.group, piece.start, piece.stop, master, piece.at)


def _alignment(engine: Engine) -> int:
    config = engine.ds.config.get("zero_optimization") or {}
    size = 4 if engine.precision == "fp32" else 2
    return parameter_alignment(size, bool(config.get("parameter_alignment", False)))


def _stage3(engine: Engine) -> Iterator[Fragment]:
    outer = engine.ds.optimizer
    names = {id(p): n for n, p in engine.parameters.items()}
    for sub, params in enumerate(outer.fp16_groups):
        master = outer.fp32_partitioned_groups_flat[sub]
        held = [names[id(p)] for p in params]
        layout = zero3_sub_group([_numel(engine, n) for n in held], engine.world, range(len(held)))
        _require(layout.numel == master.numel(), f"a flat tensor of {layout.numel} elements for sub-group {sub}")
        for piece in layout.pieces[engine.rank]:
            group = outer.sub_group_to_group_id[sub]
            yield Fragment(held[piece.param], group, piece.start, piece.stop, master, piece.at)


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise RuntimeError(f"this DeepSpeed lays its partitions out in another way: expected {expected}")


def masters(engine: Engine) -> list[tuple[int, torch.Tensor]]:
    """Every flat tensor that this rank's optimizer steps, with its group: one a group, and one of its experts where
    ranks share them (stage 3: one a sub-group)."""
    outer = engine.ds.optimizer
    if engine.stage == 0:
        return [(g, p) for g, group in enumerate(engine.optimizer.param_groups) for p in group["params"]]
    if engine.stage == 3:
        return [(outer.sub_group_to_group_id[s], m) for s, m in enumerate(outer.fp32_partitioned_groups_flat)]
    return [(each.group, m) for each, m in zip(engine.cuts, outer.single_partition_of_fp32_groups, strict=True)]


def read(engine: Engine, fragment: Fragment, state: str) -> torch.Tensor | None:
    """A view of the fragment's elements of one state; None for the moments of what was never stepped (zeros)."""
    if state == "fp32":
        return fragment.of(fragment.master)
    held = engine.optimizer.state.get(fragment.master, {}).get(state)
    return None if held is None else fragment.of(held)


def steps(engine: Engine) -> list[int]:
    """Adam's step count of every group (0: never stepped).

    Raises RuntimeError when the tensors of one group were stepped differently often: the checkpoint could not say so.
    """
    found: dict[int, set[int]] = {g: set() for g in range(len(engine.groups))}
    for g, master in masters(engine):
        found[g].add(int(engine.optimizer.state.get(master, {}).get("step", 0)))
    if mixed := [engine.groups[g].part for g, counts in found.items() if len(counts) != 1]:
        raise RuntimeError(f"the tensors of optimizer group {mixed[0]} have different Adam steps")
    return [counts.pop() for counts in found.values()]


def set_moments(engine: Engine, moments: dict[torch.Tensor, dict[str, torch.Tensor]], counts: list[int]) -> None:
    """Give each flat master tensor its moments (laid out as it is) and its group's step count.

    A group of step 0 keeps no state, as if never stepped. Every master gets a step tensor of its own: DeepSpeed's
    universal load shares one between all ZeRO-3 sub-groups, which then counts several steps at once.
    """
    for g, master in masters(engine):
        engine.optimizer.state.pop(master, None)
        if counts[g]:
            step = torch.tensor(float(counts[g]), dtype=torch.float32, device=master.device)
            engine.optimizer.state[master] = {"step": step, **moments[master]}


def publish(engine: Engine) -> None:
    """Make the model's own (low-precision, gathered) weights follow the fp32 masters, after these were written to."""
    outer = engine.ds.optimizer
    if engine.stage == 0:
        if engine.precision != "fp32":
            for group, live in zip(engine.groups, engine.optimizer.param_groups, strict=True):
                for name, master in zip(group.names, live["params"], strict=True):
                    engine.parameters[name].data.copy_(master.data)
    elif engine.stage == 3:
        outer.checkpoint_event_prologue()
        for sub in range(len(outer.fp32_partitioned_groups_flat)):
            outer._reassign_or_swap_out_partitioned_parameters(sub)
        if outer.persistent_parameters:
            outer.persistent_parameters[0].partition(outer.persistent_parameters)
        outer.checkpoint_event_epilogue()
    else:
        outer.update_lp_params()
        # Else DeepSpeed's own readers of optimizer state (safe_get_...) know only the groups that it stepped first.
        outer._hp_optimizer_states_linked = False
        outer._lazy_init_hp_params_optimizer_state()


def digests(engine: Engine, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """Digest of every tensor's states over all ranks: {name: {"fp32": hex16, "exp_avg": …, "exp_avg_sq": …}}.

    ``dtype``: in which the elements are digested (a Hugging Face folder may store 16 bits). Moments of a group that was
    never stepped count as zeros. Collective: each rank digests the fragments it holds, and the parts are summed modulo
    2**64.
    """
    index = {name: i for i, name in enumerate(engine.names)}
    parts = torch.zeros(len(index), len(STATES), dtype=torch.int64)
    if engine.stage or engine.rank == 0:
        for fragment in fragments(engine):
            for s, state in enumerate(STATES):
                held = read(engine, fragment, state)
                if held is None:
                    held = torch.zeros(fragment.stop - fragment.start, device=fragment.master.device)
                value = digest(held.to(dtype), fragment.start)
                parts[index[fragment.name], s] += value - (1 << 64) if value >> 63 else value
    total = engine.sum_ints(parts)
    return {name: {s: hex16(int(total[i, k])) for k, s in enumerate(STATES)} for name, i in index.items()}
