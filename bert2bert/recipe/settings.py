"""Typed settings: frozen dataclasses from plain values, and dotted overrides of single values. Knows no recipe.

Types understood: int, float, str, bool, ``X | None``, dataclasses, unions of dataclasses told apart by their ``kind``
(``Annotated[union, more]``: or by the kinds of the dict ``more``), lists and tuples of one type, ``Any`` for what is
taken as it is, and ``Annotated[dict, keys]`` for a dict with closed keys: {key: type}, or a function that gives them
for a value. Refused, as `InvalidConfig` naming the value by its dotted name: unknown keys (with the nearest known
ones), values of another type.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_origin, get_type_hints

from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.recipe.checks import require

_SCALARS = (int, float, str, bool)


def build(tp: Any, value: Any, where: str = "", renamed: Mapping[str, str] = MappingProxyType({})) -> Any:
    """``value`` (dicts, lists, scalars) as an instance of the declared type ``tp``; ``where`` is its dotted name;
    ``renamed``: old dotted names, which are refused, and the new ones."""
    tp, optional = _strip(tp, value, where)
    if tp is Any or (value is None and optional):
        return value
    if is_dataclass(tp) and isinstance(tp, type):
        known = _known(tp)
        fixed = {f.name for f in fields(tp) if not f.init}
        require(isinstance(value, dict), where or tp.__name__, value, f"a dict of {', '.join(known)}")
        given = {key: inner for key, inner in value.items() if key not in fixed}
        for key in given:
            if key not in known:
                raise InvalidConfig(f"unknown key {_join(where, key)!r}: {_near(_join(where, key), known, renamed)}")
        try:
            return tp(**{key: build(known[key], inner, _join(where, key), renamed) for key, inner in given.items()})
        except TypeError as error:  # a required key is absent
            raise InvalidConfig(f"{where or tp.__name__}: {error}") from error
    if get_origin(tp) in (tuple, list):
        inner = get_args(tp)
        require(isinstance(value, list | tuple), where, value, "a list")
        if len(inner) > 1 and inner[-1] is not Ellipsis:
            require(len(value) == len(inner), where, value, f"{len(inner)} values")
        return get_origin(tp)(build(inner[0], item, f"{where}.{i}", renamed) for i, item in enumerate(value))
    if get_origin(tp) is typing.Annotated:
        require(isinstance(value, dict), where, value, "a dict")
        known = _keys(tp, value)
        for key in value:
            if key not in known:
                raise InvalidConfig(f"unknown key {_join(where, key)!r}: {_near(key, known)}")
        return {key: build(known[key], item, _join(where, key)) for key, item in value.items()}
    right = isinstance(value, tp) or (tp is float and isinstance(value, int))
    require(right and (tp is bool or not isinstance(value, bool)), where, value, f"a value of type {tp.__name__}")
    return float(value) if tp is float else value


def assign(tp: Any, tree: Any, override: str, renamed: Mapping[str, str] = MappingProxyType({})) -> None:
    """Set one value of the plain ``tree`` (declared type ``tp``) from the text ``key.sub.0=value``, in place."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InvalidConfig(f"override {override!r}: expected KEY=VALUE, such as phases.0.steps=10")
    node: Any = tree
    slot: Any = None
    root = tp, tree
    for key in path.split("."):
        known = _parts(tp, tree, path)
        if key not in known:
            near = known and path not in renamed and _nearest(path, *root)
            if slot and tree is None:
                near = f"{slot!r} is none, and only the recipe's file can say which it is"
            raise InvalidConfig(f"unknown key {path!r}: {near or _near(path, known, renamed)}")
        node, slot, tp = tree, int(key) if isinstance(tree, list) else key, known[key]
        tree = node[slot] if isinstance(node, list) else node.get(slot)
    if parts := _parts(tp, tree, path):
        raise InvalidConfig(f"{path!r} is no single value; its parts: {', '.join(parts)}")
    leaf, optional = _strip(tp, tree, path)
    node[slot] = None if optional and text.lower() == "none" else _parse(leaf, text, path)


