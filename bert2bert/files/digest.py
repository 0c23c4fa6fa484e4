"""A digest of a tensor's elements that adds up over any partition of it, so ranks digest what they hold and sum.

A tensor is a sequence of 32-bit units: an element of 4 bytes is one, of 1 or 2 bytes one with zeros above, of 8 bytes
two, the low one first; -0.0 counts as 0.0. With k the index of a unit in the whole tensor and B = 2**16,

``digest = Σ_k (unit_k + 1) * weight(k mod B div 2) * 2**(32 * (k mod 2)) * weight(B + k div B)  mod 2**64``

where ``weight(n)`` is the n-th output of SplitMix64 (Steele et al., OOPSLA 2014), made odd: multilinear hashing with
fixed keys, two units in one multiplication. It finds wrong, moved, missing and stale elements; it is no
defence against a forger.

`file_digest` is of a file's bytes: XXH3 of 128 bits, which costs next to nothing beside the disk (7 GB/s where SHA-256
does 0.7 and BLAKE2b 0.24). `xxhsum -H2 FILE` prints the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_MASK = (1 << 64) - 1
FILE_DIGEST = "xxh3_128"  # what manifests call `file_digest`
TENSOR_DIGEST = "multilinear_units32"  # and `digest`
_BUFFER = 1 << 20  # bytes of a file read at a time
_BLOCK = 1 << 16  # B; a block of units and its weights, 256 KiB and 128, stay in a core's cache
_CHUNK = 1 << 20  # elements at a time
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16}


@lru_cache(1 << 12)  # tensors of one shape ask for the same
def _weights(first: int, last: int) -> Words:
    """Outputs [first, last) of SplitMix64 from seed 0, made odd: then no change of one element goes unseen."""
    z = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@cache
def _in_block() -> tuple[Words, list[int]]:
    """The weights of a block's pairs of units, and the sums, from its start, of the weights of its units."""
    pairs = _weights(0, _BLOCK // 2)
    return pairs, [0, *np.cumsum(np.stack([pairs, pairs << np.uint64(32)], 1).reshape(-1)).tolist()]


def digest(flat: torch.Tensor, start: int = 0) -> int:
    """Digest of a contiguous tensor's elements (any shape, read flat), the first at flat index ``start`` of the whole.

    Returns an integer in [0, 2**64). Parts of one tensor add: see `combine`. Any device; any floating or integer dtype
    of 1, 2, 4 or 8 bytes.
    """
    flat = flat.detach().reshape(-1)
    size = flat.element_size()
    signed = flat.is_floating_point() and size > 1  # eight-bit floats differ in what their top bit means
    bits = flat.view(_SIGNED[size])
    if bits.device.type != "cpu":
        return _on_device(bits, start, signed)
    total, wide, negative = 0, 1 + (size == 8), torch.iinfo(bits.dtype).min  # the bits of -0.0
    for at in range(0, bits.numel(), _CHUNK):
        values = bits[at : at + _CHUNK].numpy()
        if signed and values.min() == negative:
            values = np.where(values == negative, values.dtype.type(0), values)
        if size < 4:
            values = values.view(_UNSIGNED[size]).astype(np.uint32)
        total += _units(values.view(np.uint32), (start + at) * wide)
    return total & _MASK


def _units(units: NDArray[np.uint32], start: int) -> int:
    """`digest` of units, one at least, the first at index ``start``."""
    pairs, sums = _in_block()
    stop, total = start + len(units), 0
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    for block, factor in enumerate(_weights(_BLOCK + first, _BLOCK + last).tolist(), first):
        base = block * _BLOCK
        low, high = max(start - base, 0), min(stop - base, _BLOCK)
        part = units[base + low - start : base + high - start]
        found = sums[high] - sums[low]
        if low % 2:  # the second of its pair
            found += int(part[0]) * int(pairs[low // 2]) << 32
            low, part = low + 1, part[1:]
        if len(part) % 2:  # the first of its pair
            found += int(part[-1]) * int(pairs[high // 2])
            high, part = high - 1, part[:-1]
        found += int(np.dot(part.view(np.uint64), pairs[low // 2 : high // 2]))  # on little-endian machines
        total += found * factor
    return total


def _on_device(bits: torch.Tensor, start: int, signed: bool) -> int:
    """`digest` by torch, of elements viewed as signed integers; ``signed``: whether a top bit alone is -0.0."""
    size, total = bits.element_size(), 0
    weights = torch.from_numpy(_in_block()[0].view(np.int64)).to(bits.device)
    for at in range(0, bits.numel(), _CHUNK):
        values = bits[at : at + _CHUNK].to(torch.int64, copy=True)  # it is changed in place below
        first = start + at
        if signed:
            values = values.masked_fill(values == -(1 << (8 * size - 1)), 0)
        if size == 8:
            values, first = torch.stack([values & 0xFFFFFFFF, values >> 32], 1).reshape(-1), 2 * first
        values.bitwise_and_((1 << 8 * min(size, 4)) - 1).add_(1)
        index = torch.arange(first, first + values.numel(), device=bits.device)
        low, high = first // _BLOCK, (first + values.numel() - 1) // _BLOCK + 1
        factors = torch.from_numpy(_weights(_BLOCK + low, _BLOCK + high).view(np.int64)).to(bits.device)
        values.mul_(weights[index % _BLOCK // 2]).bitwise_left_shift_(index % 2 * 32)
        total += int(values.mul_(factors[index // _BLOCK - low]).sum())
    return total & _MASK


def combine(*parts: int) -> int:
    """The digest of a whole from the digests of its parts (each taken with its own ``start``)."""
    return sum(parts) & _MASK


def hex16(value: int) -> str:
    """A digest as the manifest stores it: 16 lower-case hexadecimal digits."""
    return f"{value & _MASK:016x}"


def file_digest(path: Path, read: Callable[[int], None] | None = None) -> str:
    """Digest of a file's content as 32 hexadecimal digits, streamed; ``read`` gets the bytes of each read."""
    total, buffer = xxhash.xxh3_128(), bytearray(_BUFFER)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(view[:count])
            if read is not None:
                read(count)
    return str(total.hexdigest())
