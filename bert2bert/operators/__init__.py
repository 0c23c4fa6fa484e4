"""Growth operators by name, and the reading of ``NAME[:key=value,…]`` from a command line."""

from __future__ import annotations

from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.operators.depth import DEPTHS
from bert2bert.operators.width import CHOICES, WIDTHS

BREAKERS = ("noise", "uneven", "fresh-moments")

_OPTIONS = {"fpi": ("choice",), "aki": ("choice",)}
_BREAKER_OPTIONS = {"noise": ("scale",)}


def parse_operator(text: str, kind: str) -> tuple[str, dict[str, str]]:
    """Split ``fpi:choice=left`` into its name and options, and check both. ``kind``: 'width' | 'depth' | 'breaker'.

    Raises UnsupportedGrowth for an unknown operator and InvalidConfig for an unknown option, with the nearest names.
    """
    known = {"width": tuple(WIDTHS), "depth": tuple(DEPTHS), "breaker": BREAKERS}[kind]
    name, _, rest = text.partition(":")
    flag = "--break-symmetry" if kind == "breaker" else f"--{kind}"
    if name not in known:
        raise UnsupportedGrowth(f"{flag} {name!r}: unknown operator; {did_you_mean(name, known)}")
    allowed = (_BREAKER_OPTIONS if kind == "breaker" else _OPTIONS).get(name, ())
    options = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in allowed or not equals:
            hint = did_you_mean(key, allowed) if allowed else f"{name} takes no options"
            raise InvalidConfig(f"{flag} {text}: option {item!r} is not of the form key=value with a known key; {hint}")
        options[key] = value
    if (choice := options.get("choice")) is not None and choice not in CHOICES:
        raise InvalidConfig(f"{flag} {text}: choice is {choice!r}; {did_you_mean(choice, CHOICES)}")
    if (scale := options.get("scale")) is not None:
        try:
            good = float(scale) > 0
        except ValueError:
            good = False
        if not good:
            raise InvalidConfig(f"{flag} {text}: scale is {scale!r}; a positive number is expected")
    return name, options
