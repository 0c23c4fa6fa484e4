"""Hugging Face folders: `config.json`, safetensors (split with an index above a size), and what lies beside them.

A safetensors file is a length, a JSON header and the tensors' bytes; the header is known from the shapes, so the
tensors are streamed after it and never held. Tied tensors are stored once under the kept name, as `save_pretrained`
does. A tensor has its own dtype by ``spec.dtypes``, else that of ``spec.precision``; digests are of the elements as
stored. Buffers are stored as they are.

Refuses (UnsupportedGrowth) buffers of a dtype that safetensors lacks.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bert2bert.checkpoints.hub import experts
from bert2bert.checkpoints.hub.beside import json_bytes
from bert2bert.checkpoints.job import FilePlan, Job, TargetSpec, flat_values, write_bytes
from bert2bert.errors import UnsupportedGrowth
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank, stream

MAX_FILE_BYTES = 5 * 10**9
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


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
    """The target's config with its dtype, else that of ``spec.precision``, under the key that transformers
    reads here, and without the name of another file of weights."""
    rest = {k: v for k, v in spec.config.items() if k not in ("dtype", "torch_dtype", "transformers_weights")}
    return {**rest, _dtype_key(): spec.config.get("dtype", str(spec.dtype).removeprefix("torch."))}


def _dtype_key() -> str:
    try:
        release = importlib.metadata.version("transformers").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return "dtype"
    return "dtype" if tuple(int(number) for number in release) >= (4, 56) else "torch_dtype"


def _blanks(job: Job) -> dict[str, Blank]:
    spec, found = job.spec, {}
    for name, shape in spec.shapes.items():
        for stored, (part, start) in experts.stored(name, shape, spec.config).items():
            values = partial(_values, job, name, start, start + math.prod(part))
            found[stored] = Blank(part, spec.stored_dtype(name), values)
    for name, buffer in spec.buffers.items():
        kind = f"{buffer.layout} {buffer.dtype}" if isinstance(buffer, torch.Tensor) else "no plain tensor"
        if not isinstance(buffer, torch.Tensor) or buffer.dtype not in _NAMES or buffer.layout != torch.strided:
            raise UnsupportedGrowth(
                f"the buffer {name} is {kind}, which a Hugging Face folder cannot hold. Leave it out of the "
                "checkpoint, or choose another format."
            )
        found[name] = Blank(tuple(buffer.shape), buffer.dtype, partial(tuple, [buffer]))
    return found


def _weights(job: Job, blanks: dict[str, Blank], file: Sink) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, blank in blanks.items():
        start, end = end, end + blank.nbytes
        header[name] = {"dtype": _NAMES[blank.dtype], "shape": list(blank.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the first tensor starts aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for blank in blanks.values():
        for block in stream(blank, job.tally.wrote):
            file.write(block)
    return end


def _values(job: Job, name: str, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Elements [start, stop) of a model's tensor, as stored."""
    for piece in flat_values(job.values, job.spec, name, "fp32", start, stop):
        stored = piece.to(job.spec.stored_dtype(name))
        job.tally.digest(name, "fp32", stored, start)
        start += piece.numel()
        yield stored
