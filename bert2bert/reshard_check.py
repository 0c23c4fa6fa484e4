"""Compare a checkpoint with one that `reshard` wrote of it: every bit of every state, names, steps, groups, buffers.

A check that fails is a result, not an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bert2bert.target_names import Names

if TYPE_CHECKING:
    import torch

    from bert2bert.shards.source import Source


def is_reshard(source: Source, target: Source) -> bool:
    """Whether the target says that it is some checkpoint anew, and the source is not that which it was grown from."""
    manifest = target.manifest or {}
    if not manifest.get("reshard"):
        return False
    grown_from = (manifest.get("growth") or {}).get("source") or {}
    return grown_from.get("sha256") is None or grown_from["sha256"] != source.identity()["sha256"]


def compare(source: Source, target: Source, check: Callable[[str, bool, str], None]) -> None:
    """Check the target against the source: every bit of every state that it holds, names, steps and groups."""
    recorded = target.manifest["reshard"]["source"] if target.manifest else {}
    mine = source.identity()
    odd = [key for key in recorded if key != "path" and mine.get(key) != recorded[key]]
    said = f"written from tag {recorded.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(odd)})"
    check("source", not odd, said if odd else "the checkpoint that was written anew")
    names = Names.of(source, target.form, source.config or target.config)
    want = {name: source.tensors[old] for name, old in names.stored.items()}
    have = {name: meta for name, meta in target.tensors.items() if name not in source.buffers}
    lost = [n for n in {**want, **have} if n not in have or n not in want or have[n].shape != want[n].shape]
    check("names", not lost, f"{len(lost)} differ, first {lost[0]}" if lost else f"{len(want)} tensors")
    both = [name for name in want if name not in lost]
    for state in target.states:
        wrong = [name for name in both if not _same(source, names.stored[name], target, name, state)]
        what = "weights" if state == "fp32" else state
        check(what, not wrong, f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(both)}, bit for bit")
    changed = [n for n, buffer in source.buffers.items() if n not in names.left and not _kept(buffer, target, n)]
    kept = len(source.buffers.keys() - set(names.left))
    check("buffers", not changed, f"{len(changed)} differ, first {changed[0]}" if changed else f"{kept}, bit for bit")
    if names.left:
        check("left out", True, f"{len(names.left)} that no current model has, first {names.left[0]}")
    if target.form == "hub":
        return
    if len(source.states) > 1:
        old = names.stored
        most = {n: max(source.step(old[m]) for m in g["names"]) for g in target.groups for n in g["names"] if n in want}
        off = [f"{n}: {source.step(old[n])} -> {target.step(n)}" for n in most if target.step(n) != most[n]]
        check("step", not off, off[0] if off else f"kept ({', '.join(sorted({str(s) for s in most.values()}))})")
    moved = [name for name in both if want[name].trainable != have[name].trainable]
    check("frozen", not moved, f"{moved[0]} differs" if moved else "frozen parameters are the same")
    for what in ("counters", "lr_scheduler"):
        one, other = getattr(source, what), getattr(target, what)
        if one:
            check(what.replace("_", " "), one == other, "kept" if one == other else f"{one} -> {other}")


def _kept(buffer: torch.Tensor, target: Source, name: str) -> bool:
    """Whether the target holds a buffer; a Hugging Face folder does not say which of its tensors are buffers."""
    found = target.buffers.get(name)
    if found is None and name in target.tensors:
        found = target.read(name, "fp32", 0, buffer.shape[0] if buffer.dim() else 1)
    return _bits(buffer, found)


def _same(source: Source, old: str, target: Source, name: str, state: str) -> bool:
    from bert2bert.shards.layout import row_blocks

    for start, stop in row_blocks(target.tensors[name].shape):
        found = target.read(name, state, start, stop)
        expected = source.read(old, state, start, stop) if state in source.states else found.new_zeros(found.shape)
        if not _bits(expected.to(found.dtype), found):
            return False
    return True


def _bits(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Equal shapes, dtypes and bits: NaN is NaN, and -0 is not 0."""
    import torch

    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))
