"""Names of classes and functions in a pickle, and which of them are refused anywhere: those by which it runs programs.

Nothing that a file names is imported or run, so a name tells by itself: a path that begins in a module of programs, or
leads to one through other modules (`torch.os.system`), and attributes by which every function leads to its module. What
is inside a class, which by custom begins with a capital letter, belongs to the class, whatever it is called. A class in
lower case may have the name of a module of programs (`run.code.Step`): what shows that is a class inside that
the module does not have. Refuses (`Unsafe`) these alone: any other name stays a name.
"""

from __future__ import annotations

import importlib
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

_CODE = {  # modules and functions by which a pickle runs programs; a thing of any other name stays inert
    "os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "runpy", "importlib", "ctypes", "code", "codeop", "pip",
    "webbrowser", "timeit", "pdb", "bdb", "marshal", "_posixsubprocess", "multiprocessing.util",
    *(f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "breakpoint", "input")),
    "io.open", "_io.open", "io.FileIO", "_io.FileIO",
}  # fmt: skip
_ALIKE = {"code", "codeop", "timeit", "shutil", "runpy", "importlib", "pdb", "bdb", "marshal", "multiprocessing.util"}
"""Those that are Python's own and have the same classes on every system."""
_GATES = {
    "__builtins__", "__globals__", "__subclasses__", "__import__", "__getattribute__", "__loader__", "__spec__",
}  # fmt: skip
"""Attributes by which anything leads to code."""


@dataclass(frozen=True)
class Name:
    """A class or function that a file names; ``name`` is a path (``Outer.Inner``) for one inside a class."""

    module: str
    name: str

    def __str__(self) -> str:
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


class Unsafe(pickle.UnpicklingError):
    """A file names what runs code; ``args[0]`` is the `Name`."""


def checked(named: Name) -> Name:
    """The name itself; raises Unsafe if it is one of code."""
    inner = named.name.split(".")
    modules = itertools.takewhile(lambda part: not part.lstrip("_")[:1].isupper(), inner[:-1])
    through = any(_through_code(inner[start:]) for start, _ in enumerate(modules))
    if through or not _CODE.isdisjoint(_begins([*named.module.split("."), *inner])) or not _GATES.isdisjoint(inner):
        raise Unsafe(named)
    return named


def _begins(path: list[str]) -> Iterator[str]:
    return itertools.accumulate(path, "{}.{}".format)


def _through_code(path: list[str]) -> bool:
    """Whether a path can be one through a module of programs, and not through a class of that name."""
    found = (end for end, begin in enumerate(_begins(path), start=1) if begin in _CODE)
    return any(end == len(path) or _may_have(".".join(path[:end]), path[end]) for end in found)


def _may_have(module: str, attribute: str) -> bool:
    """Whether a module of programs can have an attribute, on any system. Only modules of `_ALIKE` are imported."""
    if module not in _ALIKE or not attribute[:1].isupper():  # functions come with versions of Python
        return True
    return hasattr(importlib.import_module(module), attribute)
