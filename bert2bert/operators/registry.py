"""The operators by kind and name, what each promises, and the parser of ``NAME[:key=value,…]``.

An operator is a function with its options as keyword arguments; its docstring is the formula that the command
``operators NAME`` prints. Text is parsed once, where it comes in (a command line, a recipe, a step in Python); from
there on an operator with its options is a `Chosen`. Refuses unknown operators (`UnsupportedGrowth`), unknown options
and values (`InvalidConfig`).
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.operators.evidence import EVIDENCE

FLAGS = {
    "width": "--width",
    "depth": "--depth",
    "vocab": "--vocab",
    "positions": "--positions",
    "experts": "--experts",
    "embeddings": "--embeddings",
    "breaker": "--break-symmetry",
}
REFUSED = {
    (
        "width",
        "mango",
    ): "its tensor-ring map mixes weights of all modules and layers with one another, and such a map is "
    "no growth of named axes; the nearest is ligo, which learns the mixtures of features and those of layers",
}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One growth operator."""

    kind: str
    name: str
    paper: str
    keeps: str
    """What of the function it preserves."""
    needs: str
    """On which models."""
    moments: str
    """Its policy: 'exact', 'carried', 'reset' or 'asymmetric'."""
    make: Callable[..., Any]
    copies: bool = False
    """Whether it makes copies, so that a symmetry can be broken."""
    head_size: bool = False
    """Whether it can grow the size of a head."""
    shrinks: bool = False
    """Whether it makes a model smaller: ``make`` then takes the options alone and names the growth that it inverts."""

    @property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Option -> (type, default; None: it must be given), from the function's keyword-only arguments."""
        types = typing.get_type_hints(self.make)
        found = [p for p in inspect.signature(self.make).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return {p.name: (types[p.name], None if p.default is p.empty else p.default) for p in found}

    @property
    def formula(self) -> str:
        """The operator's own description."""
        return inspect.getdoc(self.make) or ""

    @property
    def evidence(self) -> str:
        """What has been measured for it, and by whom; 'none' if nothing was."""
        return EVIDENCE.get((self.kind, self.name), "none")


OPERATORS: dict[str, dict[str, Operator]] = {kind: {} for kind in FLAGS}


def operator(
    kind: str,
    name: str,
    *,
    paper: str,
    keeps: str,
    needs: str = "any model",
    moments: str = "exact",
    copies: bool = False,
    head_size: bool = False,
    shrinks: bool = False,
) -> Callable[[F], F]:
    """Register the function below as an operator."""

    def add(make: F) -> F:
        OPERATORS[kind][name] = Operator(kind, name, paper, keeps, needs, moments, make, copies, head_size, shrinks)
        return make

    return add


@dataclass(frozen=True)
class Chosen:
    """An operator and its options, checked and converted."""

    operator: Operator
    options: Mapping[str, Any]
    text: str
    """As it was written, which is how a recipe stores it: ``fpi:choice=left``."""

    def __str__(self) -> str:
        return self.text

    @property
    def flag(self) -> str:
        """The option of the command line and its value, for messages."""
        return f"{FLAGS[self.operator.kind]} {self.text}"

    def make(self, *given: Any) -> Any:
        """What the operator decides for what it is given. Raises UnsupportedGrowth, InvalidConfig."""
        return self.operator.make(*given, **self.options)


def parse_operator(text: str, kind: str) -> Chosen:
    """The operator of ``fpi:choice=left``, with its options checked and converted.

    Raises UnsupportedGrowth for an unknown operator and InvalidConfig for an unknown option, with the nearest names.
    """
    known, flag = OPERATORS[kind], FLAGS[kind]
    name, _, rest = text.partition(":")
    if (kind, name) in REFUSED:
        raise UnsupportedGrowth(f"{flag} {name}: {REFUSED[kind, name]}")
    if name not in known:
        raise UnsupportedGrowth(f"{flag} {name!r}: unknown operator; {did_you_mean(name, known)}")
    allowed = known[name].options
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in allowed or not equals:
            hint = did_you_mean(key, allowed) if allowed else f"{name} takes no options"
            hint = f"give {key} a value" if key in allowed else hint
            raise InvalidConfig(f"{flag} {text}: option {item!r} is not of the form key=value with a known key; {hint}")
        if key in options:
            raise InvalidConfig(f"{flag} {text}: the option {key} is there twice; leave one of them out")
        options[key] = _convert(f"{flag} {text}: {key}", value, allowed[key][0])
    for key, (_, default) in allowed.items():
        if default is None and key not in options:
            raise InvalidConfig(f"{flag} {text}: {key} is not given, and has no default; write {name}:{key}=…")
    return Chosen(known[name], options, text)


def _convert(what: str, value: str, kind: Any) -> Any:
    if choices := typing.get_args(kind):
        if value not in choices:
            raise InvalidConfig(f"{what} is {value!r}; {did_you_mean(value, choices)}")
        return value
    if kind is str:
        return value
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        noun = "number" if kind is float else "whole number"
        raise InvalidConfig(f"{what} is {value!r}; a positive {noun} is expected")
    return number
