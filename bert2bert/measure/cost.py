"""What a growth costs: bytes, seconds and memory of the ranks that carry it out, and the FLOPs of what it makes.

Refuses (`InvalidConfig`) a bandwidth that is not two positive numbers, and less than one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from bert2bert.algebra.draws import drawn
from bert2bert.checkpoints.commit.threads import files_at_once
from bert2bert.checkpoints.job import BLOCK
from bert2bert.checkpoints.write import deal
from bert2bert.errors import InvalidConfig
from bert2bert.model.registry import objective_of
from bert2bert.tables import table_for
from bert2bert.tables.flops import Flops, Work

if TYPE_CHECKING:
    from bert2bert.growth.opened import Growth

_BLOCKS = 8  # of rows that a thread holds at a time: values, their source, the file being written
_STRUCTURE = 200_000_000  # bytes of names, shapes, file structure and allocator slack, measured by benchmarks/growth.py
_DRAW = 3e-8  # seconds that one core takes for a random number and its place, measured (see docs/benchmarks.md)
_LONGEST = 2048  # tokens of a row; a model of longer contexts is rarely pre-trained on longer ones


@dataclass(frozen=True)
class Cost:
    """What the rank with the most to do takes."""

    ranks: int
    """Processes that share the work."""
    disk_gb_per_s: tuple[float, float]
    """At which one rank reads and writes: taken as given, not measured."""
    bytes_read: int
    bytes_written: int
    numbers_drawn: int
    """Random numbers."""
    seconds: float
    """Of its disk, and of one core to draw the random numbers."""
    memory: int
    """Anonymous memory beyond the imported program, in bytes."""

    def as_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        return {**vars(self), "disk_gb_per_s": list(self.disk_gb_per_s)}

    def line(self) -> str:
        """In one line, for a terminal."""
        read, write = self.disk_gb_per_s
        drawing = self.numbers_drawn * _DRAW
        noise = f" ({drawing:.3g} s of them to draw random numbers)" if drawing > 0.1 * self.seconds else ""
        return (
            f"cost     {self.ranks} rank{'s' * (self.ranks > 1)} at {read:g} GB/s read, {write:g} GB/s written "
            f"(each): about {self.seconds:.3g} s{noise}, at most {self.bytes_read / 1e9:.3g} GB read, "
            f"{self.bytes_written / 1e9:.3g} GB written and {self.memory / 1e9:.2g} GB of memory a rank"
        )


def bandwidth(text: str) -> tuple[float, float]:
    """``READ,WRITE`` in GB/s. Raises InvalidConfig."""
    try:
        read, write = (float(part) for part in text.split(","))
    except ValueError:
        read = write = 0.0
    _check_bandwidth((read, write), text)
    return read, write


def _check_bandwidth(disk: tuple[float, float], given: object) -> None:
    if not 0 < min(disk) <= max(disk) < float("inf"):
        raise InvalidConfig(f"--disk-bandwidth is {given!r}; expected READ,WRITE in GB/s for one rank, such as 2,1")


def cost(growth: Growth, ranks: int, disk: tuple[float, float]) -> Cost:
    """What carrying out a growth takes. disk: GB/s that one rank reads and writes at.

    As a universal checkpoint is dealt out; reading is taken to be spread alike, each source byte read once. Memory: the
    plan's index lists, the structure of the files, and a few blocks of rows; more where an entry mixes a whole tensor.
    Raises InvalidConfig for less than one rank, and a bandwidth that is not two positive numbers.
    """
    _check_bandwidth(disk, disk)
    if ranks < 1:
        raise InvalidConfig(f"--ranks is {ranks}; expected at least 1, the number of processes that share the work")
    model, plan = growth.model, growth.plan
    states = len(model.source.states)
    sizes = [4 * prod(t.shape) for t in plan.tensors.values() for _ in range(states)]
    written = max(sum(sizes[i] for i in hand) for hand in deal(sizes, ranks))
    source = 4 * states * sum(prod(p.shape) for p in model.parameters.values())
    read = source * written // sum(sizes)
    made = [t for p in (plan, *plan.before) for t in p.tensors.values()]
    shapes = {name: p.shape for name, p in model.parameters.items()}
    shapes |= {name: t.shape for p in plan.before for name, t in p.tensors.items()}
    mixed = [4 * prod(shapes.get(s, ())) for t in made if t.mixes for s in t.sources]
    block = max(4 * BLOCK, *(4 * prod(t.shape[1:]) for t in plan.tensors.values()))
    arrays = {
        id(a): a.nbytes
        for t in made
        for term in t.terms
        for d in term.dims
        for a in (d.index, d.param, d.grad, d.mix)
        if a is not None
    }
    random = sum(map(drawn, made)) * written // sum(sizes)
    return Cost(
        ranks=ranks,
        disk_gb_per_s=disk,
        bytes_read=read,
        bytes_written=written,
        numbers_drawn=random,
        seconds=read / disk[0] / 1e9 + written / disk[1] / 1e9 + random * _DRAW,
        memory=files_at_once(block) * (_BLOCKS * block + 2 * max(mixed, default=0)) + _STRUCTURE + sum(arrays.values()),
    )


def row_length(config: Mapping[str, Any]) -> int:
    """Tokens of the rows for which `flops_per_token` counts: as many as the model has positions, at most 2,048."""
    return min(table_for(config).positions(config) or _LONGEST, _LONGEST)


def flops_per_token(config: Mapping[str, Any], heads: frozenset[str]) -> float:
    """Forward FLOPs of one token in full rows (see `row_length`), 15 % of them through a masked-LM head, all through a
    causal one; of an encoder-decoder, of a token read and one written."""
    length = row_length(config)
    masked = objective_of(config) == "masked"
    written = (length,) if "decoder" in heads else ()
    work = Work((length,), round(0.15 * length) if masked else length, written)
    return Flops(config, heads).forward(work) / length
