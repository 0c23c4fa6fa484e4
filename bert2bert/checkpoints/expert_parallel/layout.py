"""How an expert-parallel engine holds a mixture of experts: names, optimizer groups, each rank's slices.

Arithmetic alone: no tensors, no files. DeepSpeed has two such engines. *AutoEP* replaces the blocks of a transformers
model: ``X.gate`` becomes ``X.router.gate``; ``X.experts.gate_up_proj`` [experts, 2 ffn, embed] and ``down_proj``
[experts, embed, ffn] become ``X.experts.w1``, ``w3`` (gate and up, [local experts, ffn, embed]) and ``w2``.
*deepspeed.moe.layer.MoE* numbers its experts ``….deepspeed_experts.N.…``, on each rank from 0. Here, whole tensors go
by the model's own names and by global numbers. Expert-parallel rank e of E holds the experts [e n / E, (e + 1) n / E).

Experts have optimizer groups of their own, cut among the ranks that hold the same ones; DeepSpeed takes them out of the
groups that it is given (`cut`). Refuses nothing: callers check first; impossible arguments raise ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from bert2bert.checkpoints.zero.layout import Piece

MAX_GROUP = 178956971  # elements of a rank in a group of experts; DeepSpeed's default
CAPTURED = {"mixtral": False, "qwen2_moe": False, "qwen3_moe": True}
"""model_type of those whose router an AutoEP engine names twice -> whether the model has its experts before it."""
_FUSED = re.compile(r"(.*\.|)experts\.(gate_up_proj|down_proj)")
_LOCAL = re.compile(r"(.*\.|)experts\.(w[123])")
_NUMBERED = re.compile(r"(.*\bdeepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)")
_PLACE = {"w1": ("gate_up_proj", 2, 0), "w3": ("gate_up_proj", 2, 1), "w2": ("down_proj", 1, 0)}  # whole, parts, part

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertParallel:
    """How an engine is split. size: ranks that share the experts; last: it was given its parameters in lists, and so
    has AutoEP's routers at the end of their groups, not in the model's order (None: neither is so);
    captured: its state dict has the routers twice (`CAPTURED`); data_first: DeepSpeed's
    use_data_before_expert_parallelism, see `ranks_of`, which is read and not written."""

    size: int
    last: bool | None = False
    captured: bool = False
    data_first: bool = False


class Part(NamedTuple):
    """Elements [at, at + numel) of a rank's tensor are [start, start + numel) of the whole tensor ``name``."""

    name: str
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class Block:
    """The experts of one layer. prefix: of its names (with the dot); auto: AutoEP's; experts: how many in all;
    whole: shapes of their tensors by name."""

    prefix: str
    auto: bool
    experts: int
    whole: dict[str, Shape]


@dataclass(frozen=True)
class Cut:
    """One optimizer group of an expert-parallel engine. group: index of that which it was taken out of; experts:
    whether it holds them, and is cut among the ranks with the same ones; shapes: by the engine's names, in order, those
    of experts as a rank has them."""

    group: int
    experts: bool
    shapes: dict[str, Shape]


def natural(name: str) -> list[Any]:
    """Sorts names with numbers in them by number."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def blocks(shapes: Mapping[str, Shape]) -> list[Block]:
    """The layers with experts among a model's tensors, in the model's order."""
    found: dict[tuple[str, bool], dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if (match := _FUSED.fullmatch(name)) and len(shape) == 3:
            found.setdefault((match[1], True), {})[name] = shape
        elif match := _NUMBERED.fullmatch(name):
            found.setdefault((match[1], False), {})[name] = shape
    kept = []
    for (prefix, auto), whole in sorted(found.items(), key=lambda item: natural(item[0][0])):
        if auto:
            up, down = (whole.get(f"{prefix}experts.{kind}") for kind in ("gate_up_proj", "down_proj"))
            if not up or not down or up != (down[0], 2 * down[2], down[1]):
                continue  # no block that AutoEP would replace
            kept.append(Block(prefix, True, up[0], whole))
        else:
            numbers = {int(match[2]) for name in whole if (match := _NUMBERED.fullmatch(name))}
            kept.append(Block(prefix, False, max(numbers) + 1, whole))
    return kept


def renamer(names: Sequence[str], prefixes: Sequence[str], *, back: bool = False) -> Callable[[str], str]:
    """A model's name -> AutoEP's, of all but experts; back: the other way. prefixes: of AutoEP's blocks; names: all
    names of the side that is given (Qwen's shared expert, which has a gate, is ``shared_expert``; others' are not)."""
    gate = "shared_experts_gate." if back else "shared_expert_gate."
    pairs: list[tuple[str, str]] = []
    for prefix in prefixes:
        pairs.append((f"{prefix}gate.e_score", f"{prefix}router.e_score"))
        pairs.append((f"{prefix}gate.", f"{prefix}router.gate."))
        if any(name.startswith(prefix + gate) for name in names):
            pairs += [(f"{prefix}shared_expert{s}.", f"{prefix}shared_experts{s}.") for s in ("", "_gate")]
    if back:
        pairs = [(b, a) for a, b in pairs]

    def rename(name: str) -> str:
        for before, after in pairs:
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name

    return rename


def is_local(name: str) -> bool:
    """Whether an engine's tensor is of experts."""
    return bool(_LOCAL.fullmatch(name) or _NUMBERED.fullmatch(name))


