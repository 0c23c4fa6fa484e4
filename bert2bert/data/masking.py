"""Dynamic masking (Devlin et al. 2019, section 3.1): of the chosen positions 80 % become [MASK], 10 % a random token,
10 % stay.

Randomness is a hash of (seed, row number, slot), so what a row looks like depends only on its number: not on the
batch it lies in, the rank, the world size or what came before. In every row round(mlm_probability x real tokens) places
are chosen, uniformly among those that hold no special token, in exactly `quota` places a row; spare places carry the
label -100. So shapes are static.
"""

from __future__ import annotations

import numpy as np

from bert2bert.data.vocabulary import Vocabulary
from bert2bert.errors import InvalidConfig

IGNORE = -100
GOLDEN = 0x9E3779B97F4A7C15
_FULL = (1 << 64) - 1


def mix(value: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser, in place: uint64 any shape → well-mixed uint64 (Steele et al. 2014)."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


class Masker:
    """Masks rows of `seq_len` slots over one vocabulary, whose special tokens are never chosen and never drawn as the
    random token. share: of the tokens, to predict."""

    def __init__(self, vocabulary: Vocabulary, seq_len: int, share: float, seed: int) -> None:
        self.quota = int(share * seq_len + 0.5) if 0 < share < 1 else 0
        if not self.quota:
            raise InvalidConfig(
                f"objective.mlm_probability is {share:g} with seq_len {seq_len}, expected a share between 0 and 1 that"
                " masks at least one position a row."
            )
        if vocabulary.size <= len(vocabulary.all_special):
            raise InvalidConfig(
                f"the vocabulary of {vocabulary.size} tokens holds only special tokens; nothing to mask."
            )
        self.seq_len, self.share, self.mask_id = seq_len, share, vocabulary.special["mask"]
        self._chosen_from = np.ones(vocabulary.size, dtype=bool)
        self._chosen_from[vocabulary.all_special] = False
        self._ordinary = np.flatnonzero(self._chosen_from).astype(np.int64)
        self._slots = mix(np.arange(1, seq_len + 1, dtype=np.uint64) * np.uint64(GOLDEN))
        # A key's low bits are replaced by the slot, so that selecting keys selects slots.
        self._low = np.uint64((1 << (seq_len - 1).bit_length()) - 1)
        self._slot = np.arange(seq_len, dtype=np.uint64)
        self._base = np.uint64(mix_int(seed ^ 0x6D61736B))

    def __call__(self, tokens: np.ndarray, numbers: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mask in place; return flat indices into the rows and the tokens that were there (-100 in spare places).

        tokens: int64 [R, seq_len], written to. numbers: int64 [R], the rows' numbers. real: int64 [R], slots of each
        row that are not filler. Returns int64 [R * quota] twice. Raises IndexError for an id outside the vocabulary.
        """
        rows = len(tokens)
        row_keys = mix(self._base + numbers.astype(np.uint64) * np.uint64(GOLDEN))[:, None]
        keys = mix(row_keys ^ self._slots)
        keys &= ~self._low
        keys |= self._slot
        candidate = self._chosen_from[tokens]
        keys[~candidate] = _FULL
        chosen = np.sort(np.partition(keys, self.quota - 1, axis=1)[:, : self.quota], axis=1)
        count = np.minimum((self.share * real + 0.5).astype(np.int64), candidate.sum(axis=1))
        used = np.arange(self.quota) < count[:, None]
        slot = np.where(used, chosen & self._low, 0).astype(np.int64)
        flat = slot + np.arange(0, rows * self.seq_len, self.seq_len)[:, None]
        flat_tokens = tokens.reshape(-1)
        held = flat_tokens[flat]
        labels = np.where(used, held, IGNORE)
        draw = mix(row_keys + (chosen | np.uint64(1)) * np.uint64(GOLDEN) + (chosen & self._low))
        action, word = draw >> np.uint64(32), draw & np.uint64(0xFFFFFFFF)
        random = self._ordinary[(word * np.uint64(len(self._ordinary))) >> np.uint64(32)]
        new = np.where(action < int(0.8 * 2**32), self.mask_id, np.where(action < int(0.9 * 2**32), random, held))
        flat_tokens[flat[used]] = new[used]
        return flat.reshape(-1), labels.reshape(-1)


def mix_int(value: int) -> int:
    """`mix` of one number, taken modulo 2^64."""
    return int(mix(np.array([value & _FULL], dtype=np.uint64))[0])
