"""Mixtures of experts in Hugging Face files: one tensor an expert and map, where the models have them fused.

transformers fuses ``…experts.0.w1.weight`` and its like into ``…mlp.experts.gate_up_proj`` [experts, 2 ffn, embed]
when it loads a model and takes them apart when it saves one, so readers and writers of its folders do the same. Names
of wrappers may come anywhere in between. A folder that `reshard` wrote of a model whose experts are modules of their
own, as those of transformers 4 are, is read as its manifest lists it.

Refuses (`InvalidCheckpoint`) experts that are not all there or not of one shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bert2bert.errors import InvalidCheckpoint

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module"}
)
"""What data parallelism and DeepSpeed's engine, torch.compile, Lightning, and torch's and FairScale's wrappers for
activation checkpointing and FSDP put between the names of modules."""
_LLAMA = ("mlp", ("gate_proj", "up_proj"), ("down_proj",))
_STORED = {
    "mixtral": ("block_sparse_moe", ("w1", "w3"), ("w2",)),
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
}
"""model_type -> block, the maps of ``gate_up_proj``, those of ``down_proj``, as stored."""
_W = rf"(?:(?:{'|'.join(sorted(WRAPPERS))})\.)*"
_EXPERT = re.compile(rf"(.+\.)(?:block_sparse_moe|mlp)\.{_W}experts\.{_W}(\d+)\.{_W}(\w+)\.{_W}weight")
_BLOCK = re.compile(rf"\.block_sparse_moe\.(?={_W}gate\.|{_W}experts\.{_W}(?:gate_up|down)_proj$)")
_FUSED = re.compile(r"(.+\.)mlp\.experts\.(gate_up_proj|down_proj)")
_PLACE = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
          "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}  # fmt: skip

Parts = tuple[tuple[str, ...], ...]
"""Stored names by expert, of each those that are concatenated along its first dim."""


def fused(names: Iterable[str]) -> dict[str, Parts]:
    """The fused tensors that stored names make up: model's name -> parts; the other names are left out."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        match = _EXPERT.fullmatch(name)
        if match and match[3] in _PLACE:
            kind, part = _PLACE[match[3]]
            found.setdefault(f"{match[1]}mlp.experts.{kind}", {})[int(match[2]), part] = name
    result = {}
    for name, pieces in found.items():
        experts = max(expert for expert, _ in pieces) + 1
        parts = 2 if name.endswith("gate_up_proj") else 1
        lacking = [(e, p) for e in range(experts) for p in range(parts) if (e, p) not in pieces]
        if lacking:
            raise InvalidCheckpoint(
                f"{name}: expert {lacking[0][0]} of {experts} is not all in the checkpoint. Copy all shards."
            )
        result[name] = tuple(tuple(pieces[e, p] for p in range(parts)) for e in range(experts))
    return result


def model_name(name: str) -> str:
    """A model's name of a stored tensor that is not an expert's."""
    return _BLOCK.sub(".mlp.", name)


def shape(name: str, parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a fused tensor. Raises InvalidCheckpoint where experts differ."""
    found = {tuple(shapes[part] for part in expert) for expert in parts}
    first = next(iter(found))
    if len(found) > 1 or len(set(first)) > 1:
        raise InvalidCheckpoint(f"{name}: its experts have the shapes {sorted(found)}; expected one shape for all")
    return (len(parts), len(first) * first[0][0], *first[0][1:])


def stored(name: str, size: tuple[int, ...], config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """How a model's tensor is stored: name -> shape, flat index of its first element in the model's tensor."""
    kind = str(config.get("model_type"))
    if kind not in _STORED:
        return {name: (size, 0)}
    block, gate_up, down = _STORED[kind]
    match = _FUSED.fullmatch(name)
    if not match:
        return {name.replace(".mlp.gate.", f".{block}.gate."): (size, 0)}
    maps = gate_up if match[2] == "gate_up_proj" else down
    experts, rows, columns = size
    part = (rows // len(maps), columns)
    return {
        f"{match[1]}{block}.experts.{e}.{each}.weight": (part, (e * len(maps) + i) * part[0] * part[1])
        for e in range(experts)
        for i, each in enumerate(maps)
    }
