"""Parts of a recipe: where its rows come from, and its optimizer. Imports no torch.

Refuses (`InvalidConfig`) values out of range, and the LAMB optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from bert2bert.errors import InvalidConfig
from bert2bert.recipe.checks import in_range as _in_range
from bert2bert.recipe.checks import require as _require


@dataclass(frozen=True)
class Data:
    """Token bins (a folder that `bert2bert prepare` wrote) and how rows are cut from them.

    ``seq_len``: token slots of a row; ``eval_rows``: held-out rows of one evaluation (fewer when the split has fewer).
    """

    bins: str
    seq_len: int
    eval_rows: int = 256

    def __post_init__(self) -> None:
        _require(bool(self.bins), "data.bins", self.bins, "the folder that `bert2bert prepare` wrote")
        _in_range("data.seq_len", self.seq_len, 8)
        _in_range("data.eval_rows", self.eval_rows, 1)


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay Adam; biases and norms do not decay. ``lr`` is the peak of phases that name none."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    name: str = "adamw"

    def __post_init__(self) -> None:
        if "lamb" in self.name.lower():
            raise InvalidConfig(
                f"optimizer.name is {self.name!r}; expected 'adamw'. LAMB scales every layer by the norms of its "
                "weights and of its update; a flat ZeRO partition holds pieces of layers, so those norms would be wrong"
            )
        _require(
            self.name == "adamw", "optimizer.name", self.name, "'adamw', the one optimizer whose state can be grown"
        )
        _in_range("optimizer.lr", self.lr, 0, open_low=True)
        for i, beta in enumerate(self.betas):
            _require(0 <= beta < 1, f"optimizer.betas.{i}", beta, "a number in [0, 1)")
        _in_range("optimizer.eps", self.eps, 0, open_low=True)
        _in_range("optimizer.weight_decay", self.weight_decay, 0)
