"""Names in modules that torch's wrappers for activation checkpointing and CPU offload enclose.

``torch.distributed.algorithms._checkpoint.checkpoint_wrapper`` puts a module of its own around another, and takes its
name out of the state dict again. So DeepSpeed's files have two names of one tensor: ``module`` has the state dict's
(``layers.0.weight``), and the lists of parameters and buffers have ``layers.0._checkpoint_wrapped_module.weight``. Here
a tensor has the longer one, by which DeepSpeed looks for frozen parameters and in universal checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bert2bert.checkpoints.wrappers import Path, enclosed, learn

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


def with_wrappers(module: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A state dict with the names of wrappers, where ``names`` show these: of the same module, or else of one that
    differs in its numbers, for stages 0 and 1 list no frozen parameters."""
    wrapped = [name for name in names if WRAPPER in name]
    if not wrapped:
        return dict(module)
    own = {bare(name): name for name in names}
    wrappers: dict[Path, Path] = {}
    for name in wrapped:
        learn(wrappers, name.split("."), (WRAPPER,))
    return {key if WRAPPER in key else own.get(key) or enclosed(key, wrappers): value for key, value in module.items()}
