"""Read a pickle without running it: only tensors and plain containers come to life.

Whatever else a file names, a class or a function, is never imported and never called: it becomes a `Name`, and what the
file would have made with it an inert `Object`, which remembers how it was to be made. `torch_writer` writes it back so,
which restores the real thing in the program that the file is for, and runs nothing here.

Refuses (pickle.UnpicklingError) names whose only use in a file is to run code (`pickled_names`), calls of what was
fetched from an object (except a class or function inside a class, and `functools.partial` of what may be called), and
operations on what is neither a plain container nor an `Object`. Longer than other modules: what comes to life and what
stays inert is one decision.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bert2bert.files.pickled_names import Name, Unsafe, checked


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of a tensor, or of several that share them. ``kind``: the class by which the file calls it."""

    kind: Name
    untyped: torch.UntypedStorage


STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8, "QInt32Storage": torch.qint32, "QUInt8Storage": torch.quint8,
    "QUInt4x2Storage": torch.quint4x2, "QUInt2x4Storage": torch.quint2x4,
}  # fmt: skip
"""The classes of storages in torch's files."""


class Bare:
    """No state was given (None can be one)."""


@dataclass(eq=False)
class Object:
    """What calling ``made_by`` with ``args`` would give.

    ``new``: by its ``__new__``, with keyword arguments if this is a dict; ``state``, ``items``, ``pairs``: what it is
    given then, as in the tuple of `object.__reduce__`.
    """

    made_by: Name | Object
    args: tuple[Any, ...]
    new: bool | dict[str, Any] = False
    state: Any = Bare
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def parts(self) -> Iterator[Any]:
        """Everything inside it."""
        yield from (self.made_by,) if isinstance(self.made_by, Object) else ()
        yield from self.args
        yield from self.new.values() if isinstance(self.new, dict) else ()
        yield from (self.state,) if self.state is not Bare else ()
        yield from self.items
        yield from (part for pair in self.pairs for part in pair)


def foreign(tree: Any) -> set[Name]:
    """The classes and functions named anywhere in a tree, which may contain itself."""
    found: set[Name] = set()
    for value in walk(tree):
        if isinstance(value, Object):
            found.add(inside_class(value) or named(value.made_by))
        elif isinstance(value, Name):
            found.add(value)
    return found


_GETATTR = Name("builtins", "getattr")


def inside_class(found: Any) -> Name | None:
    """The path of a class or function inside a class, which is ``getattr(Outer, "Inner")`` here; None for others."""
    if not isinstance(found, Object) or found.made_by != _GETATTR or len(found.args) != 2:
        return None
    outer, inner = found.args[0], found.args[1]
    outer = outer if isinstance(outer, Name) else inside_class(outer)
    return Name(outer.module, f"{outer.name}.{inner}") if outer and isinstance(inner, str) else None


def named(called: Name | Object) -> Name:
    """The name of what a file calls, or of what made it."""
    while isinstance(called, Object):
        called = inside_class(called) or called.made_by
    return called


def _check_called(called: Name | Object) -> None:
    """Raise Unsafe where a file calls what it fetched from an object by name, which can be anything."""
    if isinstance(called, Name) or inside_class(called):
        return
    made_by = called.made_by
    if not isinstance(made_by, Name) or made_by == _GETATTR or made_by.module in ("operator", "_operator"):
        raise Unsafe(named(called))
    if made_by == Name("functools", "partial"):  # its function is named twice
        state = called.state[:1] if isinstance(called.state, tuple) else ()
        for function in (*called.args[:1], *state):
            if isinstance(function, Object):
                _check_called(function)


def walk(tree: Any) -> Iterator[Any]:
    """Every value of a tree once, which may contain itself."""
    seen: set[int] = set()
    left = [tree]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            left += [part for pair in value.items() for part in pair]
        elif isinstance(value, Object):
            left += value.parts()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value


def _tensor(storage: Any, *rest: Any) -> torch.Tensor:
    offset, size, stride, learns, _, *metadata = rest
    kind = storage.kind.name if isinstance(storage, Storage) else ""
    return _tensor_of(storage, STORAGES.get(kind), offset, size, stride, metadata).requires_grad_(learns is True)


def _tensor_of_dtype(storage: Any, *rest: Any) -> torch.Tensor:
    offset, size, stride, learns, _, dtype, *metadata = rest
    return _tensor_of(storage, dtype, offset, size, stride, metadata).requires_grad_(learns is True)


def _tensor_of(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: list[Any]) -> torch.Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError(f"a tensor of dtype {dtype!r} in a {type(storage).__name__}")
    found = torch.empty(0, dtype=dtype)
    found.set_(storage.untyped, offset, size, stride)
    flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
    found = found.conj().resolve_conj() if flags.get("conj") is True and found.is_complex() else found
    return -found if flags.get("neg") is True else found


def _parameter(tensor: Any, learns: Any, *_: Any) -> torch.nn.Parameter:
    if not isinstance(tensor, torch.Tensor):
        raise pickle.UnpicklingError(f"a parameter without a tensor, of {type(tensor).__name__}")
    return torch.nn.Parameter(tensor.detach(), learns is True)


