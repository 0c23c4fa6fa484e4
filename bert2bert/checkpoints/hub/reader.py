"""Read Hugging Face folders: ``config.json`` and safetensors, in one file or several with an index.

Weights only, each in the dtype stored. Integer tensors (old checkpoints keep ``position_ids``) are buffers, not
parameters. Refuses, as InvalidCheckpoint: missing, truncated and foreign files, tensors without elements, and what
`hub_files` refuses.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.hub.files import INDEX, is_there, open_file, refuse_empty, refuse_quantised, weight_files
from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.source import Source, TensorMeta
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.texts import read_json

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PRECISION = {"float16": "fp16", "bfloat16": "bf16"}


class HubSource(Source):
    """A Hugging Face folder. ``precision``: that in which most of the weights are stored."""

    format = "hub"

    def __init__(self, path: Path, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(path, folder, manifest)
        config = read_json(folder / "config.json") if is_there(folder / "config.json") else None
        files, index, self.notes = weight_files(folder, config)
        self._handles = {file: open_file(folder / file) for file in files}
        self._file_of: dict[str, str] = {}
        stored: dict[str, str] = {}
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                stored[name] = self._add(name, file, handle)
        for name, file in index.items():
            if self._file_of.get(name) != file:
                raise InvalidCheckpoint(f"{folder / INDEX}: says that {file} holds '{name}', which it does not")
        refuse_quantised(folder, config, stored)
        refuse_empty(folder, [name for name, meta in self.tensors.items() if meta.shape == (0,)], len(self.tensors))
        for name in (manifest.buffers or ()) if manifest else ():  # the files do not tell
            if name in self.tensors:
                del self.tensors[name]
                self.buffers[name] = self._stored(name)
        if not self.tensors:
            raise InvalidCheckpoint(f"{folder}: its safetensors hold no floating-point tensor")
        self.precision = self._main_precision()
        self.files = [folder / name for name in (*files, *([INDEX] if index else []), "config.json")]
        self.files = [file for file in self.files if file.is_file()]

    def _main_precision(self) -> str:
        elements: Counter[str] = Counter()
        for meta in self.tensors.values():
            elements[_PRECISION.get(meta.dtype, "fp32")] += meta.numel
        return elements.most_common(1)[0][0]

    def _add(self, name: str, file: str, handle: Any) -> str:
        """Enter a tensor; its dtype in the file's words."""
        if name in self._file_of:
            raise InvalidCheckpoint(f"{self.folder}: '{name}' is in both {self._file_of[name]} and {file}")
        self._file_of[name] = file
        stored = handle.get_slice(name)
        kind = str(stored.get_dtype())
        if dtype := _DTYPES.get(kind):
            self.tensors[name] = TensorMeta(name, tuple(stored.get_shape()), dtype, None, True)
        elif kind.startswith(("I", "U", "B", "C")):  # integers, bool, complex
            self.buffers[name] = handle.get_tensor(name)
        return kind

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        return self._stored(meta.name, slice(start, stop)) if meta.shape else self._stored(meta.name)

    def _stored(self, name: str, rows: slice | None = None) -> torch.Tensor:
        handle = self._handles[self._file_of[name]]
        found: torch.Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return found
