"""Open a torch file safely and without reading its tensors: memory-mapped, and nothing that it names is run.

A pickle can run code when it is opened. `unpickle` builds tensors and plain containers alone; here the few classes that
ZeRO files need become plain values: DeepSpeed's (this package never imports it), paths, namespaces, numpy's scalars and
arrays. Where the caller allows it, as in a user's client state, anything else stays an inert `unpickle.Object`, which
`torch_writer` writes back.

Refuses, as InvalidCheckpoint: files that are missing, truncated, not torch files, or of torch's format before 1.6, what
runs code by its very name, and other classes where none are allowed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_check
from bert2bert.files.pickled_names import Name, Unsafe
from bert2bert.files.sniff import describe, sniff
from bert2bert.files.unpickle import STORAGES, Bare, Object, Storage, Unpickler, named

_NODES, _NODES_A_BYTE = 10_000, 16  # values that a structure may unfold to: it can name one many times over


def _dtype(code: Any, *_: Any, state: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
        raise pickle.UnpicklingError(f"numpy dtype {code!r} is not a plain number")
    return np.dtype(code).newbyteorder(state[1])


def _array(*_: Any, state: Any) -> np.ndarray[Any, Any]:
    _, shape, dtype, fortran, data = state
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: Any, data: bytes, state: Any) -> Any:
    return np.frombuffer(data, dtype)[0].item()


_MEMBERS: dict[str, dict[str, Any]] = {  # DeepSpeed's enumerations: member -> value
    "deepspeed.runtime.zero.config.ZeroStageEnum":
        {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3},
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile": {"FUSED": "fused", "UNFUSED": "unfused"},
}  # fmt: skip


def _member(kind: Any, name: Any, state: Any) -> Any:
    """In place of getattr, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration: of these two alone."""
    known = _MEMBERS.get(str(kind), {})
    if name not in known:
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of what is not an enumeration of DeepSpeed")
    return known[name]


_INERT = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "argparse.Namespace",
)  # what becomes {"class": name, **attributes}
_VALUES: dict[str, Callable[..., Any]] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": lambda value, state: int(value),
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile": lambda value, state: str(value),
    "getattr": _member,
    **{f"{module}.{kind}": lambda *parts, state: str(Path(*parts))
       for module in ("pathlib", "pathlib._local")
       for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
}  # fmt: skip
"""What becomes a plain value: how, from the arguments and the state."""
USUAL = {*_INERT, *_VALUES, "numpy.ndarray"}
"""Names that need no report."""


def load_all(paths: Sequence[Path], plain: Collection[str] | None = None) -> list[Any]:
    """`load` each; files of the same content, as ranks' model states often are, are opened once and share an object."""
    seen: dict[str, Any] = {}
    objects = []
    for path in paths:
        checked = _check(path)
        found = seen.get(checked.content) if checked.content else None
        if found is None:
            found = seen[checked.content] = _load(path, checked, plain)
        objects.append(found)
    return objects


def load(path: Path, plain: Collection[str] | None = None) -> Any:
    """The file's object: dicts, lists, tuples, numbers, strings, numpy arrays, and detached CPU tensors.

    The tensors are views of a private memory map: nothing is read until an element is, and writing to one does not
    change the file. Objects of DeepSpeed's classes become ``{"class": name, **attributes}``. ``plain``: if the file
    holds a dict, this is so of the entries with these names alone, and the others may hold `Object` and `Name` as well.
    """
    return _load(path, _check(path), plain)


def _check(path: Path) -> torch_check.Checked:
    _check_frame(path)
    return torch_check.check(path)


def _load(path: Path, checked: torch_check.Checked, plain: Collection[str] | None) -> Any:
    mapped: list[Any] = []
    storages: dict[str, Storage] = {}

    def storage(key: str, kind: Name, numel: int) -> Storage:
        if key not in storages:
            begin, end = checked.tensors[key]
            size = numel * STORAGES[kind.name].itemsize
            if kind.module not in ("torch", "torch.storage") or not 0 <= size <= end - begin:
                raise pickle.UnpicklingError(f"its tensor {key} is not {size:,} bytes long")
            if not mapped:
                mapped.append(torch.UntypedStorage.from_file(str(path), False, path.stat().st_size))
            storages[key] = Storage(kind, mapped[0][begin : begin + size])
        return storages[key]

    try:
        found = Unpickler(checked.structure, storage).load()
        budget = _Budget(_NODES_A_BYTE * len(checked.structure) + _NODES)
        if plain is None or not isinstance(found, dict):
            return _plain(found, budget)
        return {_plain(key, budget): _plain(value, budget) if key in plain else value for key, value in found.items()}
    except MemoryError:
        raise
    except Unsafe as error:
        raise InvalidCheckpoint(
            f"{path}: refused, it names '{error.args[0]}', which is not a class of a ZeRO checkpoint. Opening it could "
            "run foreign code, so nothing was run. If you trust the file, load it yourself and save it with plain "
            "types (numbers, strings, lists, dicts, tensors)."
        ) from None
    except Exception as error:  # a malformed file can make this raise nearly anything
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InvalidCheckpoint:
    reason = (str(error).strip().splitlines() or [""])[0][:200] if isinstance(error, pickle.UnpicklingError) else ""
    return InvalidCheckpoint(
        f"{path}: not readable as a torch file ({reason or type(error).__name__}). Copy it again from where it was "
        "written."
    )


def _check_frame(path: Path) -> None:
    """Tell a missing, a truncated and a foreign file apart before torch says something obscure."""
    try:
        if zipfile.is_zipfile(path):
            return
        found = sniff(path)
        if found.kind == "zip":
            raise InvalidCheckpoint(
                f"{path}: truncated, its {found.size:,} bytes have a beginning but no end (a save that was killed, or "
                "an unfinished copy). Use an older tag or copy the file again."
            )
        raise InvalidCheckpoint(f"{path}: not a torch file: {describe(path)}")
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path}: no such file") from None
    except OSError as error:
        raise InvalidCheckpoint(f"{path}: cannot be opened ({error.strerror})") from None


class _Budget:
    """Counts the values that a structure unfolds to; pickle.UnpicklingError when they are too many."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("it unfolds to more values than a file of its size has, or without end")


def _plain(value: Any, budget: _Budget) -> Any:
    budget.spend()
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {_plain(k, budget): _plain(v, budget) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, budget) for v in value]
    if isinstance(value, tuple):
        return tuple(_plain(v, budget) for v in value)
    if isinstance(value, Object):
        return _opened(value, budget)
    if isinstance(value, Name | Storage):
        raise Unsafe(value if isinstance(value, Name) else value.kind)
    return value


def _opened(found: Object, budget: _Budget) -> Any:
    """An object of a known class as a plain value."""
    if not isinstance(found.made_by, Name):  # what a call gave, or a class inside a class: none of DeepSpeed's is
        raise Unsafe(named(found.made_by))
    name = str(found.made_by)
    if name in _INERT:
        state = found.state if isinstance(found.state, dict) else {}
        return {"class": found.made_by.name, **_plain(state, budget)}
    if name not in _VALUES:
        raise Unsafe(found.made_by)
    args = [arg if isinstance(arg, Name) else _plain(arg, budget) for arg in found.args]
    return _VALUES[name](*args, state=None if found.state is Bare else _plain(found.state, budget))