def _of_class(function: Any, kind: Any, args: Any, *state: Any) -> Any:
    """A tensor with attributes, which nothing needs; one of a subclass stays inert."""
    make = _MAKE.get(function) if isinstance(function, Name) and kind in _PLAIN_TENSORS else None
    if make is None:
        return Object(Name("torch._tensor", "_rebuild_from_type_v2"), (function, kind, args, *state))
    return make(*args)


_PLAIN_TENSORS = (Name("torch", "Tensor"), Name("torch.nn.parameter", "Parameter"))


def _bytes(text: Any, encoding: Any) -> bytes:
    """As protocol 2 writes them."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes made of a {type(text).__name__} by the encoding {encoding!r}")
    return text.encode("latin1")


_MAKE: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("torch._tensor", "_rebuild_from_type_v2"): _of_class,
    Name("torch", "Size"): torch.Size,
    Name("torch", "device"): torch.device,
    Name("collections", "OrderedDict"): OrderedDict,
    Name("collections", "Counter"): Counter,
    Name("_codecs", "encode"): _bytes,
    Name("builtins", "set"): lambda items=(): set(items),
    Name("builtins", "frozenset"): lambda items=(): frozenset(items),
    Name("builtins", "bytearray"): lambda text="", encoding="latin1": bytearray(_bytes(text, encoding)),
    Name("builtins", "complex"): lambda real, imag: complex(float(real), float(imag)),
}  # fmt: skip
"""What comes to life."""


class Unpickler(pickle._Unpickler):
    """See the module. ``load_storage(key, kind, numel)`` gives what the file's persistent names stand for."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    proto: int
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def __init__(self, content: bytes, load_storage: Callable[[str, Name, int], Storage]) -> None:
        super().__init__(io.BytesIO(content))
        self.load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        """A dtype, or the `Name` alone; what is inside a class, as protocols before 4 write it."""
        if self.proto < 3:
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format | torch.qscheme):
            return found
        checked(Name(module, name))
        outer, *inner = name.split(".")
        reached: Name | Object = Name(module, outer)
        for part in inner:
            reached = Object(_GETATTR, (reached, part))
        return reached

    def _make(self, made_by: Any, args: Any, new: bool | dict[str, Any]) -> None:
        if not isinstance(made_by, Name | Object) or type(args) is not tuple:
            raise pickle.UnpicklingError(f"it calls a {type(made_by).__name__}")
        _check_called(made_by)
        make = _MAKE.get(made_by) if isinstance(made_by, Name) and not isinstance(new, dict) else None
        made = make(*args) if make else Object(made_by, args, new)
        if made_by == _GETATTR and len(args) == 2 and isinstance(args[1], str):
            checked(inside_class(made) or Name("", args[1]))
        self.append(made)

    def _reduce(self) -> None:
        args, made_by = self.stack.pop(), self.stack.pop()
        self._make(made_by, args, False)

    def _new(self) -> None:
        args, made_by = self.stack.pop(), self.stack.pop()
        self._make(made_by, args, True)

    def _new_with_keywords(self) -> None:
        keywords, args, made_by = (self.stack.pop() for _ in range(3))
        self._make(made_by, args, keywords if isinstance(keywords, dict) and keywords else True)

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Object):
            made.state = state
        elif not isinstance(made, torch.Tensor | OrderedDict):  # whose attributes nothing needs
            raise pickle.UnpicklingError(f"it gives a state to a {type(made).__name__}")

    def _add(self, made: Any, items: Iterable[Any]) -> None:
        if type(made) is list:
            made.extend(items)
        elif type(made) is set:
            made.update(items)
        elif isinstance(made, Object):
            made.items.extend(items)
        else:
            raise pickle.UnpicklingError(f"it adds to a {type(made).__name__}")

    def _put(self, made: Any, flat: list[Any]) -> None:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        if type(made) in (dict, OrderedDict, Counter):
            made.update(pairs)
        elif isinstance(made, Object):
            made.pairs.extend(pairs)
        else:
            raise pickle.UnpicklingError(f"it puts entries into a {type(made).__name__}")

    def _append(self) -> None:
        item = self.stack.pop()
        self._add(self.stack[-1], [item])

    def _appends(self) -> None:
        items = self.pop_mark()
        self._add(self.stack[-1], items)

    def _set(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def _sets(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def _bytearray(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # pickle's own believes the length

    def _storage(self) -> None:
        what, kind, key, _, numel = self.stack.pop()
        if what != "storage" or not isinstance(kind, Name) or not isinstance(numel, int):
            raise pickle.UnpicklingError("it names something else than a storage")
        self.append(self.load_storage(str(key), kind, numel))

    def _never(self) -> None:
        raise pickle.UnpicklingError("it has an operation that torch.save does not use")

    dispatch.update({
        pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _new, pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.BUILD[0]: _build, pickle.APPEND[0]: _append, pickle.APPENDS[0]: _appends, pickle.ADDITEMS[0]: _appends,
        pickle.SETITEM[0]: _set, pickle.SETITEMS[0]: _sets, pickle.BINPERSID[0]: _storage,
        pickle.BYTEARRAY8[0]: _bytearray,
        pickle.PERSID[0]: _never, pickle.INST[0]: _never, pickle.OBJ[0]: _never, pickle.EXT1[0]: _never,
        pickle.EXT2[0]: _never, pickle.EXT4[0]: _never, pickle.NEXT_BUFFER[0]: _never,
        pickle.READONLY_BUFFER[0]: _never,
    })  # fmt: skip
