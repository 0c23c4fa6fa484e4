"""The command ``operators``: the operators, their papers, what each preserves and needs. Imports no torch.

Refuses an unknown name (`UnsupportedGrowth`), with the nearest known ones.
"""

from __future__ import annotations

import textwrap
import typing
from typing import Any

import bert2bert.operators  # noqa: F401  (registers them)
from bert2bert.errors import UnsupportedGrowth, did_you_mean
from bert2bert.operators.registry import FLAGS, OPERATORS, Operator

_WIDTH = 110


def listing() -> dict[str, Any]:
    """Every operator, one line each. Returns {"operators": [...], "text": the table}."""
    lines, found = [], []
    for kind, flag in FLAGS.items():
        lines.append(f"{flag} OP[:key=value,…]")
        for operator in OPERATORS[kind].values():
            found.append(_plain(operator))
            needs = "" if operator.needs == "any model" else f"; needs {operator.needs}"
            text = f"keeps {operator.keeps}{needs} ({operator.paper})"
            lines += textwrap.wrap(
                text, _WIDTH, initial_indent=f"  {operator.name:16}", subsequent_indent=" " * 18, break_on_hyphens=False
            )
        lines.append("")
    lines.append("bert2bert operators NAME: formula and options of one.")
    return {"operators": found, "text": "\n".join(lines)}


def describe(name: str) -> dict[str, Any]:
    """The operators of this name (a width and a depth may share one). Returns {"operators": [...], "text": …}."""
    found = [known[name] for known in OPERATORS.values() if name in known]
    if not found:
        names = sorted({n for known in OPERATORS.values() for n in known})
        raise UnsupportedGrowth(f"{name!r} is not an operator; {did_you_mean(name, names)}")
    return {"operators": [_plain(o) for o in found], "text": "\n\n".join(_page(o) for o in found)}


def _page(operator: Operator) -> str:
    lines = [f"{FLAGS[operator.kind]} {operator.name}   {operator.paper}", "", operator.formula, ""]
    lines += [f"preserves  {operator.keeps}", f"needs      {operator.needs}", f"moments    {operator.moments}"]
    lines += textwrap.wrap(operator.evidence, _WIDTH, initial_indent="evidence   ", subsequent_indent=" " * 11)
    for key, (kind, default) in operator.options.items():
        value = " | ".join(typing.get_args(kind)) or kind.__name__
        known = "" if default in (0, "") and kind is not float else f" (default: {default})"  # 0: as the target asks
        lines.append(f"option     {key}={value}" + (" (must be given)" if default is None else known))
    return "\n".join(lines)


def _plain(operator: Operator) -> dict[str, Any]:
    return {
        "kind": operator.kind,
        "name": operator.name,
        "paper": operator.paper,
        "preserves": operator.keeps,
        "needs": operator.needs,
        "moments": operator.moments,
        "evidence": operator.evidence,
        "options": {key: default for key, (_, default) in operator.options.items()},
        "formula": operator.formula,
    }
