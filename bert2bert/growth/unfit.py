"""Why a stored tensor cannot grow, and the remedy: it is not there, or its numbers are those of a quantised weight.

Refuses both (InvalidCheckpoint), by name: what a run froze and left out of its files, and frozen parameters of whole
numbers or of 8 bits, are named as such, and so are experts that a model in memory has one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bert2bert.checkpoints.hub import experts
from bert2bert.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bert2bert.checkpoints.source import Source, TensorMeta

_GROWS = ("float64", "float32", "bfloat16", "float16")
_QUANTISED = (
    "weights that are quantised or packed cannot be grown. Use the checkpoint they were made from, or save the model "
    "again with its weights as floating-point numbers."
)


def check_numbers(source: Source, tensors: Iterable[TensorMeta]) -> None:
    """Refuse (InvalidCheckpoint) parameters that are not floating-point numbers of 16 bits or more."""
    for meta in tensors:
        if meta.dtype not in _GROWS:
            frozen = "" if meta.trainable else ", a parameter that the run froze"
            raise InvalidCheckpoint(f"{source.path}: {meta.name} is {meta.dtype}{frozen}: {_QUANTISED}")


def instead_of(source: Source, name: str) -> str:
    """What to say of a parameter that is not there: what its module has instead that is not a floating-point number, or
    how a run leaves it out of its files."""
    if ".mlp." in name and (single := experts.fused(source.tensors)):
        return (
            f"Its experts are modules of their own (first {next(iter(single.values()))[0][0]}), as in models of "
            "transformers 4; expected transformers' model of today, which has them fused. Grow its checkpoint on disk."
        )
    module, _, leaf = name.rpartition(".")
    module += "."
    made_of = [f"{module}parametrizations.{leaf}.", *(f"{name}_{end}" for end in ("g", "v", "orig"))]
    if parts := [n for n in source.tensors if n.startswith(made_of[0]) or n in made_of]:
        return (
            f"Its module computes it of others, first {parts[0]} (a parametrization, as weight_norm, spectral_norm and "
            "pruning are). Make it a plain parameter (torch.nn.utils.parametrize.remove_parametrizations, "
            "remove_weight_norm, remove_spectral_norm, prune.remove), and save the model again."
        )
    found = {n: buffer for n, buffer in source.buffers.items() if n.startswith(module) and hasattr(buffer, "dtype")}
    if found:
        first = name if name in found else min(found)
        if first == name and str(found[first].dtype).removeprefix("torch.") in _GROWS:
            return (
                "The state dict has it, but no optimizer group, and it is not frozen: the run did not train it. "
                "Set requires_grad to False before deepspeed.initialize, or give it to the optimizer, load the "
                "checkpoint so, save it, and grow that."
            )
        return f"In its place is {first} ({str(found[first].dtype).removeprefix('torch.')}): {_QUANTISED}"
    if name in source.unread:
        return (
            "The state dict has its name and no value: DeepSpeed's stage 3 saves no parameter that is in no optimizer "
            "group, unless it is frozen. Set requires_grad to False before deepspeed.initialize, or give it to the "
            "optimizer, and save the run with its value."
        )
    asked = "Is this the config of this checkpoint?"
    listed = source.lists_frozen and source.manifest is None  # a resharded file lists those that its source had
    if source.format == "hub" or listed:
        return asked
    return (
        f"{asked} If it is, the run may have frozen the parameter and left it out (exclude_frozen_parameters=True); "
        "grow needs all of the model's. Load the checkpoint into an engine whose model has the frozen values "
        "(load_checkpoint with load_module_strict=False), save it without exclude_frozen_parameters, and grow that."
    )
