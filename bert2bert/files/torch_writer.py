"""Write files that `torch.load` reads, without ever holding their tensors: the structure first, then the bytes,
streamed.

A file of `torch.save` is a stored (uncompressed) zip: `data.pkl`, in which a tensor is a reference to a numbered
storage, and one record per storage, aligned to 64 bytes so that it can be memory-mapped. Here a tensor is described
by a `Blank` and its storage is filled block by block from an iterator, so memory stays flat however large the shard
is, a full disk is an ordinary error (a memory map would be killed by SIGBUS), and the zip's checksums are true. Equal
input gives equal bytes. The result loads with any torch that reads the zip format, with or without `mmap` and
`weights_only`.

DeepSpeed pickles a few of its own objects into its files; a `Foreign` stands for one, written by class name, so that an
unmodified DeepSpeed restores the real object while this project need not import DeepSpeed. What `unpickle` left
unopened is written back as it was made.

Refuses streams of the wrong length (RuntimeError).
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bert2bert.files.pickled_names import Name
from bert2bert.files.unpickle import STORAGES, Bare, Object, Storage
from bert2bert.files.zip_writer import File, Zipped

_STORAGES: dict[torch.dtype, type] = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage, torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}  # fmt: skip
"""The class by which torch calls the storage of a tensor; of other dtypes, an UntypedStorage."""


@dataclass(frozen=True, eq=False)
class Blank:
    """A contiguous tensor to be: ``blocks`` yields its elements flat and in order (any float dtype; converted)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Foreign:
    """An instance of class ``module.name`` with attributes ``state``, restored without calling its constructor."""

    module: str
    name: str
    state: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Storage:
    key: int
    blank: Blank


class _Tensors:
    """What both picklers do with tensors: they become records of their own."""

    storages: list[tuple[Blank, bool]]  # and whether it was given as a Blank

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):  # of a tensor that was not opened
            content = torch.empty(0, dtype=torch.uint8).set_(obj.untyped)
            self.storages.append((Blank(tuple(content.shape), torch.uint8, lambda: (content,)), False))
            count = len(content) // STORAGES[obj.kind.name].itemsize
            return "storage", obj.kind, str(len(self.storages) - 1), "cpu", count
        if not isinstance(obj, _Storage):
            return None
        blank, kind = obj.blank, _STORAGES.get(obj.blank.dtype, torch.UntypedStorage)
        count = blank.nbytes if kind is torch.UntypedStorage else math.prod(blank.shape)
        return "storage", kind, str(obj.key), "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (obj.detach(), obj.requires_grad, OrderedDict())
        if isinstance(obj, torch.Tensor):
            flat = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            blank = Blank(tuple(obj.shape), obj.dtype, lambda: (flat,))
        elif isinstance(obj, Blank):
            blank = obj
        elif isinstance(obj, Foreign | Object | Name):
            raise _IsForeign
        else:
            return NotImplemented
        self.storages.append((blank, blank is obj))
        stride = torch.empty(blank.shape, device="meta").stride()
        hooks: dict[Any, Any] = OrderedDict()
        learns = isinstance(obj, torch.Tensor) and obj.requires_grad
        args = (_Storage(len(self.storages) - 1, blank), 0, blank.shape, stride, learns, hooks)
        if blank.dtype not in _STORAGES:
            return torch._utils._rebuild_tensor_v3, (*args, blank.dtype)
        return torch._utils._rebuild_tensor_v2, args


class _IsForeign(Exception):
    """What the C pickler cannot write: a class that it cannot import, a set in an order that is the same in every
    process. The Python one, several times slower, can."""


