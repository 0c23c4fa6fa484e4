"""The files of one rank in a checkpoint: written as they come, or by a thread while training goes on.

Written behind training, a file is of a snapshot in the CPU's memory, taken in the step, so that nothing of a later step
gets into it; it has the same bytes as one written at once (from a GPU: but for the device's name).

DeepSpeed's own "decoupled" writer is not used: it fails at ZeRO stages 1 and 2, it holds the next optimizer step until
it is done, it does not make files durable, and it cannot load what it wrote (docs/deepspeed-defects.md).
Refuses (UserError) a disk without room or rights, and a rank that the others have given up.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from bert2bert.errors import UserError
from bert2bert.files.digest import file_digest
from bert2bert.files.disk import disk_errors, fsync_file
from bert2bert.ranks import heartbeat


class Files:
    """One rank's files in a tag's folder. ``behind``: whether they are written behind training.

    `add` each, `start`, and `finish` when `written`; an error of writing is kept until `finish`, where the ranks meet.
    """

    def __init__(self, folder: Path, behind: bool) -> None:
        self.folder, self.behind = folder, behind
        self._waiting: list[tuple[Any, Path]] = []
        self._names: list[str] = []
        self._contents: dict[str, str] = {}
        self._error: Exception | None = None
        self._given_up = False
        self._thread: threading.Thread | None = None

    def add(self, content: Any, path: Path) -> None:
        """Write what torch.save takes into a file of the folder, now or, from a snapshot, after `start`."""
        self._names.append(path.relative_to(self.folder).as_posix())
        if self.behind:
            self._waiting.append((snapshot(content), path))
        else:
            self._try(lambda: _write(content, path))

    def start(self) -> None:
        """Every file was added: write what is waiting."""
        if self.behind:
            self._thread = threading.Thread(target=self._try, args=(self._rest,), name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def written(self) -> bool:
        """Whether nothing is being written any more: `finish` does not wait."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> dict[str, str]:
        """{name: content digest} of this rank's files, all durable; waits for them. Raises what went wrong."""
        if self._thread is None:
            self._try(self._rest)
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._contents

    def give_up(self) -> None:
        """Stop writing after the file under way."""
        self._given_up = True
        if self._thread is not None:
            self._thread.join()

    def _try(self, act: Any) -> None:
        if self._error is None:
            try:
                with disk_errors(self.folder), _stream_errors(self.folder):
                    act()
            except Exception as error:
                self._error = error

    def _rest(self) -> None:
        """Write what is waiting; digest and make durable all that this rank wrote.

        Here and not on rank 0 alone, which on a cluster can neither sync another host's pages nor read them from
        memory.
        """
        while self._waiting and not self._given_up:
            content, path = self._waiting.pop(0)
            _write(content, path)
            del content  # its memory is free before the next is written
        names = [] if self._given_up else self._names
        self._contents = {name: file_digest(self.folder / name) for name in names}  # while pages are in memory
        for name in names:
            fsync_file(self.folder / name)


def _write(content: Any, path: Path) -> None:
    heartbeat.check()  # a rank that was frozen does not write into what another start of the run writes now
    torch.save(content, path)


def snapshot(content: Any) -> Any:
    """A copy of nested dicts, lists and tuples, its tensors in the CPU's memory. Tensors that share memory share it in
    the copy, too, so that torch.save writes no byte more of it."""
    memory: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in tensors(content):
        held = tensor.untyped_storage()
        key = held._cdata
        if key not in memory:
            memory[key] = held.clone() if held.device.type == "cpu" else held.cpu()
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(memory[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy)
        copies[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
        copy.__dict__.update(deepcopy(tensor.__dict__, copies))  # what DeepSpeed notes on a tensor is pickled with it
    return deepcopy(content, copies)


def tensors(content: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors(value)


@contextlib.contextmanager
def _stream_errors(folder: Path) -> Iterator[None]:
    """Torch reports a full disk as a RuntimeError of its zip writer: say what it means."""
    try:
        yield
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise UserError(
            f"checkpoint {folder} could not be written ({str(error).splitlines()[0]}). Is the disk full? The "
            "checkpoints written before are whole; free some space and resume"
        ) from error
