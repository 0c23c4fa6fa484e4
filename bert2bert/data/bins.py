"""Token bins: a folder of memory-mapped token ids with document boundaries.

    tokenizer.json        the tokenizer that made the ids
    tokenizer_config.json what transformers must know to make the same of it: the roles of its special tokens
    meta.json             sizes, ids of special tokens by role, digests, entropies, where the text came from
    {split}.bin           token ids, uint16 or uint32, documents one behind the other, no special tokens added
    {split}.idx.npy       int64 offsets of the documents, one more than there are documents

Splits: 'train' and 'heldout'. Folders of format version 1, whose tokenizers have BERT's five special tokens, are read.
Refuses, with `InvalidData`: a folder that is not bins, or one whose files do not have the sizes, boundaries and
tokenizer that are recorded in its meta.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from bert2bert.data.vocabulary import ROLES, Vocabulary
from bert2bert.errors import InvalidData, did_you_mean

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
_FIELDS: dict[str, type] = {
    "format_version": int,
    "vocab_size": int,
    "dtype": str,
    "special": dict,
    "tokenizer_digest": str,
    "digest": str,
    "splits": dict,
    "sources": list,
}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 when every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def blake(chunks: Iterable[bytes | memoryview]) -> str:
    """Hex BLAKE2b (16 bytes) of the chunks in order."""
    digest = blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenBins:
    """An opened bins folder; `meta` is meta.json."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> TokenBins:
        """Open and check a bins folder: reads meta.json, the tokenizer and the offsets, not the tokens."""
        folder = Path(folder).expanduser()
        file = folder / "meta.json"
        if not file.is_file():
            what = "has no meta.json" if folder.is_dir() else "does not exist"
            raise InvalidData(f"token bins {folder}: the folder {what}.\n  Make it with: bert2bert prepare --output …")
        try:
            meta = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidData(f"token bins {folder}: meta.json cannot be read: {error}.\n  {_AGAIN}") from error
        _check_meta(folder, meta)
        bins = cls(folder, meta)
        digest = blake([bins._bytes("tokenizer.json")])
        if digest != meta["tokenizer_digest"]:
            raise InvalidData(
                f"token bins {folder}: tokenizer.json has digest {digest}, meta.json says {meta['tokenizer_digest']}.\n"
                f"  The ids belong to another tokenizer. {_AGAIN}"
            )
        for split in meta["splits"]:
            bins.split(split)
        return bins

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table that the ids need."""
        return int(self.meta["vocab_size"])

    @property
    def special(self) -> dict[str, int]:
        """Role -> id, of the special tokens that the tokenizer has."""
        return self.meta["special"]

    @property
    def vocabulary(self) -> Vocabulary:
        """What the tokenizer offers to an objective."""
        older = " (token bins of an older version, which record BERT's roles only)"
        return Vocabulary(
            self.vocab_size, self.special, tuple(self.meta.get("sentinels", ())), self.meta.get("add_bos", False),
            where=f"the tokenizer of {self.folder}" + older * (self.meta["format_version"] == 1),
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """Digest of the tokens and boundaries of every split."""
        return self.meta["digest"]

    @property
    def tokenizer_digest(self) -> str:
        """Digest of tokenizer.json."""
        return self.meta["tokenizer_digest"]

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, offsets): uint16 or uint32 [tokens] and int64 [documents + 1], both memory-mapped."""
        if name not in self.meta["splits"]:
            raise InvalidData(f"token bins {self.folder}: no split '{name}'; {did_you_mean(name, self.meta['splits'])}")
        recorded = self.meta["splits"][name]
        tokens, documents = recorded["tokens"], recorded["documents"]
        dtype = np.dtype(self.meta["dtype"])
        self._size(f"{name}.bin", tokens * dtype.itemsize)
        ids = np.memmap(self.folder / f"{name}.bin", dtype=dtype, mode="r", shape=(tokens,))
        index = f"{name}.idx.npy"
        self._size(index, None)
        try:
            offsets = np.load(self.folder / index, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InvalidData(f"token bins {self.folder}: {index} cannot be read: {error}.\n  {_AGAIN}") from error
        if offsets.dtype != np.int64 or offsets.shape != (documents + 1,):
            raise InvalidData(
                f"token bins {self.folder}: {index} holds {offsets.dtype} {offsets.shape}, expected int64"
                f" ({documents + 1},) for {documents} documents.\n  {_AGAIN}"
            )
        if offsets[0] != 0 or offsets[-1] != tokens or bool((np.diff(offsets) <= 0).any()):
            raise InvalidData(
                f"token bins {self.folder}: {index} does not rise from 0 to {tokens} tokens (it runs from {offsets[0]}"
                f" to {offsets[-1]}).\n  {_AGAIN}"
            )
        return ids, offsets

    def _size(self, name: str, expected: int | None) -> None:
        file = self.folder / name
        if not file.is_file():
            raise InvalidData(f"token bins {self.folder}: {name} is missing.\n  {_AGAIN}")
        found = file.stat().st_size
        if expected is not None and found != expected:
            raise InvalidData(
                f"token bins {self.folder}: {name} has {found} bytes, meta.json expects {expected}.\n"
                f"  The file is truncated or foreign. {_AGAIN}"
            )

    def _bytes(self, name: str) -> bytes:
        self._size(name, None)
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise InvalidData(f"token bins {self.folder}: {name} cannot be read: {error}.\n  {_AGAIN}") from error


class SplitWriter:
    """Appends documents to one split's files; `counts`: int64 [vocab_size], how often each id was written."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, vocab_size: int) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.tokens = self.documents = self._open = 0
        self._pending: list[int] = []
        self._ended: list[int] = []
        self.digest = blake2b(digest_size=16)
        self.bin = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 (closed by close)
        self.ends = open(folder / f"{split}.ends", "wb")  # noqa: SIM115

    def add(self, ids: list[int], ends: bool) -> None:
        """Write a piece of a document; `ends`: its last."""
        self._pending += ids
        self.tokens += len(ids)
        self._open += len(ids)
        if ends and self._open:  # a document that the tokenizer drops altogether leaves no trace
            self._ended.append(self.tokens)
            self.documents += 1
            self._open = 0
        if len(self._pending) + len(self._ended) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        ids = np.asarray(self._pending, dtype=self.dtype)
        self.bin.write(ids.data)
        self.digest.update(ids.data)
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.ends.write(np.asarray(self._ended, dtype="<i8").data)
        self._pending, self._ended = [], []

    def close(self) -> None:
        """Turn the raw document ends into `{split}.idx.npy`."""
        self._flush()
        self.bin.close()
        self.ends.close()
        raw = self.folder / f"{self.split}.ends"
        with open(raw, "rb") as ends, open(self.folder / f"{self.split}.idx.npy", "wb") as index:
            header = {"descr": "<i8", "fortran_order": False, "shape": (self.documents + 1,)}
            np.lib.format.write_array_header_1_0(index, header)
            index.write(np.int64(0).tobytes())
            while block := ends.read(1 << 20):
                index.write(block)
                self.digest.update(block)
        raw.unlink()


_AGAIN = "Copy the folder again from where it was made, or make it again with bert2bert prepare."


def _check_meta(folder: Path, meta: Any) -> None:
    def wrong(what: str) -> InvalidData:
        return InvalidData(f"token bins {folder}: meta.json {what}.\n  {_AGAIN}")

    if not isinstance(meta, dict):
        raise wrong(f"holds a {type(meta).__name__}, expected an object")
    for key, kind in _FIELDS.items():
        if not isinstance(meta.get(key), kind):
            raise wrong(f"has {key} = {meta.get(key)!r}, expected a value of type {kind.__name__}")
    if not 1 <= meta["format_version"] <= FORMAT_VERSION:
        raise wrong(f"has format version {meta['format_version']}, this program reads versions 1 to {FORMAT_VERSION}")
    if meta["vocab_size"] < 1 or meta["dtype"] != token_dtype(meta["vocab_size"]).name:
        raise wrong(f"has dtype {meta['dtype']!r} for a vocabulary of {meta['vocab_size']}")
    if what := _wrong_special(meta):
        raise wrong(what)
    for split in SPLITS:
        recorded = meta["splits"].get(split)
        for key in ("tokens", "documents"):
            if not isinstance(recorded, dict) or not isinstance(recorded.get(key), int) or recorded[key] < 1:
                raise wrong(f"records no positive number of {key} for split '{split}'")


def _wrong_special(meta: dict[str, Any]) -> str | None:
    """What is wrong with the special tokens of a meta.json."""
    special, sentinels, bos = meta["special"], meta.get("sentinels", []), meta.get("add_bos", False)
    if odd := sorted(special.keys() - set(ROLES)):
        return f"gives the role {odd[0]!r} to a token, expected {', '.join(ROLES)}"
    if not isinstance(sentinels, list) or not isinstance(bos, bool):
        return f"has sentinels = {sentinels!r}, add_bos = {bos!r}, expected a list of ids and true or false"
    needed = ROLES[:5] if meta["format_version"] == 1 else ("bos",) if bos else ()
    ids = {**dict.fromkeys(needed), **special, **{f"sentinels[{i}]": value for i, value in enumerate(sentinels)}}
    for key, value in ids.items():
        if not isinstance(value, int) or not 0 <= value < meta["vocab_size"]:
            return f"has special id {key} = {value!r}, expected 0 to {meta['vocab_size'] - 1}"
    return None