def is_numbered(name: str) -> bool:
    """Whether a tensor is of one expert of a deepspeed.moe.layer.MoE."""
    return bool(_NUMBERED.fullmatch(name))


def is_expert(name: str) -> bool:
    """Whether a model's tensor is of experts."""
    return bool(_FUSED.fullmatch(name) or _NUMBERED.fullmatch(name))


def number(name: str) -> int:
    """Of the expert that a tensor is of; 0 where it is of all."""
    match = _NUMBERED.fullmatch(name)
    return int(match[2]) if match else 0


def router_of(name: str) -> str:
    """What the names of the router of an expert's layer begin with."""
    if match := _NUMBERED.fullmatch(name):
        return match[1].removesuffix("experts.deepspeed_experts.") + "gate."
    found = _FUSED.fullmatch(name)
    return f"{found[1]}gate." if found else name


def local_counts(names: Sequence[str]) -> dict[str, int]:
    """Experts that a rank holds of each of deepspeed.moe's layers: prefix -> number, from the rank's names."""
    found: dict[str, int] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _global(match: re.Match[str], held: Mapping[str, int], rank: int) -> str:
    return f"{match[1]}{rank * held[match[1]] + int(match[2])}{match[3]}"


def parts(name: str, shape: Shape, rank: int, held: Mapping[str, int]) -> list[Part]:
    """Where the elements of a tensor of experts, as expert-parallel rank ``rank`` has it, lie in whole ones.
    held: `local_counts` of the rank's names. Raises ValueError for a tensor of no experts."""
    if match := _NUMBERED.fullmatch(name):
        return [Part(_global(match, held, rank), 0, 0, prod(shape))]
    if not (match := _LOCAL.fullmatch(name)):
        raise ValueError(f"{name} holds no experts")
    kind, of, place = _PLACE[match[2]]
    whole, mine, each = f"{match[1]}experts.{kind}", shape[0], prod(shape[1:])
    if of == 1:
        return [Part(whole, rank * mine * each, 0, mine * each)]
    return [Part(whole, ((rank * mine + e) * of + place) * each, e * each, each) for e in range(mine)]


def whole_shapes(name: str, shape: Shape, size: int, held: Mapping[str, int]) -> dict[str, Shape]:
    """The whole tensors, with their shapes, that a rank's tensor of experts is a part of. As `parts`."""
    if match := _NUMBERED.fullmatch(name):
        return {_global(match, held, rank): shape for rank in range(size)}
    if not (match := _LOCAL.fullmatch(name)):
        raise ValueError(f"{name} holds no experts")
    kind, of, _ = _PLACE[match[2]]
    return {f"{match[1]}experts.{kind}": (size * shape[0], of * shape[1], shape[2])}


def in_file(key: str, shape: Shape) -> tuple[str, int, int, Shape] | None:
    """Of an entry of a file of one expert: the whole tensor, flat index of the entry's first element there, the expert,
    and the shape of one expert's share of the whole tensor. None: it is no such entry."""
    if match := _NUMBERED.fullmatch(key):
        return key, 0, int(match[2]), shape
    before, _, number = key.rpartition(".")
    match = _LOCAL.fullmatch(before)
    if not match or not number.isdigit() or len(shape) != 2:
        return None
    kind, of, place = _PLACE[match[2]]
    start = (int(number) * of + place) * prod(shape)
    return f"{match[1]}experts.{kind}", start, int(number), (of * shape[0], shape[1])


