"""Read Hugging Face folders: ``config.json`` and safetensors, in one file or several with an index.

Weights only, in the dtype stored. Integer tensors (old checkpoints keep ``position_ids``) are buffers, not parameters.
Refuses, as InvalidCheckpoint: pickled weights (``pytorch_model.bin``), missing, truncated and foreign files, an index
that does not describe its files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bert2bert.errors import InvalidCheckpoint
from bert2bert.shards import experts
from bert2bert.shards.disk import inside
from bert2bert.shards.source import Source, TensorMeta, read_json

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PRECISION = {"float16": "fp16", "bfloat16": "bf16"}


class HubSource(Source):
    """A Hugging Face folder."""

    form = "hub"

    def __init__(self, path: Path, folder: Path, manifest: dict[str, Any] | None) -> None:
        super().__init__(path, folder, manifest)
        index = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
        files = self._files(index)
        self._handles = {file: self._open(folder / file) for file in files}
        self._file_of: dict[str, str] = {}
        self._names: dict[str, experts.Parts] = {}  # where a tensor has another name in the files, or several
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                self._add(name, file, handle)
        for name, file in (index or {}).items():
            if name not in self._handles[file].keys():  # noqa: SIM118
                raise InvalidCheckpoint(f"{folder / INDEX}: says that {file} holds '{name}', which it does not")
        self._fuse()
        if not self.tensors:
            raise InvalidCheckpoint(f"{folder}: its safetensors hold no floating-point tensor")
        self.precision = _PRECISION.get(next(iter(self.tensors.values())).dtype, "fp32")
        self.files = [folder / name for name in [*files, INDEX, "config.json"] if (folder / name).is_file()]

    def _files(self, index: Any) -> list[str]:
        if index is not None:
            if not isinstance(index, dict) or not index:
                raise InvalidCheckpoint(f"{self.folder / INDEX}: has no 'weight_map' of names to files")
            return [name for name in sorted({str(file) for file in index.values()}) if inside(self.folder, name)]
        found = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not found:
            raise InvalidCheckpoint(
                f"{self.folder}: its weights are pickled (pytorch_model.bin). Convert them to safetensors: "
                "AutoModel.from_pretrained(...).save_pretrained(...), with the class that fits."
            )
        if "model.safetensors" in found:
            return ["model.safetensors"]
        if len(found) > 1:
            raise InvalidCheckpoint(f"{self.folder}: {len(found)} safetensors files without {INDEX}. Copy it too.")
        return found

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu").__enter__()
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{path}: no such file, though {INDEX} names it. Copy all shards.") from None
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(
                f"{path}: not readable as safetensors ({error}): truncated or another format. Copy it again."
            ) from None

    def _add(self, name: str, file: str, handle: Any) -> None:
        if name in self._file_of:
            raise InvalidCheckpoint(f"{self.folder}: '{name}' is in both {self._file_of[name]} and {file}")
        self._file_of[name] = file
        stored = handle.get_slice(name)
        if dtype := _DTYPES.get(stored.get_dtype()):
            self.tensors[name] = TensorMeta(name, tuple(stored.get_shape()), dtype, None, True)
        else:
            self.buffers[name] = handle.get_tensor(name)

    def _fuse(self) -> None:
        """Give experts, stored one by one, the names and shapes of transformers' models."""
        single, shapes = self.tensors, {name: meta.shape for name, meta in self.tensors.items()}
        self._names = experts.fused(single)
        known = {part for parts in self._names.values() for expert in parts for part in expert}
        self.tensors = {}
        for name, meta in single.items():
            if name not in known:
                renamed = experts.model_name(name)
                self.tensors[renamed] = replace(meta, name=renamed)
                if renamed != name:
                    self._names[renamed] = ((name,),)
        for name, parts in self._names.items():
            if name not in self.tensors:
                shape = experts.shape(name, parts, shapes)
                self.tensors[name] = TensorMeta(name, shape, single[parts[0][0]].dtype, None, True)

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        parts = self._names.get(meta.name, ((meta.name,),))
        if len(meta.shape) == 3 and meta.name in self._names:  # rows are experts
            each = [torch.cat([self._stored(name) for name in expert]) for expert in parts[start:stop]]
            return torch.stack(each) if each else torch.empty(0, *meta.shape[1:])
        name = parts[0][0]
        return self._stored(name, slice(start, stop)) if meta.shape else self._stored(name)

    def _stored(self, name: str, rows: slice | None = None) -> torch.Tensor:
        handle = self._handles[self._file_of[name]]
        found: torch.Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        return found
