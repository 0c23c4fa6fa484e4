"""A bins folder that is not what its meta.json tells is refused, with the file named; and the embedded corpus."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bert2bert.data.bins import TokenBins
from bert2bert.data.corpus import books
from bert2bert.errors import InvalidData
from tests.data.fixtures import write_bins


def edit(**changes: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return apply


def save(name: str, array: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / name, array)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "does not exist"),
    (lambda f: (f / "meta.json").unlink(), "has no meta.json"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json cannot be read"),
    (lambda f: (f / "meta.json").write_text("[]"), "holds a list, expected an object"),
    (edit(format_version=3), "format version 3, this program reads versions 1 to 2"),
    (edit(format_version=1, special={"pad": 0}), "special id unk = None"),
    (edit(vocab_size="50"), "vocab_size = '50', expected a value of type int"),
    (edit(dtype="uint32"), "dtype 'uint32' for a vocabulary of 50"),
    (edit(special={"pad": 50}), "special id pad = 50, expected 0 to 49"),
    (edit(special={"end": 0}), "the role 'end' to a token, expected pad, unk"),
    (edit(sentinels=[49, "48"]), r"sentinels\[1\] = '48'"),
    (edit(sentinels=None), "sentinels = None"),
    (edit(special={"eos": 1}, add_bos=True), "special id bos = None"),
    (edit(splits={"train": {"tokens": 600, "documents": 2}}), "for split 'heldout'"),
    (lambda f: (f / "train.bin").unlink(), "train.bin is missing"),
    (lambda f: (f / "train.bin").write_bytes(b"\0" * 1198), "1198 bytes, meta.json expects 1200"),
    (lambda f: (f / "heldout.idx.npy").unlink(), "heldout.idx.npy is missing"),
    (lambda f: (f / "train.idx.npy").write_bytes(b"junk"), "train.idx.npy cannot be read"),
    (save("train.idx.npy", np.array([0, 600])), r"int64 \(2,\), expected int64 \(3,\)"),
    (save("train.idx.npy", np.array([0, 100, 600], dtype=np.int32)), "holds int32"),
    (save("train.idx.npy", np.array([0, 700, 600])), "does not rise from 0 to 600"),
    (save("train.idx.npy", np.array([0, 100, 599])), "does not rise from 0 to 600"),
    (lambda f: (f / "tokenizer.json").write_text("other"), "belong to another tokenizer"),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    bins = write_bins(tmp_path / "bins", [100, 500], vocab_size=50)
    ids, offsets = TokenBins.open(bins.folder).split("train")
    assert ids.shape == (600,) and offsets.tolist() == [0, 100, 600] and ids.dtype == np.uint16
    damage(bins.folder)
    with pytest.raises(InvalidData, match=message):
        TokenBins.open(bins.folder)


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="no split 'validation'"):
        write_bins(tmp_path / "bins", [100], vocab_size=50).split("validation")


def test_embedded_books_begin_with_their_titles() -> None:
    titles = {
        "emma": "EMMA",
        "mansfield_park": "MANSFIELD PARK",
        "moby_dick": "MOBY-DICK; OR, THE WHALE",
        "northanger_abbey": "NORTHANGER ABBEY",
        "persuasion": "Persuasion",
        "pride_and_prejudice": "PRIDE AND PREJUDICE",
        "sense_and_sensibility": "SENSE AND SENSIBILITY",
    }
    found = books()
    texts = {name: lzma.decompress(path.read_bytes()).decode("utf-8") for name, path in found.items()}
    assert {name: text.splitlines()[0] for name, text in texts.items()} == titles
    assert 920_000 < sum(len(text.split()) for text in texts.values()) < 930_000
    assert sum(path.stat().st_size for path in found.values()) < 1_600_000
    for name, heroine in (("emma", "Knightley"), ("persuasion", "Wentworth"), ("moby_dick", "Ahab")):
        assert [n for n, text in texts.items() if heroine in text] == [name]
