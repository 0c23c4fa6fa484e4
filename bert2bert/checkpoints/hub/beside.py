"""What lies in a Hugging Face folder beside its weights and config, and which of it a new folder gets.

A grown model keeps the tokenizer and the generation config. The same model written again keeps every small file: its
code, its card, preprocessors, too. What is not carried is listed.

Refuses (InvalidCheckpoint) git-lfs pointers, links to nothing, and files that cannot be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.hub.files import is_there
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files.sniff import describe, sniff

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model",
    "tekken.json", "bpe.codes", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "*.tiktoken", "tokenization_*.py",
)  # fmt: skip
"""Patterns of the files that make a tokenizer."""
GENERATION = "generation_config.json"
_NOT_CARRIED = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.bin", "*.pt", "*.pth", "*.ckpt*", "*.h5",
    "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.npz", "*.ot", "*.tflite", "*.mlmodel", "*.pkl",
    "events.out.tfevents*",
)  # fmt: skip
"""Weights in any format, states of optimizers, logs."""
_LARGEST = 64 * 2**20  # bytes of a file
_MOST = 1000  # files of a folder
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def grown_beside(config: Mapping[str, Any], *folders: Path) -> dict[str, bytes]:
    """Name -> content of what a grown model's folder holds beside weights and config: the tokenizer's files and, if the
    config's class generates, the generation config of the source, which lie in ``folders`` (an earlier one counts
    more). A model whose source has no generation config gets one of the config's special tokens."""
    generates = any(str(name).endswith(_GENERATES) for name in config.get("architectures") or ())
    found: dict[str, bytes] = {}
    for pattern in (*TOKENIZER, GENERATION) if generates else TOKENIZER:
        for folder in folders:
            for file in sorted(folder.glob(pattern)) or [folder / pattern]:  # which may be a link to nothing
                if is_there(file):
                    found.setdefault(file.relative_to(folder).as_posix(), content_of(file))
    known = {key: config[key] for key in _SPECIAL if config.get(key) is not None}
    if generates and known and GENERATION not in found:
        found[GENERATION] = json_bytes({"_from_model_config": True, **known})
    return found


def all_beside(folder: Path) -> dict[str, bytes]:
    """Name -> content of every small file that is neither weights nor config, for the same model written again. A
    folder in it that holds weights is another model or checkpoint."""
    found: dict[str, bytes] = {}
    for path in _visible(folder):
        inner = [path] if path.is_file() else sorted(path.rglob("*"))
        if len(inner) <= _MOST and not any(map(_not_carried, inner)):
            found |= {f.relative_to(folder).as_posix(): content_of(f) for f in inner if f.is_file()}
    return {name: content for name, content in found.items() if name != "config.json"}


def left_beside(folder: Path, kept: Iterable[str], read: Iterable[Path]) -> list[str]:
    """The names of files and folders that lie there and are neither kept nor read."""
    known = {*(name.split("/")[0] for name in kept), *(file.name for file in read), "config.json"}
    return [path.name + "/" * path.is_dir() for path in _visible(folder) if path.name not in known]


def json_bytes(tree: Any) -> bytes:
    """JSON as this project stores it."""
    return (json.dumps(tree, indent=2) + "\n").encode()


def content_of(file: Path) -> bytes:
    """Of a small file that is carried. Raises InvalidCheckpoint for a pointer in its place, and for one that cannot be
    read."""
    try:
        if sniff(file).kind in ("git-lfs", "git-annex"):
            raise InvalidCheckpoint(f"{file}: {describe(file)}")
        return file.read_bytes()
    except OSError as error:
        raise InvalidCheckpoint(f"{file}: cannot be read ({error.strerror}). Copy it again, or remove it.") from None


def _not_carried(file: Path) -> bool:
    matched = any(fnmatchcase(file.name, pattern) for pattern in _NOT_CARRIED)
    return file.is_file() and (matched or file.stat().st_size > _LARGEST)


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, but hidden files, manifests and unfinished output."""
    found = (p for p in sorted(folder.iterdir()) if not p.name.startswith("."))
    return [path for path in found if path.name != MANIFEST and path.suffix != ".partial"]
