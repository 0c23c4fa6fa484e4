"""The interval arithmetic against a brute-force simulation: flatten an index tensor, cut it, look where things went."""

import math

import pytest

from bert2bert.checkpoints.zero.layout import parameter_alignment, zero3_layout, zero3_sub_group, zero12_layout

NUMELS = [(7,), (1, 1, 1), (32, 1, 5, 64, 3), (100, 2), (2, 2, 2, 2)]


@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("alignment", [1, 4, 8])
def test_zero12_pieces_are_where_flattening_puts_them(numels: tuple[int, ...], world: int, alignment: int) -> None:
    flat: list[tuple[int, int] | None] = []
    for i, n in enumerate(numels):
        while len(flat) % alignment:
            flat.append(None)
        flat += [(i, k) for k in range(n)]
    total = len(flat)
    flat += [None] * (-total % (2 * world))
    layout = zero12_layout(numels, world, alignment)
    assert (layout.total, layout.padded, layout.partition) == (total, len(flat), len(flat) // world)
    assert [a + n + g for a, n, g in zip(layout.offsets, numels, layout.gaps, strict=True)] == [
        *layout.offsets[1:],
        total,
    ]
    for rank, pieces in enumerate(layout.pieces):
        shard = flat[rank * layout.partition : (rank + 1) * layout.partition]
        seen: list[tuple[int, int] | None] = [None] * len(shard)
        for param, start, stop, at in pieces:
            seen[at : at + stop - start] = [(param, k) for k in range(start, stop)]
        assert seen == shard
        beyond = [rank * layout.partition + k >= total for k in range(len(shard))]
        assert layout.paddings[rank] == sum(beyond)


@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("sub_group_size", [1, 20, 10**9])
def test_zero3_sub_groups_follow_deepspeed(numels: tuple[int, ...], world: int, sub_group_size: int) -> None:
    slices = [math.ceil(n / world) for n in numels]
    expected: list[list[int]] = []  # the loop of stage3._create_fp16_sub_groups
    if sub_group_size >= sum(slices):
        expected = [list(range(len(numels)))]
    else:
        current: list[int] = []
        for i in range(len(numels)):
            current.append(i)
            if sum(slices[k] for k in current) >= sub_group_size or i == len(numels) - 1:
                expected.append(current)
                current = []
    groups = zero3_layout(numels, world, sub_group_size)
    assert [list(g.params) for g in groups] == expected
    for group in groups:
        assert group == zero3_sub_group(numels, world, group.params)
        assert group.numel == sum(slices[i] for i in group.params)
        found: dict[int, list[int]] = {i: [] for i in group.params}
        for pieces in group.pieces:
            for param, start, stop, at in pieces:
                assert at == group.offsets[group.params.index(param)]
                found[param] += range(start, stop)
        assert found == {i: list(range(numels[i])) for i in group.params}


def test_alignment_and_empty_groups() -> None:
    assert [parameter_alignment(4), parameter_alignment(2), parameter_alignment(4, enabled=False)] == [4, 8, 1]
    empty = zero12_layout([], 3)
    assert (empty.total, empty.partition, empty.pieces, empty.paddings) == (0, 0, ((), (), ()), (0, 0, 0))
    assert zero3_layout([], 3) == []
    for bad in (lambda: zero12_layout([1], 0), lambda: zero12_layout([-1], 1), lambda: zero12_layout([1], 1, 0)):
        with pytest.raises(ValueError, match="impossible layout"):
            bad()
