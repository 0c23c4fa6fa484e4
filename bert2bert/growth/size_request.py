"""What is asked for of a model's sizes: ``2x`` of the source's, ``768``, ``500M`` parameters. Imports no torch.

Refuses (`InvalidConfig`) what is not a positive number, no request at all, and requests that leave nothing to choose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from bert2bert.errors import InvalidConfig

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)([xkKmMbB]?)")
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Amount:
    """A size that is asked for: so many times the source's, or a number."""

    option: str
    text: str
    times: float | None
    number: float

    @classmethod
    def parse(cls, option: str, text: str) -> Amount:
        """From ``2x``, ``768``; of parameters ``500M``, ``1.3B`` too. Raises InvalidConfig."""
        found = _AMOUNT.fullmatch(text.strip())
        value, unit = (float(found[1]), found[2].lower()) if found else (0.0, "")
        whole = unit == "x" or option == "--params" or (unit == "" and value == int(value))
        if not value or not whole:
            what = "2x, 500M or 1.3B" if option == "--params" else "2x (times the source's) or a whole number"
            raise InvalidConfig(f"{option} is {text!r}; expected {what}")
        if unit == "x":
            return cls(option, text, value, 0.0)
        return cls(option, text, None, value * _THOUSANDS[unit])

    def of(self, old: float) -> float:
        """The size that is asked for, in place of the source's."""
        return old * self.times if self.times is not None else self.number


@dataclass(frozen=True)
class SizeRequest:
    """What is asked for; None: as it follows from the rest."""

    width: Amount | None = None
    depth: Amount | None = None
    ffn: Amount | None = None
    params: Amount | None = None
    heads: Amount | None = None
    kv_heads: Amount | None = None
    experts: Amount | None = None
    vocab: Amount | None = None

    @classmethod
    def parse(cls, **texts: str | None) -> SizeRequest:
        """From the options' texts. Raises InvalidConfig, also where nothing is asked for, or too much."""
        given = {f.name: text for f in fields(cls) if (text := texts.get(f.name)) is not None}
        if not given:
            options = ", ".join("--" + f.name.replace("_", "-") for f in fields(cls))
            raise InvalidConfig(f"no size is given; expected at least one of {options}")
        if {"params", "width", "depth"} <= given.keys():
            raise InvalidConfig("--params with --width and --depth leaves nothing to choose; leave one of them out")
        return cls(**{name: Amount.parse("--" + name.replace("_", "-"), text) for name, text in given.items()})
