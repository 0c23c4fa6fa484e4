"""A model's parameters read from wherever they lie, a few rows at a time, for checking a checkpoint of any size.

Nothing holds a vocabulary: an embedding reads the rows of the tokens that are looked up. `measure.streamed` runs a
model with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bert2bert.errors import InvalidCheckpoint

Rows = Callable[[str, int, int], Tensor]
"""(name, first row, one past the last) -> those rows of dim 0 of a parameter."""

BLOCK = 1 << 20  # elements read at a time


@dataclass(frozen=True)
class Weights:
    """A model's parameters by name, read when they are asked for and given in one dtype. shapes: of all of them.

    Raises InvalidCheckpoint for rows of another shape; whatever ``rows`` raises goes through.
    """

    rows: Rows
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0."""
        found, expected = self.rows(name, start, stop), (stop - start, *self.shapes[name][1:])
        if found.shape != expected:
            raise InvalidCheckpoint(
                f"weights for the model: rows {start} to {stop} of {name} have shape {tuple(found.shape)}, expected "
                f"{expected}; does the config describe these weights?"
            )
        return found.to(self.dtype)

    def blocks(self, name: str, across: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows of a block; across: how many numbers are made of each row, if more than it has."""
        count, width = self.shapes[name][0], max(prod(self.shapes[name][1:]), across)
        for start in range(0, count, step := max(1, BLOCK // width)):
            yield start, min(count, start + step)

    def whole(self, name: str) -> Tensor:
        """A parameter."""
        out = torch.empty(self.shapes[name], dtype=self.dtype)
        for start, stop in self.blocks(name):
            out[start:stop] = self.read(name, start, stop)
        return out

    def pick(self, name: str, index: Tensor) -> Tensor:
        """Those rows of dim 0, in that order (an embedding's)."""
        flat = index.flatten()
        out = torch.empty((len(flat), *self.shapes[name][1:]), dtype=self.dtype)
        for start, stop in self.blocks(name):
            at = ((flat >= start) & (flat < stop)).nonzero()[:, 0]
            if len(at):
                out[at] = self.read(name, start, stop)[flat[at] - start]
        return out.view(*index.shape, *out.shape[1:])
