"""Rotary positions (Su et al. 2021) over flat tokens: every type that the installed transformers can initialise.

The frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`), in float32; angles are made in float32, or in float64 for
a float64 model. Types that depend on the length of a row ("dynamic", "longrope") take the length given, which is the
row's bound and not the longest document in it, so that packing changes nothing.

Refuses (`InvalidConfig`): a rope type that transformers does not know, and heads of which only some features turn, as
the models that have a core here turn whole heads.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.model.core import Rotary


class Frequencies:
    """The rotary frequencies of a config; no module, so that no cast of a model's dtype reaches them.

    settings: transformers' config object. kind: the kind of layer whose frequencies are meant, where the config's
    ``rope_parameters`` are nested by kind.
    """

    def __init__(self, settings: Any, kind: str | None = None) -> None:
        self.settings, self.kind = settings, kind
        found = settings.rope_parameters
        self.parameters: dict[str, Any] = found if kind is None else found[kind]
        self.type = str(self.parameters["rope_type"])
        if self.type != "default" and self.type not in ROPE_INIT_FUNCTIONS:
            known = ("default", *ROPE_INIT_FUNCTIONS)
            raise InvalidConfig(f"model config: rope_type is {self.type!r}; {did_you_mean(self.type, known)}")
        part = self.parameters.get("partial_rotary_factor")
        if part not in (None, 1) and self.type != "proportional":
            raise InvalidConfig(
                f"model config: partial_rotary_factor is {part!r}; a {settings.model_type} turns whole heads in "
                "transformers: leave it out, or set rope_type to 'proportional'"
            )
        self._of = functools.cache(self._made)

    def table(self, positions: Tensor, length: int, dtype: torch.dtype) -> Rotary:
        """Cosines and sines at int64 positions [T], in ``dtype``. length: of a row, the bound of all documents."""
        frequencies, scale = self._of(self._length(length), positions.device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[:, None].to(wide) * frequencies.to(wide)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _length(self, length: int) -> int | None:
        """What the frequencies depend on: the row's length past the original context, else nothing."""
        if self.type not in ("dynamic", "longrope"):
            return None
        own = self.parameters.get("original_max_position_embeddings") or self.settings.max_position_embeddings
        return length if length > own else None

    def _made(self, length: int | None, device: torch.device) -> tuple[Tensor, float]:
        if self.type != "default":
            where = {} if self.kind is None else {"layer_type": self.kind}
            found, scale = ROPE_INIT_FUNCTIONS[self.type](self.settings, device, seq_len=length, **where)
            return found, scale
        settings = self.settings
        size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / (self.parameters["rope_theta"] ** steps), 1.0


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads of x, [T, heads, d]; in its dtype, though under autocast the tables are wider."""
    cosines, sines = (table[:, None] for table in rotary)
    low, high = x.chunk(2, dim=-1)
    return (x * cosines + torch.cat((-high, low), dim=-1) * sines).to(x.dtype)
