"""Whether stored values are the expected ones, to the bit, and which of them a narrower dtype rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from bert2bert.files.torch_writer import bits
from bert2bert.measure.checks import Check

Blocks = Iterable[tuple[Tensor, Tensor]]
"""(expected, found) values, block by block."""


class Comparison:
    """Tensors compared one by one. ``wrong``: those that differ; ``rounded``: dtype -> how many hold the expected
    values rounded to it."""

    def __init__(self) -> None:
        self.count, self.wrong, self.rounded = 0, list[str](), Counter[str]()

    def add(self, name: str, blocks: Blocks) -> None:
        """Compare one tensor."""
        self.count += 1
        rounded = ""
        for expected, found in blocks:
            stored = expected.to(found.dtype)
            if not bits(stored, found):
                self.wrong.append(name)
                return
            if not bits(stored.to(expected.dtype), expected):
                rounded = str(found.dtype).removeprefix("torch.")
        if rounded:
            self.rounded[rounded] += 1

    def report(self, what: str, check: Check) -> None:
        """As a check: what differs, or how many tensors are equal and how many are rounded."""
        if self.wrong:
            check(what, False, f"{len(self.wrong)} differ, first {self.wrong[0]}")
            return
        notes = [f", {n} of them rounded to {dtype}, which is all that is stored" for dtype, n in self.rounded.items()]
        check(what, True, f"{self.count} tensors, bit for bit" + "".join(notes))
