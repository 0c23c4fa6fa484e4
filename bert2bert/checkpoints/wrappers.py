"""Names of wrappers among the modules of a tensor's name, as torch.compile and activation checkpointing put them there.

What is known of them: path of modules -> the wrappers that follow it; numbers also as '#', so that a layer which shows
none of its own is taken to be wrapped as another is. Refuses nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

Path = tuple[str, ...]


def learn(known: dict[Path, Path], parts: Iterable[str], wrappers: Collection[str]) -> None:
    """Add to ``known`` the wrappers in a name, of these parts; what is there already stays."""
    found: dict[Path, Path] = {}
    path: Path = ()
    for part in parts:
        if part in wrappers:
            found[path] = (*found.get(path, ()), part)
        else:
            path = (*path, part)
    for path, added in found.items():
        known.setdefault(path, added)
        known.setdefault(_numbered(path), added)


def enclosed(name: str, known: Mapping[Path, Path]) -> str:
    """The name with its wrappers put in."""
    parts = name.split(".")
    found = [*known.get((), ())]
    for end, part in enumerate(parts, 1):
        path = tuple(parts[:end])
        found += [part, *known.get(path, known.get(_numbered(path), ()))]
    return ".".join(found)


def _numbered(path: Path) -> Path:
    return tuple("#" if part.isdecimal() else part for part in path)
