"""Sizes that matrix-product kernels like: the nearest one to a size that is wanted."""

from __future__ import annotations

from math import gcd, isclose, lcm

KERNELS = 64
"""Sizes that kernels like are multiples of it."""
WIDE = 256
"""From here on a size is rounded to such multiples."""


def unit(old: int) -> int:
    """What sizes are rounded to a multiple of, beside one of this size."""
    return KERNELS if old >= WIDE else gcd(old, KERNELS)


def nearest(wanted: float, step: int, old: int) -> int:
    """The size nearest to one that is wanted: itself, where it is a multiple of step; else a multiple of 128 or 64,
    too, unless that is more than a tenth away. old: the size beside which it is chosen."""
    if isclose(wanted, round(wanted)) and round(wanted) % step == 0 and round(wanted) > 0:
        return round(wanted)
    multiples = (lcm(step, 2 * unit(old)), lcm(step, unit(old)))
    liked = [max(m, round(wanted / m) * m) for m in multiples]
    found = min(liked, key=lambda size: abs(size - wanted))
    return found if abs(found - wanted) <= 0.1 * wanted else max(step, round(wanted / step) * step)
