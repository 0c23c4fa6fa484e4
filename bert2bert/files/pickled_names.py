"""Names of classes and functions in a pickle, and which of them are refused anywhere: those by which it runs programs.

Nothing is imported here, and nothing that a file names is ever run, so a name tells by itself: a path that begins in a
module of programs, or leads to one through other modules (`torch.os.system`), and attributes by which every function
leads to its module. What is inside a class, which by custom begins with a capital letter, belongs to the class,
whatever it is called. Refuses (`Unsafe`) these alone: any other name stays a name.
"""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass

_CODE = {  # modules and functions by which a pickle runs programs; a thing of any other name stays inert
    "os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "runpy", "importlib", "ctypes", "code", "codeop", "pip",
    "webbrowser", "timeit", "pdb", "bdb", "marshal", "_posixsubprocess", "multiprocessing.util",
    *(f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "breakpoint", "input")),
    "io.open", "_io.open", "io.FileIO", "_io.FileIO",
}  # fmt: skip
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
    paths = [[*named.module.split("."), *inner], *(inner[start:] for start, _ in enumerate(modules))]
    reached = (begin for path in paths for begin in itertools.accumulate(path, "{}.{}".format))
    if not _CODE.isdisjoint(reached) or not _GATES.isdisjoint(inner):
        raise Unsafe(named)
    return named
