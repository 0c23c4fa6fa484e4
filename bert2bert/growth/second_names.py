"""Second names of a run's tensors, beside those that the architecture ties.

A script that keeps a module under two attributes (``self.encoder = self.model.encoder``) has the module's tensors in
its state dict twice, and a strict load looks for both names.

What is registered twice is a module: every name below the one prefix has a partner below the other. So the grown
module has one for every tensor, those of added layers included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping


def second_names(
    aliases: Mapping[str, str], own: Mapping[str, str], before: Collection[str], after: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The second names of the target, each -> the first name of its tensor, and those of the source that it lacks.

    aliases: the source's absent names -> kept ones; own: those that the architecture ties; before, after: the first
    names of the source's and of the target's tensors. A second name is lacking where a module is registered twice in
    part, or where it is (in) a layer and the layers change, so that the script may mean another one.
    """
    second = {absent: kept for absent, kept in aliases.items() if absent not in own}
    found: dict[str, str] = {}
    lacking: list[str] = []
    known = {*before, *own}
    for (alias, kept), rests in _modules(second).items():
        below = {name.removeprefix(kept) for name in known if name.startswith(kept)}
        layer = any(part.isdigit() for part in kept.split("."))
        alone = {rest for rest in below - rests if alias + rest not in second}
        if alone or (layer and set(before) != set(after)):
            lacking += [alias + rest for rest in rests]
        else:
            found |= {alias + name.removeprefix(kept): name for name in after if name.startswith(kept)}
    return found, sorted(lacking)


def _modules(second: Mapping[str, str]) -> dict[tuple[str, str], set[str]]:
    """(second prefix, first prefix) -> the names below both: of each pair the longest common end, less the beginning
    that all of the same prefixes have in common."""
    ends: dict[tuple[str, str], set[str]] = defaultdict(set)
    for absent, kept in second.items():
        a, k = absent.split("."), kept.split(".")
        same = next((n for n, (x, y) in enumerate(zip(a[::-1], k[::-1], strict=False)) if x != y), min(len(a), len(k)))
        same = min(same, len(a) - 1, len(k) - 1)
        ends[_prefix(a[: len(a) - same]), _prefix(k[: len(k) - same])].add(".".join(a[len(a) - same :]))
    modules = {}
    for (alias, kept), rests in ends.items():
        common: list[str] = []
        for parts in zip(*(rest.split(".")[:-1] for rest in rests), strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        start = _prefix(common)
        modules[alias + start, kept + start] = {rest.removeprefix(start) for rest in rests}
    return modules


def _prefix(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)
