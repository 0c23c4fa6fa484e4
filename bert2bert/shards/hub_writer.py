"""Hugging Face folders: `config.json`, safetensors (split with an index above a size), tokenizer files.

Weights only: transformers makes a model's buffers anew. A safetensors file is a length, a JSON header and the
tensors' bytes; the header is known from the shapes, so the tensors are streamed after it and never held. Tied tensors
are stored once under the kept name, as `save_pretrained` does. `spec.precision` is the dtype of the file; digests are
of the elements as stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert2bert.shards.frames import Blank, stream
from bert2bert.shards.writing import FilePlan, Job, TargetSpec, flat_values

MAX_FILE_BYTES = 5 * 10**9
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def hub_files(job: Job, max_file_bytes: int = MAX_FILE_BYTES) -> list[FilePlan]:
    """The weight files of a Hugging Face folder and, if there are several, their index.

    A tensor is never split, so one larger than ``max_file_bytes`` gets a file of its own.
    """
    bins: list[dict[str, Blank]] = [{}]
    room = max_file_bytes
    for name, blank in _blanks(job).items():
        if bins[-1] and blank.nbytes > room:
            bins.append({})
            room = max_file_bytes
        bins[-1][name] = blank
        room -= blank.nbytes
    if len(bins) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i:05d}-of-{len(bins):05d}.safetensors" for i in range(1, len(bins) + 1)]
    plans = [
        FilePlan(file, sum(blank.nbytes for blank in blanks.values()), partial(_weights, job, blanks))
        for file, blanks in zip(files, bins, strict=True)
    ]
    if len(bins) > 1:
        index = {
            "metadata": {"total_size": sum(plan.payload for plan in plans)},
            "weight_map": {name: file for file, blanks in zip(files, bins, strict=True) for name in blanks},
        }
        plans.append(FilePlan("model.safetensors.index.json", 0, partial(write_bytes, json_bytes(index))))
    return plans


def hub_config(spec: TargetSpec) -> dict[str, Any]:
    """The target's config with the dtype of the stored weights."""
    return {**spec.config, "dtype": str(spec.dtype).removeprefix("torch.")}


def json_bytes(tree: Any) -> bytes:
    """JSON as this project stores it."""
    return (json.dumps(tree, indent=2) + "\n").encode()


def write_bytes(content: bytes, path: Path) -> int:
    """Write a small file, synced to disk; it counts as no tensor data."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return 0


def _blanks(job: Job) -> dict[str, Blank]:
    spec = job.spec
    return {name: Blank(shape, spec.dtype, partial(_stored, job, name)) for name, shape in spec.shapes.items()}


def _weights(job: Job, blanks: dict[str, Blank], path: Path) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, blank in blanks.items():
        start, end = end, end + blank.nbytes
        header[name] = {"dtype": _NAMES[blank.dtype], "shape": list(blank.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blank in blanks.values():
            for block in stream(blank, job.tally.wrote):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return end


def _stored(job: Job, name: str) -> Iterator[torch.Tensor]:
    at = 0
    for piece in flat_values(job.values, job.spec, name, "fp32", 0, job.spec.numel(name)):
        stored = piece.to(job.spec.dtype)
        job.tally.digest(name, "fp32", stored, at)
        at += piece.numel()
        yield stored