class _CPickler(_Tensors, pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:  # asked of every object
        if type(obj) in (set, frozenset) and len(obj) > 1:
            raise _IsForeign
        return super().persistent_id(obj)


class _PyPickler(_Tensors, pickle._Pickler):
    write: Callable[[bytes], Any]

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Foreign):
            self.write(_global(obj) + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            super().save(obj.state)  # type: ignore[misc]
            self.write(pickle.BUILD)
        elif type(obj) in (set, frozenset) and id(obj) not in self.memo:  # type: ignore[attr-defined]
            ordered = sorted(obj, key=lambda item: (type(item).__name__, repr(item)))
            self.save_reduce(type(obj), (ordered,), obj=obj)  # type: ignore[attr-defined]
        elif not isinstance(obj, Object | Name):
            super().save(obj, save_persistent_id)  # type: ignore[misc]
        elif known := self.memo.get(id(obj)):  # type: ignore[attr-defined]
            self.write(self.get(known[0]))  # type: ignore[attr-defined]
        elif isinstance(obj, Name):
            self.write(_global(obj))
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            self._save_object(obj)

    def _save_object(self, obj: Object) -> None:
        self.save(obj.made_by)
        self.save(obj.args)
        if isinstance(obj.new, dict):
            self.save(obj.new)
        self.write(pickle.NEWOBJ_EX if isinstance(obj.new, dict) else pickle.NEWOBJ if obj.new else pickle.REDUCE)
        self.memoize(obj)  # type: ignore[attr-defined]
        self._batch_appends(iter(obj.items))  # type: ignore[attr-defined]
        self._batch_setitems(iter(obj.pairs))  # type: ignore[attr-defined]
        if obj.state is not Bare:
            self.save(obj.state)
            self.write(pickle.BUILD)


def _global(named: Foreign | Name) -> bytes:
    return pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode()


def structure(tree: Any) -> tuple[bytes, list[tuple[Blank, bool]]]:
    """A tree's pickle, and the tensors that it names, in order, each with whether it was given as a `Blank`."""
    for kind in (_CPickler, _PyPickler):
        text = io.BytesIO()
        pickler = kind(text, 2)  # the protocol that torch.save uses
        pickler.storages = []
        with contextlib.suppress(_IsForeign):
            pickler.dump(tree)
            return text.getvalue(), pickler.storages
    raise RuntimeError("a foreign object where no pickler looks for one")


def bits(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Equal shapes, dtypes and bits: NaN is NaN, and -0 is not 0."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def equal(one: Any, other: Any) -> bool:
    """Whether two trees would be written alike: the same structure, and tensors of the same bits."""
    mine, theirs = structure(one), structure(other)
    pairs = zip(mine[1], theirs[1], strict=False)
    return mine[0] == theirs[0] and all(b"".join(stream(a)) == b"".join(stream(b)) for (a, _), (b, _) in pairs)


def stream(blank: Blank, wrote: Callable[[int], None] | None = None) -> Iterator[memoryview]:
    """The bytes of a blank's elements in its dtype, block by block; raises RuntimeError if they are not all of them."""
    left = blank.nbytes
    for block in blank.blocks():
        data = block.detach().reshape(-1).to(blank.dtype).contiguous().view(torch.uint8).numpy().data
        left -= data.nbytes
        if left < 0:
            break
        yield data
        if wrote is not None:
            wrote(data.nbytes)
    if left:
        raise RuntimeError(f"a stream of {blank.nbytes} bytes for shape {blank.shape} ended {left} bytes off")


def saved(tree: Any) -> bytes:
    """The content of such a file."""
    file = io.BytesIO()
    save(file, tree)
    return file.getvalue()


def save(file: File, tree: Any, wrote: Callable[[int], None] | None = None) -> int:
    """Write ``tree`` (containers, scalars, tensors, `Blank`, `Foreign`) as a file for `torch.load`, from start to end.

    Returns the bytes of the blanks' data; ``wrote`` receives their number as they go. A `Blank` met twice is
    stored once and loads as one tensor. OSError (a full disk) passes through.
    """
    text, storages = structure(tree)
    archive = Zipped(file)
    archive.record("archive/data.pkl", len(text), (text,))
    archive.record("archive/byteorder", len(sys.byteorder), (sys.byteorder.encode(),))
    for key, (blank, streamed) in enumerate(storages):
        archive.record(f"archive/data/{key}", blank.nbytes, stream(blank, wrote if streamed else None))
    archive.record("archive/version", 2, (b"3\n",))
    archive.close()
    return sum(blank.nbytes for blank, streamed in storages if streamed)
