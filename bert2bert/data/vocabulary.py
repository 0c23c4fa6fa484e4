"""What a tokenizer offers to an objective: how many ids there are, and the ids of its special tokens by role.

Roles are transformers' names without ``_token``. A role that the tokenizer lacks is absent, never invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of some token bins.

    size: ids are 0 to size - 1. special: role -> id. sentinels: ids of ``<extra_id_0>``, ``<extra_id_1>``, … (T5),
    without a gap. add_bos: whether the tokenizer puts its bos token before a text. where: whose it is, for messages.
    """

    size: int
    special: Mapping[str, int]
    sentinels: tuple[int, ...] = ()
    add_bos: bool = False
    where: str = "this tokenizer"

    def to_json(self) -> dict[str, Any]:
        """What meta.json of token bins records of it, beside its size."""
        return {"special": dict(self.special), "sentinels": list(self.sentinels), "add_bos": self.add_bos}

    @property
    def filler(self) -> int:
        """Id for slots that nothing reads: the padding token, or else any special token."""
        return self.special.get("pad", next(iter(self.special.values()), 0))

    @property
    def all_special(self) -> list[int]:
        """Ids of all special tokens, sentinels included."""
        return sorted({*self.special.values(), *self.sentinels})
