"""Open a torch file safely and without reading its tensors: memory-mapped, through an allow-list.

A pickle can run code when it is opened. `load` uses torch's restricted unpickler; the few DeepSpeed classes that ZeRO
files name become inert stand-ins (this package never imports DeepSpeed), then plain dicts. Python paths, namespaces and
numpy scalars and arrays, which users keep in their client state, become plain values too.

Refuses, as InvalidCheckpoint: files that are missing, truncated, not torch files, or of torch's format before 1.6, and
files that name any other class (its code does not run).
"""

from __future__ import annotations

import pickle
import re
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert2bert.errors import InvalidCheckpoint
from bert2bert.shards import archive
from bert2bert.shards.sniff import describe, sniff

_NODES, _NODES_A_BYTE = 10_000, 16  # values that a structure may unfold to: it can name one many times over


class _Inert:
    """Stands for an object of a foreign class: keeps the attributes, has no behaviour."""

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)


class _Dtype:
    """A numpy dtype of plain numbers, as pickled: a code, then a state with the byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r} is not a plain number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array, as pickled: created empty, then given its state."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0].item()


def _path(*parts: str) -> str:
    return str(Path(*parts))


class _Stage(int):
    """DeepSpeed's ZeroStageEnum, pickled by value."""


class _Profile(str):
    """DeepSpeed's LossScaleProfile, pickled by value."""


_MEMBERS: dict[type, dict[str, Any]] = {
    _Stage: {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3},
    _Profile: {"FUSED": "fused", "UNFUSED": "unfused"},
}


def _member(kind: Any, name: Any) -> Any:
    """In place of getattr, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration: of these two alone."""
    known = _MEMBERS.get(kind, {}) if isinstance(kind, type) else {}
    if name not in known:
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of what is no enumeration of DeepSpeed")
    return known[name]


_DS = "deepspeed."
_ALLOWED: list[Any] = [
    (_Stage, _DS + "runtime.zero.config.ZeroStageEnum"),
    (_Profile, _DS + "runtime.fp16.loss_scaler.LossScaleProfile"),
    (_member, "builtins.getattr"),
    *((type(name.rpartition(".")[2], (_Inert,), {}), name) for name in (
        _DS + "runtime.fp16.loss_scaler.LossScaler",
        _DS + "runtime.fp16.loss_scaler.DynamicLossScaler",
        _DS + "runtime.fp16.loss_scaler.LossScaleConfig",
        _DS + "utils.tensor_fragment.fragment_address",
        _DS + "checkpoint.universal_checkpoint.SubparamShape",
        "argparse.Namespace",
    )),
    *((_path, f"{module}.{kind}") for module in ("pathlib", "pathlib._local") for kind in (
        "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath",
    )),
    (_Dtype, "numpy.dtype"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (np.ndarray, "numpy.ndarray"),
]  # fmt: skip
_LOCK = threading.RLock()  # torch keeps its allow-list in a global


def load_all(paths: Sequence[Path]) -> list[Any]:
    """`load` each; files of the same content, as ranks' model states often are, are opened once and share an object."""
    seen: dict[str, Any] = {}
    objects = []
    for path in paths:
        checked = _check(path)
        found = seen.get(checked.content) if checked.content else None
        if found is None:
            found = seen[checked.content] = _load(path, checked.structure)
        objects.append(found)
    return objects


def load(path: Path) -> Any:
    """The file's object: dicts, lists, tuples, numbers, strings, numpy arrays, and detached CPU tensors.

    The tensors are views of a private memory map: nothing is read until an element is, and writing to one does not
    change the file. Objects of allowed classes become ``{"class": name, **attributes}``.
    """
    return _load(path, _check(path).structure)


def _check(path: Path) -> archive.Checked:
    _check_frame(path)
    return archive.check(path)


def _load(path: Path, size: int) -> Any:
    try:
        with _LOCK, torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _plain(found, _Budget(_NODES_A_BYTE * size + _NODES))
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise InvalidCheckpoint(
                f"{path}: refused, it names '{named[1]}', which is no class of a ZeRO checkpoint. Opening it could run "
                "foreign code, so nothing was run. If you trust the file, load it yourself and save it again with "
                "plain types (numbers, strings, lists, dicts, tensors) in its client state."
            ) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # a malformed file can make torch raise nearly anything
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InvalidCheckpoint:
    _, _, detail = str(error).rpartition("WeightsUnpickler error: ")  # before it stands torch's advice to be careless
    reason = (detail.strip().splitlines() or [type(error).__name__])[0]
    return InvalidCheckpoint(
        f"{path}: not readable as a torch file ({reason}). Copy it again from where it was written."
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
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Dtype):
        return str(value.dtype)
    if isinstance(value, (_Stage, _Profile)):
        return int(value) if isinstance(value, _Stage) else str(value)
    if isinstance(value, _Inert):
        return {"class": type(value).__name__, **{k: _plain(v, budget) for k, v in vars(value).items()}}
    return value
