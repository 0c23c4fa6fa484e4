"""Two facts that manifests and reports record: values as JSON can hold them, and the versions of the programs."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch


def as_json(value: Any) -> Any:
    """A value as JSON can hold it: tensors become numbers, tuples lists, others their text."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and not value.is_complex() else repr(value.tolist())
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def versions(*packages: str) -> dict[str, str | None]:
    """The version of bert2bert, of torch, and of each of the packages (None: not installed)."""
    return {name: _version(name) for name in ("bert2bert", "torch", *packages)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