def _parts(tp: Any, value: Any, where: str) -> dict[str, Any]:
    """The keys below a plain ``value`` of type ``tp`` and their types; none for a single value."""
    tp, _ = _strip(tp, value, where)
    if is_dataclass(tp):
        return _known(tp)
    if get_origin(tp) is typing.Annotated:
        return _keys(tp, value)
    return {str(i): get_args(tp)[0] for i in range(len(value or ()))} if get_origin(tp) in (tuple, list) else {}


def _leaves(tp: Any, value: Any, where: str = "") -> list[str]:
    """The dotted names of all single values of a plain tree of type ``tp``."""
    parts = _parts(tp, value, where)
    if not parts:
        return [where]
    inner = {key: value[int(key)] if isinstance(value, list) else (value or {}).get(key) for key in parts}
    return [name for key, part in parts.items() for name in _leaves(part, inner[key], _join(where, key))]


def _nearest(path: str, tp: Any, tree: Any) -> str | None:
    """The closing clause for a wrong dotted name: names of the whole tree that end alike, then those that have its last
    part somewhere, then the nearest in spelling; None if there are none."""
    names = _leaves(tp, tree)
    last = _last(path)
    alike = [name for name in names if f".{name}".endswith(f".{path}")]
    alike = alike or [name for name in names if _last(name) == last]
    top = min((name.count(".") for name in alike), default=0)
    alike = [name for name in alike if name.count(".") == top]  # the most general setting of that name
    alike = alike or [name for name in names if last in name.split(".") or (len(last) > 3 and last in _last(name))]
    if not alike and (near := difflib.get_close_matches(last, {_last(n) for n in names}, n=1, cutoff=0.8)):
        alike = [name for name in names if _last(name) == near[0]]
    alike = alike or difflib.get_close_matches(path, names, n=3)
    alike = [name for name in alike if "." not in name] or alike if "." not in path else alike
    alike.sort(key=lambda name: -difflib.SequenceMatcher(None, path, name).ratio())  # else in the tree's order
    return f"did you mean {' or '.join(map(repr, alike[:3]))}?" if alike else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _strip(tp: Any, value: Any, where: str) -> tuple[Any, bool]:
    """(the type without `| None` and with the right member of a union of dataclasses, whether None is allowed)."""
    more: Mapping[str, Any] = {}
    if get_origin(tp) is typing.Annotated and get_origin(get_args(tp)[0]) in (typing.Union, types.UnionType):
        tp, more = get_args(tp)
    if get_origin(tp) not in (typing.Union, types.UnionType):
        return tp, False
    options = [option for option in get_args(tp) if option is not type(None)]
    optional = len(options) < len(get_args(tp))
    if len(options) == 1:
        return options[0], True
    if value is None and optional:
        return type(None), True
    kinds = {str(next(f.default for f in fields(option) if f.name == "kind")): option for option in options}
    kinds |= more
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in kinds:
        raise InvalidConfig(f"{where}.kind is {kind!r}: {did_you_mean(str(kind), kinds)}")
    return kinds[kind], optional


def _keys(tp: Any, value: Any) -> dict[str, Any]:
    """The keys of a dict with closed keys, and their types."""
    keys = get_args(tp)[1]
    return dict(keys(value) if callable(keys) else keys)


def _known(tp: Any) -> dict[str, Any]:
    """The settable fields of a dataclass and their types."""
    hints = get_type_hints(tp, include_extras=True)
    return {f.name: hints[f.name] for f in fields(tp) if f.init}


def _near(path: str, known: dict[str, Any], renamed: Mapping[str, str] = MappingProxyType({})) -> str:
    if path in renamed:
        return f"it is called {renamed[path]} now"
    return did_you_mean(_last(path), known) if known else "it has no parts"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _parse(tp: Any, text: str, path: str) -> Any:
    if tp is Any:
        try:
            return json.loads(text)
        except ValueError:
            return text
    require(tp in _SCALARS, path, text, "a value that only the recipe's file can set")
    if tp is bool:
        require(text.lower() in ("true", "false"), path, text, "true or false")
        return text.lower() == "true"
    try:
        return tp(text)
    except ValueError:
        raise InvalidConfig(f"{path} is {text!r}; expected a value of type {tp.__name__}") from None