def of_expert(block: Block, expert: int) -> dict[str, tuple[str, Shape, int]]:
    """The entries of the file of one expert: key -> whole tensor, the entry's shape, its first flat index there."""
    found = {}
    for name, shape in block.whole.items():
        if not block.auto:
            if (match := _NUMBERED.fullmatch(name)) and int(match[2]) == expert:
                found[name] = (name, shape, 0)
            continue
        for kind, (whole, of, place) in _PLACE.items():
            if name == f"{block.prefix}experts.{whole}":
                each = (shape[1] // of, shape[2])
                found[f"{block.prefix}experts.{kind}.{expert}"] = (name, each, (expert * of + place) * prod(each))
    return dict(sorted(found.items()))


def spread(pieces: Sequence[Piece], held: Sequence[Sequence[Part]]) -> Iterator[tuple[str, int, int, int]]:
    """A rank's pieces (of its own tensors; ``held``: the `Part`s of each) as (whole tensor, start, stop, at)."""
    for param, start, stop, at in pieces:
        for name, first, own, numel in held[param]:
            low, high = max(start, own), min(stop, own + numel)
            if low < high:
                yield name, first + low - own, first + high - own, at + low - start


def cut(
    groups: Sequence[Sequence[str]], shapes: Mapping[str, Shape], size: int, last: bool, most: int = MAX_GROUP
) -> list[Cut]:
    """An expert-parallel engine's optimizer groups, in order, from those of the model (names of whole tensors).

    last: see `ExpertParallel`; most: elements of a rank in a group of experts, at most.
    """
    found = blocks(shapes)
    owner = {name: block for block in found for name in block.whole}
    auto = tuple(block.prefix for block in found if block.auto)
    rename = renamer(list(shapes), auto)
    routers = tuple(f"{prefix}gate." for prefix in auto)
    dense, experts = [], []
    for index, names in enumerate(groups):
        kept = [name for name in names if name not in owner]
        if last and routers:
            kept.sort(key=lambda name: name.startswith(routers))  # stable
        if kept:
            dense.append(Cut(index, False, {rename(name): shapes[name] for name in kept}))
        local: dict[str, Shape] = {}
        for block in dict.fromkeys(owner[name].prefix for name in names if name in owner):
            local |= _local(next(b for b in found if b.prefix == block), set(names), size)
        experts += [Cut(index, True, chunk) for chunk in _chunks(local, most)]
    return dense + experts


def cuts_of(groups: Sequence[Sequence[str]], shapes: Mapping[str, Shape], size: int | None) -> list[Cut]:
    """The optimizer groups of an engine that was given ``groups`` in lists. size: ranks that share the experts of an
    AutoEP engine; None: of another, which takes the groups as they are."""
    if size is None:
        return [Cut(i, False, {name: shapes[name] for name in names}) for i, names in enumerate(groups)]
    return cut(groups, shapes, size, last=True)


def _local(block: Block, names: set[str], size: int) -> dict[str, Shape]:
    """What a rank has of a block's tensors among ``names``, in the engine's order."""
    held = block.experts // size
    if not block.auto:
        mine = [name for name in block.whole if name in names and number(name) < held]
        return {name: block.whole[name] for name in sorted(mine, key=number)}
    found: dict[str, Shape] = {}
    for kind in ("w1", "w2", "w3"):
        whole, of, _ = _PLACE[kind]
        if (name := f"{block.prefix}experts.{whole}") in names:
            _, rows, columns = block.whole[name]
            found[f"{block.prefix}experts.{kind}"] = (held, rows // of, columns)
    return found


def _chunks(shapes: dict[str, Shape], most: int) -> Iterator[dict[str, Shape]]:
    held: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if held and sum(map(prod, held.values())) + prod(shape) > most:
            yield held
            held = {}
        held[name] = shape
    if held:
        yield held


def ranks_of(size: int, rank: int, world: int, data_first: bool = False) -> tuple[int, ...]:
    """The ranks that hold the experts of expert-parallel rank ``rank``, in their order. data_first: DeepSpeed's
    use_data_before_expert_parallelism."""
    each = world // size
    return tuple(range(rank * each, (rank + 1) * each) if data_first else range(rank, world, size))
