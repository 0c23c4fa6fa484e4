"""Writes the reference pages that are made from the code: ``python docs/generate.py``.

docs/reference/operators.md from the operators' registry, docs/reference/recipe.md from the recipe's dataclasses,
docs/reference/modules.md from the first sentence of every module.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import bert2bert.operators  # noqa: F401  (registers them)
from bert2bert.data import objective
from bert2bert.operators.registry import FLAGS, OPERATORS, Operator
from bert2bert.recipe import growing, old_names, programs, recipe, triggers
from bert2bert.recipe.model_keys import MODEL_KEYS

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
NOTE = "<!-- Made by `make docs`; do not edit. -->"
TITLES = {
    "width": "Width", "depth": "Depth", "vocab": "Vocabulary", "positions": "Positions", "experts": "Experts",
    "embeddings": "Tied embeddings",
    "breaker": "Breaking the symmetry of copies",
}  # fmt: skip

INTRO = """
A growth takes one operator in width, one in depth, and one each for vocabulary, positions and experts, where they grow.
`bert2bert operators NAME` prints the same. Which to take: [which operator](../explanation/which-operator.md).
"""
TERMS = """
*Preserves*: what of the model's function stays. *Needs*: the models and sizes it works on. *Moments*: its
[policy](../explanation/moments.md). *Evidence*: what has been measured, and by whom; percentages are FLOPs saved until
the loss of training from scratch is reached, unless something else is stated. Most papers leave out what training the
source cost. That each operator preserves what it promises is tested on every architecture, and not repeated here.
"""
WHAT_A_RECIPE_IS = """
A recipe is a Python file that defines `recipe = Recipe(...)`; the files in [recipes/](../../recipes) are examples. It
describes the experiment. The machine (precision, ZeRO stage, micro-batch) is described by the ds_config. Any value can
be set on the command line by its dotted name: `--set phases.0.steps=10 optimizer.lr=1e-4`. An unknown key is refused,
with the nearest known one.
"""

WHAT_MODULES_DO = """
The package folder by folder, each module with the first sentence of its docstring. Who uses whom:
[architecture](../architecture.md).
"""


def wrap(text: str, first: str = "", rest: str = "") -> str:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.fill(
        " ".join(text.split()), 120, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def safe(text: str) -> str:
    """Text in which Markdown finds no markup of its own: < and * of formulas are escaped, names in `` become code."""
    pieces = re.split(r"(`+[^`]*`+)", text)
    return "".join("`" + p.strip("`") + "`" if i % 2 else re.sub(r"([*<|])", r"\\\1", p) for i, p in enumerate(pieces))


def operators() -> str:
    """Every operator: what the registry says of it."""
    lines = ["# Operators", NOTE, "", wrap(INTRO), "", wrap(TERMS), ""]
    for kind, flag in FLAGS.items():
        lines += [f"## {TITLES[kind]}: `{flag}`", ""]
        for operator in OPERATORS[kind].values():
            lines += _operator(operator)
    return "\n".join(lines).rstrip() + "\n"


def _operator(operator: Operator) -> list[str]:
    lines = [f"### `{operator.name}` ({TITLES[operator.kind].lower()})", "", f"*{operator.paper}*", ""]
    for paragraph in operator.formula.split("\n\n"):
        lines += [wrap(safe(paragraph)), ""]
    facts = {
        "Preserves": operator.keeps, "Needs": operator.needs, "Moments": operator.moments, "Evidence": operator.evidence
    }  # fmt: skip
    lines += [wrap(f"{name}: {safe(words)}", "* ", "  ") for name, words in facts.items()]
    for key, (kind, default) in operator.options.items():
        values = " | ".join(typing.get_args(kind)) or kind.__name__
        stated = default not in (0, "") or kind is float  # 0 and "" mean: as the target config asks
        default_text = ", must be given" if default is None else f", default `{default}`" if stated else ""
        lines.append(f"* Option `{key}={values}`{default_text}")
    return [*lines, ""]


def _kind(cls: type) -> str:
    """The kind by which JSON names a dataclass."""
    return str(next(f.default for f in fields(cls) if f.name == "kind"))


RECIPE = (
    ("", recipe.Recipe), ("data", recipe.Data), ("optimizer", recipe.AdamW), ("safety", recipe.Safety),
    ("phases.N", recipe.Phase),
    ("phases.N.schedule", recipe.Schedule),
    *((f"phases.N.program, kind `{_kind(p)}`", p) for p in programs.PROGRAMS), ("phases.N.grow", growing.Grow),
    *((f"phases.N.until, kind `{_kind(t)}`", t) for t in triggers.TRIGGERS),
    ("objective, kind `masked`", objective.Masked),
    ("objective, kind `causal`", objective.Causal), ("objective, kind `span-corruption`", objective.SpanCorruption),
)  # fmt: skip


def recipes() -> str:
    """The keys of a recipe, their types and defaults."""
    lines = ["# Recipe keys", NOTE, "", wrap(WHAT_A_RECIPE_IS), ""]
    for where, cls in RECIPE:
        lines += [
            f"## {cls.__name__}" + (f": `{where.split(',')[0]}`{where[len(where.split(',')[0]) :]}" if where else ""),
            "",
        ]
        for paragraph in (inspect.getdoc(cls) or "").split("\n\n"):
            lines += [wrap(safe(paragraph)), ""]
        hints = typing.get_type_hints(cls)
        if rows := [f"| `{f.name}` | {_type(hints[f.name])} | {_default(f)} |" for f in fields(cls) if f.init]:
            lines += ["| key | type | default |", "|---|---|---|", *rows, ""]
    lines += ["## Keys of `model`", "", wrap("A Hugging Face BERT config; no other key is taken."), ""]
    lines += ["| key | type |", "|---|---|", *[f"| `{k}` | {_type(t)} |" for k, t in MODEL_KEYS.items()], ""]
    old = ", ".join(f"`{before}` (now `{now}`)" for before, now in old_names.RENAMED.items())
    lines += ["## Old names", "", wrap(f"Refused with the new name: {old}."), ""]
    return "\n".join(lines).rstrip() + "\n"


def _type(tp: Any) -> str:
    if typing.get_origin(tp) in (typing.Union, types.UnionType):
        return " or ".join(_type(t) for t in typing.get_args(tp))
    if tp is type(None):
        return "none"
    if args := [a for a in typing.get_args(tp) if a is not Ellipsis]:
        many = typing.get_origin(tp)
        return "a table" if many is dict else f"list of {_type(args[0])}" + (f" ({len(args)})" if len(args) > 1 else "")
    return str(tp.__name__)


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "must be given"
    value = field.default
    if hasattr(value, "kind"):
        return f"`{type(value).__name__}()`"
    return "none" if value is None else f"`{value}`"


def modules() -> str:
    """Every module and the first sentence of its docstring."""
    lines = ["# Modules", NOTE, "", wrap(WHAT_MODULES_DO), ""]
    package = ROOT / "bert2bert"
    folders = sorted({path.parent for path in package.rglob("*.py")})
    for folder in folders:
        name = folder.relative_to(ROOT).as_posix()
        files = [(path, _first_sentence(path)) for path in sorted(folder.glob("*.py"))]
        about = "".join(words for path, words in files if path.name == "__init__.py")
        lines += [f"## `{name}/`", "", *([wrap(safe(about)), ""] if about else []), "| module | does |", "|---|---|"]
        for path, words in files:
            if path.stem not in ("__init__", "__main__"):
                link = f"[{path.stem}](../../{path.relative_to(ROOT).as_posix()})"
                lines.append(f"| {link} | {safe(words)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _first_sentence(path: Path) -> str:
    words = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Z])", words)[0]


PAGES: dict[str, Callable[[], str]] = {"operators": operators, "recipe": recipes, "modules": modules}


def main() -> int:
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
