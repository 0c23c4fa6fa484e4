"""The random numbers of a plan: Box and Muller's, one for each word of numpy's Philox, whatever rows are asked for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bert2bert.algebra.draws import drawn, normal_fill, pair_noise
from bert2bert.algebra.plan import Fill, Noise, TensorPlan


def numbers(plan: TensorPlan, purpose: str) -> np.ndarray:
    """All normal numbers of a tensor, by the formula."""
    key = hashlib.blake2b(f"{plan.seed}/{purpose}/{plan.name}".encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)).random_raw(int(np.prod(plan.shape)))
    u, v = ((words >> 32) + 0.5) / 2**32, (words & 0xFFFFFFFF) / 2**32
    return (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).reshape(plan.shape)


def siblings(size: int, features: int) -> np.ndarray:
    """The next copy of the same feature, round and round, where position p is feature p mod ``features``."""
    found = np.arange(size)
    for feature in range(features):
        at = np.flatnonzero(np.arange(size) % features == feature)
        found[at] = np.roll(at, -1)
    return found


@pytest.mark.parametrize(
    ("shape", "dim", "features"),
    [
        ((64, 48), 1, 24), ((64, 48), 1, 32), ((64, 48), 0, 24), ((64, 48), 0, 60), ((64, 48), 1, 48), ((40,), 0, 15),
        ((5, 30, 18), 2, 13), ((5, 30, 18), 1, 20), ((300, 700), 1, 350),
    ],
)  # fmt: skip
def test_numbers_depend_on_their_place_alone(shape: tuple[int, ...], dim: int, features: int) -> None:
    noise = Noise(0.3, dim, siblings(shape[dim], features))
    whole = TensorPlan("encoder.weight", "a <- b", shape, (), noise=noise, seed=3)
    own = numbers(whole, "noise")
    expected = 0.3 / np.sqrt(2) * (own - own.take(noise.sibling, axis=dim))
    filled, repeated = (numbers(whole, "fill") for _ in range(2))
    repeated = repeated[np.arange(shape[0]) % 3]
    for start, stop in ((0, shape[0]), (0, 1), (3, shape[0] - 1), (2, 2), (shape[0] - 1, shape[0])):
        part = whole.narrow(start, stop)
        assert np.array_equal(pair_noise(part, noise), expected[start:stop])
        assert np.array_equal(normal_fill(part, Fill("normal", 0.02)), 0.02 * filled[start:stop])
        assert np.array_equal(normal_fill(part, Fill("normal", 0.02, period=3)), 0.02 * repeated[start:stop])


def test_what_is_drawn_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns, only those of copies; of rows, at most each and its sibling."""
    from bert2bert.algebra import draws

    made = 0
    plain = draws._box_muller

    def counted(words: np.ndarray) -> np.ndarray:
        nonlocal made
        made += words.size
        return plain(words)

    monkeypatch.setattr(draws, "_box_muller", counted)
    for shape, dim, features, numel in (
        ((64, 48), 1, 32, 64 * 32), ((64, 48), 0, 60, 8 * 48), ((64, 48), 1, 48, 0), ((6, 8, 4), 1, 6, 6 * 8 * 4),
    ):  # fmt: skip
        plan = TensorPlan("x", "a <- b", shape, (), noise=Noise(1.0, dim, siblings(shape[dim], features)))
        made = 0
        pair_noise(plan, plan.noise)
        assert made == numel and numel <= drawn(plan) <= 2 * numel
    filled = TensorPlan("x", "a <- b", (64, 48), (), fill=Fill("normal", 1.0))
    made = 0
    normal_fill(filled, filled.fill)
    assert made == drawn(filled) == 64 * 48
