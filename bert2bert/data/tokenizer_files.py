"""A tokenizer out of people's files, as transformers makes it: of a folder, a tokenizer.json or a vocab.txt.

The ids are those of `AutoTokenizer` for the folder, whatever its kind (WordPiece, byte-level BPE, Unigram), and its
special tokens are found in it, not by their names; roles that it lacks stay absent. What transformers itself reads
without a word and gets wrong, or reads another way than one of the files says, is refused or becomes a note.

Refuses, with `InvalidData`: what transformers cannot read, or reads only with Python code (a class that is not fast,
code of the folder's own); settings that it does not honour; special tokens with which no objective can be trained;
added tokens that get other ids than the folder says; pointers, other encodings and archives instead of the files.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert2bert.data.tokenizer import TextTokenizer, failed
from bert2bert.data.tokenizer_checks import (
    CONFIG,
    PROBE,
    adds_bos,
    check_ids,
    check_use,
    contradictions,
    roles,
    sentinels,
)  # fmt: skip
from bert2bert.errors import InvalidData
from bert2bert.files.sniff import describe, sniff

_SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tekken.json")
_MODELS = (".model", ".bpe", ".spm")  # of sentencepiece and tiktoken
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def load_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a folder, or of one vocabulary file under the settings that lie beside it."""
    path = path.expanduser()
    if path.is_dir():
        return _of_folder(path, path)
    if not path.is_file():
        raise InvalidData(
            f"tokenizer {path} does not exist.\n"
            "  Give the path of a tokenizer.json, a vocab.txt or their folder, or leave --tokenizer out to train one."
        )
    with tempfile.TemporaryDirectory() as folder:  # the file with its settings, without the folder's other vocabularies
        shutil.copyfile(path, Path(folder) / ("vocab.txt" if path.suffix == ".txt" else "tokenizer.json"))
        for name in _SETTINGS:
            if (path.parent / name).is_file() and path.name != name:
                shutil.copyfile(path.parent / name, Path(folder) / name)
        return _of_folder(Path(folder), path)


def _of_folder(folder: Path, named: Path) -> TextTokenizer:
    """``named``: what the user gave, for messages."""
    _look(folder, named)
    settings = {
        name: _json(folder / name, named) for name in (*_SETTINGS, "tokenizer.json") if (folder / name).is_file()
    }
    config = settings.get(CONFIG, {})
    code = config.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if code:
        raise InvalidData(
            f"tokenizer {named}: {CONFIG} names code of its own ({_first(code)}), which is not run.\n"
            "  Load it with transformers once (trust_remote_code=True); if it is a fast one, give the folder that its"
            " save_pretrained writes, without auto_map."
        )
    found = _made(folder, named, settings)
    backend = found.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # BPE dropout: the ids of a text would be drawn at random
    check_ids(backend, settings, named)
    special = roles(found, settings, named)
    try:
        state = json.loads(backend.to_str())
        if backend.encode(PROBE, add_special_tokens=False).ids != found(PROBE, add_special_tokens=False)["input_ids"]:
            raise ValueError("its class does more than its tokenizer.json records")
    except BaseException as error:
        if not failed(error):
            raise
        raise InvalidData(
            f"tokenizer {named} cannot be kept as a tokenizer.json ({type(found).__name__}): {_line(error)}\n"
            f"  {_ANOTHER}"
        ) from error
    made = TextTokenizer(
        backend,
        special,
        _written(found, special),
        tuple(contradictions(found, state, settings, folder, named)),
        sentinels(backend),
        adds_bos(found, special),
    )
    check_use(made, found, named)
    rows = settings.get("config.json", {}).get("vocab_size")
    if isinstance(rows, int) and made.table_size > rows:
        note = (
            f"tokenizer {named} has {made.table_size:,} ids, the config.json beside it a vocab_size of {rows:,}: a"
            " model of that config cannot be trained on these bins"
        )
        return replace(made, notes=(*made.notes, note))
    return made


def _made(folder: Path, named: Path, settings: Mapping[str, Any]) -> Any:
    """transformers' fast tokenizer of the folder."""
    import transformers
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    config = settings.get(CONFIG, {})
    model = settings.get("config.json", {})
    kinds = [config.get("tokenizer_class"), model.get("tokenizer_class"), model.get("model_type")]
    bare = not any(kinds) and "tokenizer.json" not in settings and (folder / "vocab.txt").is_file()
    maker: Any = transformers.BertTokenizer if bare else transformers.AutoTokenizer
    what = next((kind for kind in kinds if kind), "of an unnamed class")
    rows = {} if "tokenizer.json" in settings else _rows(folder / "vocab.txt", named)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        found = maker.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **rows)
    except BaseException as error:  # it raises what its parsers and its optional packages raise
        if not failed(error):
            raise
        raise InvalidData(
            f"tokenizer {named} ({what}) cannot be read by transformers {transformers.__version__}:"
            f" {_line(error, named, folder)}\n"
            f"  Expected a tokenizer.json of the tokenizers library, a vocab.txt with one token a line, or another"
            f" folder of which AutoTokenizer makes a fast tokenizer; {CONFIG} says of which class."
        ) from error
    finally:
        transformers.logging.set_verbosity(before)
    kind = type(found).__name__
    if not isinstance(found, TokenizersBackend):
        raise InvalidData(
            f"tokenizer {named} is a {kind}, which splits text in Python code: it cannot be kept as a tokenizer.json.\n"
            f"  {_ANOTHER}"
        )
    # Every class reads a tokenizer.json, also those that do not list it.
    own = {"tokenizer.json", *map(str, type(found).vocab_files_names.values())}
    wanted = own | set(config.get("fast_tokenizer_files") or ())
    present = {file.name for file in folder.iterdir()}
    if not wanted & present and not any(name.endswith(_MODELS) or name == "tekken.json" for name in present):
        raise InvalidData(
            f"tokenizer {named} is a {kind} ({what}), but holds none of {', '.join(sorted(wanted))}.\n"
            f"  Copy its vocabulary there, or correct tokenizer_class in {CONFIG}."
        )
    return found


