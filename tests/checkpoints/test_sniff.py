"""What files are by their first bytes, the files made by the programs that make such files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_of

from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader
from bert2bert.files.sniff import describe, kind_of, sniff

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 440449768\n"
TEXT = "Größe 5 µm, 東京\n" * 60


def stream(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tar(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")


def parquet(file: io.BytesIO) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)


WEIGHTS = {"a": torch.ones(3)}
FILES: dict[str, list[bytes]] = {
    "empty": [b""],
    "zeros": [bytes(4096), bytes(3)],
    "git-lfs": [POINTER, POINTER.replace(b"git-lfs.github.com", b"hawser.github.com")],
    "git-annex": [b"/annex/objects/SHA256E-s440449768--4d4d.safetensors\n", b"../.git/annex/objects/x/y\n"],
    "html": [
        b"<!DOCTYPE html>\n<html class=''>", b"\xef\xbb\xbf<HTML><head>", b"<!-- error --><html>",
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    ],
    "torch-legacy": [stream(lambda f: torch.save(WEIGHTS, f, _use_new_zipfile_serialization=False))],
    "zip": [stream(lambda f: torch.save(WEIGHTS, f)), stream(zipped)],
    "pickle": [pickle.dumps({"a": 1}, protocol) for protocol in (2, 3, 4, 5)],
    "safetensors": [safetensors_of(WEIGHTS), safetensors_of({f"a.{i}": torch.ones(9) for i in range(900)})],
    "gzip": [gzip.compress(TEXT.encode())],
    "bzip2": [bz2.compress(TEXT.encode()), bz2.compress(b"")],
    "gguf": [b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0"],
    "xz": [lzma.compress(TEXT.encode())],
    "tar": [stream(tar)],
    "numpy": [stream(lambda f: np.save(f, np.ones(3)))],
    "parquet": [stream(parquet)],
    "utf-16": [TEXT.encode("utf-16"), b"\xfe\xff" + TEXT.encode("utf-16-be")],
    "utf-32": [TEXT.encode("utf-32")],
    **{
        name: [TEXT.encode(name), "東京で研究を\n".encode(name)]
        for name in ("utf-16le", "utf-16be", "utf-32le", "utf-32be")
    },
    "utf-8-bom": [TEXT.encode("utf-8-sig")],
    "text": [
        *((" " * i + TEXT).encode() for i in range(4)), b"Entry not found", b'{"error": "gated"}', b"BZh9", b"GGUF is",
    ],
    "binary": [
        TEXT[:20].encode("latin-1", "replace"), b"a\0b", b"a long line and a NUL\0 in it", b"\xff" * 9, bytes(8) + b"{",
        bytes(range(1, 256)) * 3,
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_kinds(tmp_path: Path, kind: str) -> None:
    for content in FILES[kind]:
        path = tmp_path / "file"
        path.write_bytes(content)
        assert sniff(path) == (kind, len(content), content[:512])
        description = describe(path)
        assert (
            description.endswith(".")
            and "\n" not in description
            and "{" not in description.replace(repr(content[:32]), "")
        )


def test_characters_cut_at_the_end_of_what_is_read() -> None:
    for at in range(4):
        assert kind_of((b" " * at + "𝄞".encode() * 200)[:512], 9000) == "text"
    assert kind_of("é".encode()[:1], 1) == "binary"  # cut at the end of the file


def test_a_pointer_says_the_size_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(POINTER)
    assert re.search(r"git-lfs pointer.*440,449,768 bytes\. Run `git lfs pull`", describe(tmp_path / "a"))


def test_the_way_out_of_torchs_old_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        InvalidCheckpoint, match=r"old\.pt: not a torch file: in torch's format from before 1\.6"
    ) as caught:
        torch_reader.load(path)
    (code,) = re.findall(r'python -c "(.*)" FILES', str(caught.value))
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
    assert torch_reader.load(path)["a"].tolist() == [0, 1, 2]
