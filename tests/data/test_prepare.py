"""prepare and TokenBins: what goes in comes out, the same twice, and nothing half-made is left."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bert2bert.data.bins import SplitWriter, TokenBins
from bert2bert.data.corpus import books
from bert2bert.data.prepare import prepare, unigram_cross_entropy
from bert2bert.data.tokenizer import SPECIAL
from bert2bert.data.tokenizer_files import load_tokenizer
from bert2bert.errors import InvalidConfig, InvalidData

TRAIN = "".join(
    f"The {n} cats sat on {m} mats.\nSo did dogs.\n\n" for n in ("three", "four", "nine") for m in ("two", "ten")
)
HELD = "A quite different cat sat down.\n\nAnd a dog, too.\n"


def make(output: Path, text: list[Path] | None = None, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "dataset": None,
        "dataset_config": None,
        "dataset_split": None,
        "text_column": None,
        "tokenizer": None,
        "vocab_size": 120,
        "heldout_text": [],
        "heldout_fraction": 0,
        "document": "blank-line",
        "seed": 0,
        "progress": False,
    }
    return prepare(text=text or [], output=output, **{**values, **options})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "held.txt").write_text(HELD)
    return tmp_path / "train.txt", tmp_path / "held.txt"


def documents(bins: TokenBins, split: str) -> list[str]:
    tokenizer = load_tokenizer(bins.folder).backend
    ids, offsets = bins.split(split)
    return [tokenizer.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in pairwise(offsets)]


def test_round_trip(files: tuple[Path, Path], tmp_path: Path) -> None:
    meta = make(tmp_path / "bins", [files[0]], heldout_text=[files[1]])
    bins = TokenBins.open(tmp_path / "bins")
    assert bins.meta == meta
    assert meta["dtype"] == "uint16" and bins.vocab_size == load_tokenizer(bins.folder).backend.get_vocab_size()
    read = documents(bins, "train")
    assert len(read) == meta["splits"]["train"]["documents"] == 6
    assert read[0].replace(" ", "") == "thethreecatssatontwomats.sodiddogs."
    assert len(documents(bins, "heldout")) == 2
    ids, _ = bins.split("train")
    assert len(ids) == meta["splits"]["train"]["tokens"] and not set(ids.tolist()) & {0, 2, 3, 4}
    assert set(bins.special) == set(SPECIAL) and bins.special["pad"] == 0
    assert not (tmp_path / "bins.partial").exists()


@pytest.mark.parametrize(("document", "count"), [("file", 1), ("blank-line", 6), ("line", 12)])
def test_what_a_document_is(files: tuple[Path, Path], tmp_path: Path, document: str, count: int) -> None:
    whole = make(tmp_path / "a", [files[0]], heldout_text=[files[1]], document=document)
    assert whole["splits"]["train"]["documents"] == count
    assert (
        whole["splits"]["train"]["tokens"]
        == make(tmp_path / "b", [files[0]], heldout_text=[files[1]])["splits"]["train"]["tokens"]
    )


def test_compressed_text_is_the_same_text(files: tuple[Path, Path], tmp_path: Path) -> None:
    digests = {make(tmp_path / "plain", [files[0]], heldout_text=[files[1]])["digest"]}
    ways: dict[str, Callable[[bytes], bytes]] = {
        "t.txt.gz": gzip.compress,
        "t.xz": lzma.compress,
        "t.bz2": bz2.compress,
        "t.GZ": gzip.compress,
        "unnamed": bz2.compress,
        "marked.txt": lambda text: b"\xef\xbb\xbf" + text,
        "windows.txt": lambda text: text.replace(b"\n", b"\r\n"),
    }
    for name, compress in ways.items():
        (tmp_path / name).write_bytes(compress(TRAIN.encode()))
        digests.add(make(tmp_path / f"{name}.bins", [tmp_path / name], heldout_text=[files[1]])["digest"])
    assert len(digests) == 1


def test_a_long_document_read_in_pieces_has_the_tokens_of_the_whole(tmp_path: Path) -> None:
    book = books()["persuasion"]
    text = lzma.decompress(book.read_bytes()).decode()[:300_000]
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "held.txt").write_text(HELD)
    make(tmp_path / "bins", [tmp_path / "book.txt"], heldout_text=[tmp_path / "held.txt"], document="file")
    ids, offsets = TokenBins.open(tmp_path / "bins").split("train")
    whole = load_tokenizer(tmp_path / "bins").backend.encode(text, add_special_tokens=False).ids
    assert offsets.tolist() == [0, len(whole)] and ids.tolist() == whole


def test_same_input_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, [books()["persuasion"]], heldout_fraction=0.1, vocab_size=400, seed=3)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    other = make(tmp_path / "c", [books()["persuasion"]], heldout_fraction=0.1, vocab_size=400, seed=4)
    assert other["digest"] != json.loads((tmp_path / "a/meta.json").read_text())["digest"]


def test_held_out_documents_are_not_trained_on_even_as_duplicates(tmp_path: Path) -> None:
    lines = [f"{word} number {n}" for n in range(200) for word in ("alpha", "beta")]
    (tmp_path / "t.txt").write_text("\n".join(lines + lines))
    meta = make(tmp_path / "bins", [tmp_path / "t.txt"], heldout_fraction=0.25, document="line")
    bins = TokenBins.open(tmp_path / "bins")
    train, held = documents(bins, "train"), documents(bins, "heldout")
    assert not set(train) & set(held)
    assert len(train) + len(held) == 800
    assert 0.15 < len(held) / 800 < 0.35
    assert meta["splits"]["heldout"]["documents"] == len(held)


def test_tokenizer_sees_only_training_text(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("Ξένος Ξένος ξένος\n")
    make(tmp_path / "bins", [files[0]], heldout_text=[tmp_path / "held.txt"])
    assert not any("ξ" in token for token in load_tokenizer(tmp_path / "bins").backend.get_vocab())
    ids, _ = TokenBins.open(tmp_path / "bins").split("heldout")
    assert set(ids.tolist()) == {TokenBins.open(tmp_path / "bins").special["unk"]}


def test_entropies(files: tuple[Path, Path], tmp_path: Path) -> None:
    meta = make(tmp_path / "bins", [files[0]], heldout_text=[files[1]])
    ids, _ = TokenBins.open(tmp_path / "bins").split("heldout")
    train, _ = TokenBins.open(tmp_path / "bins").split("train")
    held = meta["splits"]["heldout"]
    counts = np.unique(ids, return_counts=True)[1] / len(ids)
    assert held["unigram_entropy"] == pytest.approx(-(counts * np.log(counts)).sum(), rel=1e-12)
    model = [(int((train == i).sum()) + 1) / (len(train) + meta["vocab_size"]) for i in ids]
    assert held["unigram_cross_entropy"] == pytest.approx(-np.log(model).mean(), rel=1e-12)
    assert unigram_cross_entropy(np.ones(7, int), np.ones(7, int), 0) == pytest.approx(np.log(7))


def test_special_tokens_written_in_the_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("before [MASK] after [SEP] and [CLS] more\n" * 5)
    (tmp_path / "h.txt").write_text("see [PAD]\n")
    make(tmp_path / "bins", [tmp_path / "t.txt"], heldout_text=[tmp_path / "h.txt"], document="line")
    bins = TokenBins.open(tmp_path / "bins")
    for split in ("train", "heldout"):
        found = set(bins.split(split)[0].tolist())
        assert not found & {bins.special[key] for key in ("pad", "cls", "sep", "mask")}


def test_a_given_tokenizer_is_taken(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = make(tmp_path / "a", [files[0]], heldout_text=[files[1]])
    for i, path in enumerate((tmp_path / "a", tmp_path / "a" / "tokenizer.json")):
        again = make(tmp_path / f"b{i}", [files[0]], heldout_text=[files[1]], tokenizer=path)
        assert (again["digest"], again["tokenizer_digest"]) == (first["digest"], first["tokenizer_digest"])
    vocab = load_tokenizer(tmp_path / "a").backend.get_vocab()
    (tmp_path / "v").mkdir()
    (tmp_path / "v/vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.__getitem__)))
    for i, path in enumerate((tmp_path / "v", tmp_path / "v" / "vocab.txt")):
        assert (
            make(tmp_path / f"c{i}", [files[0]], heldout_text=[files[1]], tokenizer=path)["digest"] == first["digest"]
        )
    (tmp_path / "v/tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = make(tmp_path / "d", [files[0]], heldout_text=[files[1]], tokenizer=tmp_path / "v")
    assert cased["digest"] != first["digest"]


def test_truncation_and_padding_in_a_tokenizer_are_off(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = make(tmp_path / "a", [files[0]], heldout_text=[files[1]], document="file")
    tokenizer = load_tokenizer(tmp_path / "a").backend
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "t.json"))
    again = make(tmp_path / "b", [files[0]], heldout_text=[files[1]], document="file", tokenizer=tmp_path / "t.json")
    assert again["digest"] == first["digest"]


def test_large_vocabulary_takes_32_bits(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = [*SPECIAL.values(), "the", "cat", *(f"w{i}" for i in range(70_000)), "cats"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    meta = make(tmp_path / "bins", [files[0]], heldout_text=[files[1]], tokenizer=tmp_path / "vocab.txt")
    ids, _ = TokenBins.open(tmp_path / "bins").split("train")
    assert meta["dtype"] == "uint32" and ids.max() == len(words) - 1 == 70_007


def test_local_datasets(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [{"body": block + "\n", "n": i} for i, block in enumerate(TRAIN.split("\n\n")[:-1])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = datasets.Dataset.from_list(records)
    data.to_parquet(str(tmp_path / "d.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.jsonl").write_text((tmp_path / "d.jsonl").read_text())
    plain = make(tmp_path / "plain", [files[0]], heldout_text=[files[1]])
    for name in ("d.jsonl", "d.parquet", "saved", "dict", "folder"):
        options = {"dataset": str(tmp_path / name), "text_column": "body", "heldout_text": [files[1]]}
        meta = make(tmp_path / f"{name}-bins", **options)
        assert meta["digest"] == plain["digest"], name
    meta = make(tmp_path / "records", **options, document="file")
    assert meta["splits"]["train"]["documents"] == len(records)
    with pytest.raises(InvalidData, match=r"no column 'text'.*body, n.*\n.*--text-column"):
        make(tmp_path / "x", dataset=str(tmp_path / "d.jsonl"), heldout_text=[files[1]])
    with pytest.raises(InvalidData, match="holds int, expected text"):
        make(tmp_path / "x", dataset=str(tmp_path / "d.jsonl"), text_column="n", heldout_text=[files[1]])
    with pytest.raises(InvalidData, match="no split 'trian'; did you mean 'train'"):
        make(tmp_path / "x", dataset=str(tmp_path / "dict"), dataset_split="trian", heldout_text=[files[1]])
    with pytest.raises(InvalidData, match=r"cannot be opened.*\n(.*\n)*.*save_to_disk"):
        make(tmp_path / "x", dataset="no-such-owner/no-such-name", heldout_text=[files[1]])
    (tmp_path / "d.docx").write_text("x")
    with pytest.raises(InvalidData, match=r"unknown kind '\.docx'"):
        make(tmp_path / "x", dataset=str(tmp_path / "d.docx"), heldout_text=[files[1]])
    assert not (tmp_path / "x").exists()


ODD_LINES = [
    "one\u2028line",
    "of\x85text",
    "tab\x0b and\x0cfeeds",
    "\x1cfile\x1dgroup\x1erecord",
    "đến 中文",
    "NA",
    "007",
    "1.0",
    "true",
]


def bytewise(at: Path) -> Path:
    """A byte-level tokenizer, to which every character counts, line ends included."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*names, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(at / "bytes.json"))
    return at / "bytes.json"