def _rows(file: Path, named: Path) -> dict[str, dict[str, int]]:
    """{'vocab': token -> row} of a vocab.txt where its reader would lose rows, and number added tokens by what is left.

    It strips white space, so two lines of different spaces become one token, as do two equal lines: the last counts,
    and here the others keep their rows under names that no text has.
    """
    if not file.is_file():
        return {}
    try:
        lines = file.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        number, byte = error.object[: error.start].count(10) + 1, error.object[error.start]
        raise InvalidData(
            f"tokenizer {named}: line {number:,} of its vocabulary is not UTF-8 (byte 0x{byte:02x}).\n"
            "  Copy it again from its source, or convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from error
    tokens = [line.rstrip(_SPACE) for line in lines]
    last = {token: row for row, token in enumerate(tokens)}
    if len(last) == len(tokens):
        return {}
    rows: dict[str, int] = {}
    for row, (line, token) in enumerate(zip(lines, tokens, strict=True)):
        name = token or line.removesuffix("\r")
        lost = name in rows or (token and last[token] != row)
        rows[f"[row {row} of vocab.txt]" if lost else name] = row
    return {"vocab": rows}


def _look(folder: Path, named: Path) -> None:
    """Refuse files that are not text; if the folder has no vocabulary, the message names what it holds."""
    names = sorted(file.name for file in folder.iterdir() if file.is_symlink() or file.is_file())
    vocabularies = [name for name in names if name in _VOCABULARIES or name.endswith(_MODELS)]
    if not vocabularies and not _needs_none(folder, named):
        inner = sorted(str(file.parent) for name in _VOCABULARIES for file in folder.glob(f"snapshots/*/{name}"))
        below = sorted(str(file.parent) for name in _VOCABULARIES for file in folder.glob(f"*/{name}"))
        held = f"the hub's cache: give {inner[0]}" if inner else ", ".join(names[:8]) or "nothing"
        held += f"; a folder in it has one: give {below[0]}" if below else ""
        raise InvalidData(
            f"tokenizer folder {named} holds neither tokenizer.json nor vocab.txt, nor another vocabulary; it holds"
            f" {held}.\n  Give a Hugging Face tokenizer folder, or leave --tokenizer out to train one."
        )
    unread = _MODELS if "tokenizer.json" in names else ()  # a clone without git-lfs often has a pointer there
    for name in (name for name in names if name in (*_SETTINGS, *vocabularies) and not name.endswith(unread)):
        shown = named / name if named.is_dir() else named if name in vocabularies else named.parent / name
        try:
            kind = sniff(folder / name).kind
            description = describe(folder / name).rstrip(".")
        except OSError as error:
            raise InvalidData(
                f"tokenizer {shown} cannot be read: {error.strerror}.\n"
                "  Copy it again, what it links to included, or take it away."
            ) from error
        if kind != "text" and not (kind == "binary" and name.endswith(_MODELS)):
            raise InvalidData(f"tokenizer {shown} is {description}.")
    if (
        vocabularies
        and all(name.endswith(_MODELS) for name in vocabularies)
        and importlib.util.find_spec("sentencepiece") is None
    ):
        raise InvalidData(
            f"tokenizer {named} has a sentencepiece model alone ({', '.join(vocabularies)}), of which transformers"
            " makes a fast tokenizer with the package sentencepiece, which is not installed.\n"
            "  Install it (pip install sentencepiece), or give the folder that the tokenizer's save_pretrained writes"
            " where it is."
        )


def _needs_none(folder: Path, named: Path) -> bool:
    """Whether the folder's class of tokenizer reads no vocabulary, as those that split text into bytes."""
    import transformers

    config = _json(folder / CONFIG, named) if (folder / CONFIG).is_file() else {}
    made = getattr(transformers, str(config.get("tokenizer_class")), None)
    return getattr(made, "vocab_files_names", None) == {}


def _json(file: Path, named: Path) -> dict[str, Any]:
    shown = named if named.is_file() and file.name == "tokenizer.json" else named.parent / file.name
    shown = named / file.name if named.is_dir() else shown
    try:
        found = json.loads(file.read_bytes().decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidData(f"tokenizer {shown} cannot be read: {error}.\n  Copy it again from its source.") from error
    return found


def _written(found: Any, special: Mapping[str, str]) -> dict[str, Any]:
    """tokenizer_config.json of the tokenizer as this project keeps it: its tokenizer.json as it is, with the roles."""
    length = found.model_max_length
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": list(found.model_input_names),
        "padding_side": found.padding_side,
        "clean_up_tokenization_spaces": bool(found.clean_up_tokenization_spaces),
        **({"split_special_tokens": True} if found.split_special_tokens else {}),
        **({"model_max_length": length} if length < 1 << 60 else {}),
        **{f"{role}_token": token for role, token in special.items()},
        **({"additional_special_tokens": extra} if (extra := [str(t) for t in found.extra_special_tokens]) else {}),
    }


def _line(error: BaseException, named: Path | None = None, folder: Path | None = None) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if text.startswith("Couldn't instantiate the backend tokenizer"):  # and three guesses at what may be missing
        text = "it finds no vocabulary for a tokenizer of that class"
    return text.replace(str(folder), str(named)) if folder else text


def _first(code: Any) -> str:
    return str(next((part for part in code if part), code) if isinstance(code, list | tuple) else code)


_ANOTHER = "Give a folder whose tokenizer is a fast one, or leave --tokenizer out to train one."
