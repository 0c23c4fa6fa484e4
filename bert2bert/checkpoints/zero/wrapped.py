"""Names in modules that torch's wrappers for activation checkpointing and CPU offload enclose.

``torch.distributed.algorithms._checkpoint.checkpoint_wrapper`` puts a module of its own around another, and takes its
name out of the state dict again. So DeepSpeed's files have two names of one tensor: ``module`` has the state dict's
(``layers.0.weight``), and the lists of parameters and buffers have ``layers.0._checkpoint_wrapped_module.weight``. Here
a tensor has the longer one, by which DeepSpeed looks for frozen parameters and in universal checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]
Places = tuple[int, ...]
WRAPPER = "_checkpoint_wrapped_module"


def bare(name: str) -> str:
    """The name in a state dict."""
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def listed(states: Mapping[str, Any]) -> list[str]:
    """The names that a model-states file has beside its state dict: of parameters and buffers."""
    found = [name for shapes in states.get("param_shapes") or () for name in shapes]
    for key in ("frozen_param_shapes", "shared_params", "buffer_names"):
        found += states.get(key) or ()
    found += (states.get("shared_params") or {}).values()
    optimizer = states.get("optimizer")
    if isinstance(optimizer, dict):  # of ZeRO 0, whose groups may hold names
        for group in optimizer.get("optimizer_state_dict", optimizer).get("param_groups", ()):
            found += group.get("param_names", ())
    return found


def enclosed(module: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A state dict with the names of wrappers, where ``names`` show these: of the same module, or else of one that
    differs in its numbers, for stages 0 and 1 list no frozen parameters."""
    known = {bare(name): name for name in names}
    wrapped: dict[Path, Places] = {}
    for name in known.values():
        wrapped |= _wrapped(name)
    alike = {_numbered(path): places for path, places in sorted(wrapped.items())}

    def name_of(key: str) -> str:
        parts = tuple(key.split("."))
        if key in known or WRAPPER in parts:
            return known.get(key, key)
        paths = [parts[:stop] for stop in range(len(parts) - 1, 0, -1)]
        found: Places = next((wrapped.get(p) or alike[_numbered(p)] for p in paths if _numbered(p) in alike), ())
        return ".".join(part for i, name in enumerate(parts) for part in (*[WRAPPER] * found.count(i), name))

    return {name_of(key): value for key, value in module.items()} if wrapped else dict(module)


def _wrapped(name: str) -> dict[Path, Places]:
    """The wrapped modules in a name -> the wrappers on the way to them: of what parts they are in front."""
    path: list[str] = []
    places: list[int] = []
    found: dict[Path, Places] = {}
    for part in name.split("."):
        if part == WRAPPER:
            places.append(len(path))
            found[tuple(path)] = tuple(places)
        else:
            path.append(part)
    return found


def _numbered(path: Path) -> Path:
    return tuple("#" if part.isdigit() else part for part in path)
