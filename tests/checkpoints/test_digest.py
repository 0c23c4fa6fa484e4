"""The digest against its definition in Python integers, and its additivity."""

import itertools
import struct

import pytest
import torch

from bert2bert.files.digest import _on_device, combine, digest, hex16


def weight(n: int) -> int:
    z = (n + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) | 1


def reference(values: list[float], code: str, start: int = 0) -> int:
    unsigned = {"f": "I", "e": "H", "d": "Q"}[code]
    bits = [struct.unpack(unsigned, struct.pack(code, value + 0.0))[0] for value in values]
    units, first = bits, start
    if code == "d":
        units, first = [half for b in bits for half in (b % 2**32, b >> 32)], 2 * start
    return (
        sum(
            (unit + 1) * weight(k % 2**16 // 2) * 2 ** (32 * (k % 2)) * weight(2**16 + k // 2**16)
            for k, unit in enumerate(units, first)
        )
        % 2**64
    )


def test_splitmix() -> None:
    """The first output for seed 0 that its authors' implementations print."""
    assert weight(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, "f"), (torch.float16, "e"), (torch.float64, "d")])
def test_equals_definition(dtype: torch.dtype, code: str) -> None:
    x = torch.randn(257, dtype=dtype)
    x[3], x[4] = 0.0, -0.0
    assert digest(x) == reference(x.tolist(), code)
    for start in (12345, 2**15 - 100, 2**16 - 100, 2**40 - 7):  # the last ones cross from one block to the next
        assert digest(x, start) == reference(x.tolist(), code, start)


def test_parts_add_up_over_any_partition_and_chunk() -> None:
    x = torch.randn(3 * (1 << 20) + 17)
    cuts = [0, 5, 1 << 20, (1 << 21) + 3, x.numel()]
    parts = [digest(x[a:b], a) for a, b in itertools.pairwise(cuts)]
    assert combine(*parts) == digest(x) == digest(x.view(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
def test_other_devices_find_the_same(dtype: torch.dtype) -> None:
    x = (torch.randn((1 << 20) + 333) * 100).to(dtype)
    x[5] = -0.0 if dtype.is_floating_point else 0
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    for start in (0, 2**16 - 7, 2**33 + 1):
        assert _on_device(bits, start, dtype.is_floating_point) == digest(x, start)


def test_negative_zero_is_zero_and_any_change_shows() -> None:
    x = torch.randn(64).bfloat16()
    x[7] = 0.0
    same = x.clone()
    same[7] = -0.0
    assert digest(same) == digest(x)
    swapped = x.clone()
    swapped[[1, 2]] = x[[2, 1]]
    flipped = x.clone()
    flipped[5] *= -1
    assert len({digest(x), digest(swapped), digest(flipped), digest(x[:-1]), digest(x, 1)}) == 5


def test_hex_is_sixteen_digits() -> None:
    assert hex16(255) == "00000000000000ff"
    assert digest(torch.empty(0)) == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float64, torch.float32, torch.bfloat16])
def test_what_is_digested_stays_as_it_is(dtype: torch.dtype) -> None:
    tensor = torch.arange(5).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    assert torch.equal(tensor, torch.arange(5).to(dtype))
