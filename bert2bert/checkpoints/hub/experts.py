"""Names of a mixture's experts: one tensor an expert and map, where the models have them fused.

transformers fuses ``…experts.0.w1.weight`` and its like into ``…mlp.experts.gate_up_proj`` [experts, 2 ffn, embed]
when it loads a model and takes them apart when it saves one, so readers and writers of its folders do the same; in
models of transformers 4, experts are modules of their own (`checkpoints.stacked` sees both as fused). Names of wrappers
may come anywhere in between.

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
_ROUTER = re.compile(rf"(.+\.)mlp\.(?={_W}gate\.)")
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


def block(name: str) -> str | None:
    """Of a router or fused experts, by a model's name: what stands before their block's name; None for others."""
    found = _FUSED.fullmatch(name) or _ROUTER.match(name)
    return found[1] if found else None


def kind(name: str) -> str | None:
    """``gate_up_proj`` or ``down_proj`` of a model's fused tensor; None for others."""
    found = _FUSED.fullmatch(name)
    return found[2] if found else None


def template(part: str) -> str:
    """A stored name of one expert's map from its block's name on, with ``{}`` for the expert's number.

    Raises ValueError for any other name.
    """
    found = _EXPERT.fullmatch(part)
    if found is None:
        raise ValueError(f"{part} is no expert's")
    return f"{part[found.end(1) : found.start(2)]}{{}}{part[found.end(2) :]}"


def split(size: tuple[int, ...], names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], int]]:
    """The parts of a fused tensor [experts, rows, columns]: name -> shape, flat index of its first element in the fused
    one. names: those of the maps of every expert, with ``{}`` for its number, in the order that they are joined in."""
    (experts, rows, columns), maps = size, list(names)
    part = (rows // len(maps), columns)
    return {
        each.format(e): (part, (e * len(maps) + i) * part[0] * part[1])
        for e in range(experts)
        for i, each in enumerate(maps)
    }


def stored(name: str, size: tuple[int, ...], config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """How a Hugging Face folder has a model's tensor: name -> shape, flat index of its first element in the model's
    tensor."""
    model_type = str(config.get("model_type"))
    if model_type not in _STORED:
        return {name: (size, 0)}
    own, gate_up, down = _STORED[model_type]
    match = _FUSED.fullmatch(name)
    if not match:
        return {name.replace(".mlp.gate.", f".{own}.gate."): (size, 0)}
    maps = gate_up if match[2] == "gate_up_proj" else down
    return split(size, (f"{match[1]}{own}.experts.{{}}.{each}.weight" for each in maps))
