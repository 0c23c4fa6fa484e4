"""Compare a checkpoint with one that `reshard` wrote of it: every bit of every state, names, steps, groups, buffers.

A check that fails is a result, not an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bert2bert.checkpoints.spec import OWN_STATE
from bert2bert.checkpoints.zero.layout import row_blocks
from bert2bert.errors import some
from bert2bert.files.torch_writer import bits, equal
from bert2bert.growth.target_names import Names
from bert2bert.measure.checks import Check
from bert2bert.measure.rounding import Blocks, Comparison

if TYPE_CHECKING:
    from bert2bert.checkpoints.source import Source


def is_reshard(source: Source, target: Source) -> bool:
    """Whether the target says that `reshard` wrote it, and the source is not the one that it was grown from."""
    manifest = target.manifest
    if manifest is None or manifest.reshard is None:
        return False
    grown_from = manifest.growth.source if manifest.growth else {}
    return grown_from.get("sha256") is None or grown_from["sha256"] != source.identity()["sha256"]


def compare(source: Source, target: Source, check: Check) -> None:
    """Check the target against the source: every bit of every state that it holds, names, steps and groups."""
    _compare_source(source, target, check)
    names = Names.of(source, target.format, source.config or target.config)
    both = _compare_tensors(source, target, names, check)
    _compare_buffers(source, target, names, check)
    if target.format == "hub":
        return
    _compare_steps(source, target, names, check)
    full = [name for name in both if target.tensors[name].numel]  # others are in no group, trained or not
    moved = [name for name in full if source.tensors[names.stored[name]].trainable != target.tensors[name].trainable]
    check("frozen", not moved, f"{moved[0]} differs" if moved else "frozen parameters are the same")
    for what in ("counters", "lr_scheduler", "client_state", "extras"):
        one, other = getattr(source, what) or {}, getattr(target, what) or {}
        wanted = [key for key in one if key not in OWN_STATE]
        lost = [key for key in wanted if key not in other or not equal(one[key], other[key])]
        if wanted:
            check(what.replace("_", " "), not lost, f"{lost[0]} differs" if lost else "kept")
    if source.of_ranks and len(source.of_ranks) == len(target.of_ranks):
        _compare_ranks(source, target, check)


def _compare_ranks(source: Source, target: Source, check: Check) -> None:
    """What ZeRO 3 keeps of every rank, on as many ranks: no value of one has become that of another."""
    wrong = [
        rank for rank, (one, other) in enumerate(zip(source.of_ranks, target.of_ranks, strict=True))
        if not all(equal(v, other.client_state.get(k)) for k, v in one.client_state.items() if k not in OWN_STATE)
        or not all(equal(value, one.module.get(name)) for name, value in other.module.items())
    ]  # fmt: skip
    check("states of ranks", not wrong, f"rank {wrong[0]} differs" if wrong else "each rank's own")


def _compare_source(source: Source, target: Source, check: Check) -> None:
    """Whether the target was written from this source."""
    recorded = target.manifest.reshard.source if target.manifest and target.manifest.reshard else {}
    mine = source.identity()
    odd = [key for key in recorded if key != "path" and mine.get(key) != recorded[key]]
    found = f"written from tag {recorded.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(odd)})"
    check("source", not odd, found if odd else "the checkpoint that it was written from")


def _compare_tensors(source: Source, target: Source, names: Names, check: Check) -> list[str]:
    """Names, shapes and every bit of every state; the names that both have."""
    want = {name: source.tensors[old].shape for name, old in names.stored.items()}
    have = {name: meta.shape for name, meta in target.tensors.items() if name not in source.buffers}
    lost = [name for name in {**want, **have} if want.get(name) != have.get(name)]
    counted = f"{len(want)} on both sides"
    counted += f"; copies of tied tensors in the source: {some([*names.copies])}" if names.copies else ""
    counted += f"; not in the source's files: {some(source.unread)}" if source.unread else ""
    check("tensors", not lost, f"{len(lost)} differ, first {lost[0]}" if lost else counted)
    both = [name for name in want if name not in lost]
    for state in target.states:
        compared = Comparison()
        for name in both:
            compared.add(name, _blocks(source, names.stored[name], target, name, state))
        compared.report("weights" if state == "fp32" else state, check)
    return both


def _compare_buffers(source: Source, target: Source, names: Names, check: Check) -> None:
    lost = [name for name in source.untrained if name in target.unread]
    wanted = [name for name in source.buffers if name not in names.left and name not in lost]
    changed = [name for name in wanted if not _kept(source.buffers[name], target, name)]
    changed += [name for name in target.buffers if name not in source.buffers]
    found = f"{len(changed)} differ, first {changed[0]}" if changed else f"{len(wanted)}, bit for bit"
    check("buffers", not changed, found)
    if lost:
        check("left out", True, f"{len(lost)} that stage 3 does not restore, first {lost[0]}")
    if names.left:
        check("left out", True, f"{len(names.left)} that transformers does not read, first {names.left[0]}")


def _compare_steps(source: Source, target: Source, names: Names, check: Check) -> None:
    """Adam's steps: a group that joins parameters has the largest of theirs."""
    if len(source.states) == 1:
        return
    old = names.stored
    known = [[name for name in group["names"] if name in old] for group in target.groups]
    most = {name: max(source.step(old[other]) for other in group) for group in known for name in group}
    off = [f"{n}: {source.step(old[n])} -> {target.step(n)}" for n in most if target.step(n) != most[n]]
    check("step", not off, off[0] if off else f"kept ({', '.join(sorted({str(s) for s in most.values()}))})")


def _kept(buffer: Any, target: Source, name: str) -> bool:
    """Whether the target holds a buffer; a Hugging Face folder does not say which of its tensors are buffers."""
    found = target.buffers.get(name)
    if name in target.buffers and not hasattr(buffer, "shape"):
        return equal(buffer, found)
    if found is None and name in target.tensors:
        found = target.read(name, "fp32", 0, buffer.shape[0] if buffer.dim() else 1)
    return bits(buffer, found)


def _blocks(source: Source, old: str, target: Source, name: str, state: str) -> Blocks:
    for start, stop in row_blocks(target.tensors[name].shape):
        found = target.read(name, state, start, stop)
        yield (source.read(old, state, start, stop) if state in source.states else torch.zeros_like(found)), found