@pytest.mark.parametrize("document", ["file", "blank-line", "line"])
def test_a_table_has_the_documents_of_the_same_text(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = ODD_LINES if document != "blank-line" else [f"{line}\nnext\r\n\r{line}\n" for line in ODD_LINES]
    texts = [tmp_path / f"{i}.txt" for i in range(len(records))]  # a file a record
    for text, record in zip(texts, records, strict=True):
        text.write_bytes(record.encode() + b"\n")
    lines = "".join(json.dumps({"text": record}, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "d.jsonl").write_text(lines, "utf-8", newline="\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_text(json.dumps([{"text": record} for record in records]))
    (tmp_path / "d.ndjson").write_text(lines, "utf-8", newline="\n")
    (tmp_path / "folder").mkdir()
    for name in ("d.csv", "folder/train.csv"):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text"], *([record] for record in records)])
    options: dict[str, Any] = {"tokenizer": bytewise(tmp_path), "heldout_text": [files[1]], "document": document}
    plain = make(tmp_path / "plain", texts, **options)
    assert plain["splits"]["train"]["documents"] == (2 if document == "blank-line" else 1) * len(records)
    for name in ("d.jsonl", "d.jsonl.gz", "d.ndjson", "d.json", "d.csv", "folder"):
        assert make(tmp_path / f"{name}-bins", dataset=str(tmp_path / name), **options)["digest"] == plain["digest"]
    if document == "line":
        (tmp_path / "all.txt").write_bytes("\n".join(records).encode())
        assert make(tmp_path / "all", [tmp_path / "all.txt"], **options)["digest"] == plain["digest"]
        ids, offsets = TokenBins.open(tmp_path / "all").split("train")
        read = Tokenizer.from_file(str(tmp_path / "bytes.json"))
        wanted = [read.encode(record).ids for record in records]
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == wanted


def test_numbers_alone_are_words_in_a_csv_table(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, content in (("d.csv", "n,text\n1,007\n2,1e5\n3,\n"), ("d.tsv", "n\ttext\n1\t007\n2\t1e5\n3\n")):
        (tmp_path / name).write_text(content)
        make(
            tmp_path / f"{name}-bins",
            dataset=str(tmp_path / name),
            tokenizer=bytewise(tmp_path),
            heldout_text=[files[1]],
        )
        ids, offsets = TokenBins.open(tmp_path / f"{name}-bins").split("train")
        read = Tokenizer.from_file(str(tmp_path / "bytes.json"))
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [read.encode(word).ids for word in ("007", "1e5")]


@pytest.mark.parametrize(
    "content", ["text,label\nhello, the world,pos\n", "text,label\nhello,pos,\n", "text\nhello,1\n"]
)
@pytest.mark.parametrize("name", ["d.csv", "folder/train.csv"])
def test_rows_wider_than_their_header_are_refused(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    given = tmp_path / name if name == "d.csv" else tmp_path / "folder"
    with pytest.raises(InvalidData, match=r"first row has more fields than its header \(text.*\n.*quotes"):
        make(tmp_path / "bins", dataset=str(given), heldout_text=[files[1]])


def test_records_without_text_are_counted(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d.jsonl").write_text('{"text": "the cat"}\n{"content": "a mat"}\n{"text": null}\n{"text": ""}\n')
    make(tmp_path / "bins", dataset=str(tmp_path / "d.jsonl"), tokenizer=bytewise(tmp_path), heldout_text=[files[1]])
    assert "2 of 4 records have nothing in column 'text'" in capsys.readouterr().err


def test_line_ends_inside_records_are_read_as_those_of_files_and_it_is_reported(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d.jsonl").write_text('{"text": "a cat\\r\\na mat"}\n{"text": "the\\rcat"}\n{"text": "the cat"}\n')
    (tmp_path / "d.txt").write_bytes(b"a cat\r\na mat\n\nthe\rcat\n\nthe cat\n")
    tokenizer = bytewise(tmp_path)
    make(tmp_path / "r", dataset=str(tmp_path / "d.jsonl"), tokenizer=tokenizer, heldout_text=[files[1]])
    assert "2 of 3 records have line ends of Windows" in capsys.readouterr().err
    make(tmp_path / "t", text=[tmp_path / "d.txt"], document="blank-line", tokenizer=tokenizer, heldout_text=[files[1]])
    assert (tmp_path / "r" / "train.bin").read_bytes() == (tmp_path / "t" / "train.bin").read_bytes()


BAD_RECORDS = [
    (b'"fine"\n"so"\n', "line 1 is not a JSON record: it holds a str, expected an object"),
    (b'{"text": "fine"}\n{"text": "x\n{"text": "y"}\n', r"line 2 is not a JSON record: .*column.*'{\"text\": \"x'"),
    (b'{"text": "fine"}\n\n{"text": "x"}, \n', "line 3 is not a JSON record: Extra data"),
    (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "record 2 cannot be read: .*0xe9"),
    (b'{"text": "fine"}\n{"text": "\\ud83d"}\n', "line 2 is not a JSON record: .*surrogate"),
    (b'{"text": "fine"}\n{"text": "x', "line 2 is not a JSON record: Unterminated string"),
    (b'{"text": "fine"}\n{"text": 3}\n', r"holds int, expected text \(record 2: '3'\)"),
    ('{"text": "x"}\n'.encode("utf-16"), "is text in UTF-16.*iconv"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a git-lfs pointer"),
    (b"", "is empty"),
]


@pytest.mark.parametrize(("content", "message"), BAD_RECORDS)
def test_the_cause_of_a_broken_record_is_shown(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        make(tmp_path / "bins", dataset=str(tmp_path / "bad.jsonl"), heldout_text=[files[1]])


def test_the_remedy_for_emoji_in_halves_makes_utf8_of_them(tmp_path: Path) -> None:
    """The command that the message gives, run as it stands, gives the emoji that Python's own UTF-16 codec joins."""
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_bytes("café ".encode() + b"\xed\xa0\xbd\xed\xb8\x80\n")
    with pytest.raises(InvalidData) as refused:
        make(tmp_path / "bins", text=[old], heldout_fraction=0.5)
    remedy = str(refused.value).split("Join the halves: ")[1].splitlines()[0]
    remedy = remedy.replace("FILE", str(old)).replace("NEW", str(new))
    subprocess.run(remedy, shell=True, check=True)
    assert new.read_text() == "café 😀\n"


BAD_FILES = [
    ("missing.txt", None, "does not exist"),
    ("empty.txt", b"", r"is empty \(0 bytes\)"),
    ("blank.txt", b"\n  \n\n", "only blank lines"),
    ("latin1.txt", b"fine\ncaf\xe9 au lait\n", r"byte 0xe9 in line 2, .*WINDOWS-1252 'café'.*\n.*the one in which"),
    ("cp1252.txt", b"an \x93odd\x94 quote\n", "byte 0x93 in line 1.*WINDOWS-1252 '“odd”'"),
    ("sjis.txt", "ascii\n研究を\n".encode("shift_jis"), r"byte 0x8c in line 2.*SHIFT_JIS '研究を'"),
    ("late.txt", b"line\n" * 40_000 + b"caf\xe9\n", "byte 0xe9 in line 40001"),
    ("mixed.txt", "đến\n".encode() + b"caf\xe9\n", "byte 0xe9 in line 2, with UTF-8 before it: .*damaged"),
    ("cesu.txt", b"ok \xed\xa0\xbd\xed\xb8\x80\n", r"byte 0xed in line 1 begins a UTF-16 pair .*CESU-8.*\n.*Join the"),
    ("cesu_late.txt", "đến\n".encode() + b"ok \xed\xa0\xbd\xed\xb8\x80\n", "byte 0xed in line 2 begins a UTF-16 pair"),
    ("half.txt", b"a\xed\xa0\x80b\n", "byte 0xed in line 1, which no older encoding that is known explains: .*damaged"),
    ("spanish.txt", b"aqu\xed\xbb dijo\n", "byte 0xed in line 1, .*WINDOWS-1252 'aquí»'"),
    ("cut.txt", "Việt".encode()[:-2], "not UTF-8: byte 0xe1 in line 1"),
    *(
        (f"{name}.txt", "xin chào\n".encode(name), f"is text in {name.upper()}.*iconv -f {name.upper()} -t UTF-8")
        for name in ("utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be")
    ),
    ("han.txt", "中文字研究\n青葉山で研究をしています。\n".encode("utf-16le"), "is text in UTF-16LE"),
    ("wide.txt.gz", gzip.compress("xin chào\n".encode("utf-16"), mtime=0), r"\(decompressed\) is text in UTF-16"),
    ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a git-lfs pointer"),
    ("book.docx", b"PK\x03\x04\x14\0", "is a zip archive.*Unpack it"),
    ("new.txt.zst", b"\x28\xb5\x2f\xfd\0\0", "compressed with zstd. Decompress it"),
    ("a.tar.gz", gzip.compress(b"t.txt".ljust(257, b"\0") + b"ustar", mtime=0), "is a tar archive"),
    ("nul.txt", b"fine\n" * 200 + b"no\0\n", "NUL character in line 201"),
    ("image.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not known"),
    ("table.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0), "is a .jsonl table"),
    ("bad.gz", b"no gzip at all", "is named .gz, but is text"),
    ("short.gz", gzip.compress(bytes(range(65, 91)) * 4000, mtime=0)[:60], "cannot be read"),
    ("bad.xz", b"no xz at all", "is named .xz, but is text"),
    ("worse.bz2", b"d\xe9chir\xe9", "is named .bz2, but is of a kind that is not known"),
    ("other.gz", bz2.compress(b"text"), "is named .gz, but is compressed with bzip2"),
    ("short.xz", lzma.compress(TRAIN.encode() * 50)[:-40], "cannot be read"),
    ("table.jsonl", b'{"text": "x"}\n', r"table, not plain text.\n.*--dataset"),
    (".", None, r"is a folder.\n.*\*\.txt"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
@pytest.mark.parametrize("side", ["train", "heldout"])
def test_bad_text_files(
    files: tuple[Path, Path], tmp_path: Path, name: str, content: bytes | None, message: str, side: str
) -> None:
    bad = tmp_path / name
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        if side == "train":
            make(tmp_path / "bins", [files[0], bad], heldout_text=[files[1]])
        else:
            make(tmp_path / "bins", [files[0]], heldout_text=[bad])
    assert not (tmp_path / "bins").exists() and not (tmp_path / "bins.partial").exists()


def test_of_a_few_files_one_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest, with its copies, where the fraction alone would take none; names and order make no difference."""
    texts = [tmp_path / f"{name}.txt" for name in "abcd"]
    for number, path in enumerate(texts):
        path.write_text(f"Cat {number} sat.\n\n" * (5 - number % 3))
    made = {}
    for name, order in (("a", texts), ("b", texts[::-1])):
        made[name] = make(tmp_path / name, order, heldout_fraction=1e-9, document="file")
        reported = capsys.readouterr().err
        assert f"takes none of 4 documents; the smallest is held out, {texts[2]} (" in reported
    assert made["a"]["splits"]["heldout"] == made["b"]["splits"]["heldout"]
    assert made["a"]["splits"]["heldout"]["documents"] == 1 and made["a"]["splits"]["train"]["documents"] == 3
    bins = TokenBins.open(tmp_path / "a")
    assert documents(bins, "heldout")[0].count("cat") == 3
    texts[3].write_text(texts[2].read_text())
    assert make(tmp_path / "c", texts, heldout_fraction=1e-9, document="file")["splits"]["train"]["documents"] == 2
    assert "the smallest" in capsys.readouterr().err
    make(tmp_path / "d", texts, heldout_fraction=0.5, document="file", seed=1)
    assert "the smallest" not in capsys.readouterr().err


def test_bad_options(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "bins"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"heldout_text": [files[1]]}, "no text to prepare"),
        ({"text": [files[0]], "heldout_text": [files[1]], "document": "lines"}, "did you mean 'line'"),
        ({"text": [files[0]]}, "--heldout-fraction is 0, expected more than 0"),
        ({"text": [files[0]], "heldout_fraction": 1.5}, "--heldout-fraction is 1.5"),
        ({"text": [files[0]], "heldout_text": [files[1]], "heldout_fraction": 0.1}, "both given"),
        ({"text": [files[0]], "heldout_text": [files[0]]}, "given 2 times"),
        ({"text": [files[0]], "heldout_text": [files[1]], "vocab_size": 10}, "--vocab-size is 10"),
    ]
    for options, message in cases:
        with pytest.raises(InvalidConfig, match=message):
            make(out, **options)
    copy = tmp_path / "copy.txt"
    copy.write_text(TRAIN)
    for text, count in (([files[0]], "nothing of the only document"), ([files[0], copy], "none of the 2 documents")):
        with pytest.raises(InvalidData, match=f"'heldout' got {count}"):
            make(out, text, heldout_fraction=1e-9, document="file")
    copy.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.txt", "train.txt"]


@pytest.mark.parametrize("missing", list(SPECIAL.values()))
def test_tokenizer_without_a_special_token(files: tuple[Path, Path], tmp_path: Path, missing: str) -> None:
    words = [token for token in SPECIAL.values() if token != missing] + ["the", "cats", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    unknown = r"the unknown token \[UNK\] is not in its vocabulary"
    absent = rf"can train nothing; not masked \(no {missing[1:-1].lower()} token\)"
    with pytest.raises(InvalidData, match=unknown if missing == SPECIAL["unk"] else absent):
        make(tmp_path / "bins", [files[0]], heldout_text=[files[1]], tokenizer=tmp_path / "vocab.txt")


def test_tokenizer_that_cannot_be_read(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "none").mkdir()
    for path, message in (
        ("tokenizer.json", "cannot be read"),
        ("gone.json", "does not exist"),
        ("none", "neither tokenizer.json nor vocab.txt"),
    ):
        with pytest.raises(InvalidData, match=message):
            make(tmp_path / "bins", [files[0]], heldout_text=[files[1]], tokenizer=tmp_path / path)


def test_an_existing_output_is_kept(files: tuple[Path, Path], tmp_path: Path) -> None:
    make(tmp_path / "bins", [files[0]], heldout_text=[files[1]])
    before = {file.name: file.read_bytes() for file in (tmp_path / "bins").iterdir()}
    with pytest.raises(InvalidData, match="already holds token bins"):
        make(tmp_path / "bins", [files[1]], heldout_text=[files[0]])
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "bins").iterdir()}
    with pytest.raises(InvalidData, match="exists already"):
        make(files[0], [files[0]], heldout_text=[files[1]])
    assert files[0].read_text() == TRAIN
    (tmp_path / "new").mkdir()
    make(tmp_path / "new", [files[0]], heldout_text=[files[1]])


def test_a_killed_run_is_swept_and_foreign_folders_are_not(files: tuple[Path, Path], tmp_path: Path) -> None:
    partial = tmp_path / "bins.partial"
    partial.mkdir()
    (partial / "train.bin").write_bytes(b"half")
    make(tmp_path / "bins", [files[0]], heldout_text=[files[1]])
    assert not partial.exists()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial/thesis.doc").write_text("mine")
    with pytest.raises(InvalidData, match=r"thesis\.doc"):
        make(tmp_path / "other", [files[0]], heldout_text=[files[1]])
    assert (tmp_path / "other.partial/thesis.doc").read_text() == "mine"


def test_a_full_disk_leaves_nothing(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, ids: list[int], ends: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SplitWriter, "add", full)
    with pytest.raises(InvalidData, match=r"cannot be written.*No space left"):
        make(tmp_path / "bins", [files[0]], heldout_text=[files[1]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.txt", "train.txt"]
