"""Whether a tokenizer that transformers made from people's files is the one that the files describe.

``settings``: file name -> its JSON, of the settings files that exist. Refuses, with `InvalidData`: ids other than the
files say, settings without effect, special tokens with which no objective can be trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from bert2bert.data.objective import OBJECTIVES, lacks, uses
from bert2bert.data.tokenizer import SPECIAL, TextTokenizer
from bert2bert.data.vocabulary import ROLES
from bert2bert.errors import InvalidData

CONFIG = "tokenizer_config.json"
PROBE = (
    "Tiếng Việt, 中文字 İstanbul ﬁn 👩‍💻 don't 1,234.5 \u0627\u0644\u0644\u063a\u0629 a\u200bb\tc"
    " I'LL cafe\u0301 \u2168  two\n\n  x_y"
)
_ROBERTA = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
_NORMAL = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def _added(settings: Mapping[str, Any], named: Path) -> list[tuple[str, str, int]]:
    """(file, token, id) of every token that a file gives an id of its own."""
    file, found = "", []
    try:
        file = "added_tokens.json"
        found += [(file, token, int(index)) for token, index in settings.get(file, {}).items()]
        file = f"{CONFIG} (added_tokens_decoder)"
        listed = settings.get(CONFIG, {}).get("added_tokens_decoder") or {}
        found += [(file, str(token["content"]), int(index)) for index, token in listed.items()]
        file = "tokenizer.json"
        listed = settings.get(file, {}).get("added_tokens") or ()
        found += [(file, str(token["content"]), int(token["id"])) for token in listed]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidData(
            f"tokenizer {named}: the added tokens of {file} are not each a text with its id ({error!r}).\n"
            "  Correct them, or copy the file again from its source."
        ) from error
    return found


def check_ids(backend: Any, settings: Mapping[str, Any], named: Path) -> None:
    """Refuse ids that differ from what the files say, and two tokens with one id: rows of the embedding table would
    mean other tokens than those that they were trained on. And added tokens that normalisation makes equal, of which
    `tokenizers` takes the one or the other from run to run, or makes nothing of, at which it panics."""
    for file, token, index in _added(settings, named):
        given = backend.token_to_id(token)
        if given != index:
            raise InvalidData(
                f"tokenizer {named}: {file} gives {token!r} id {index}, but transformers' fast tokenizer gives it"
                f" {given}, for it numbers added tokens without holes behind the vocabulary's"
                f" {backend.get_vocab_size(with_added_tokens=False):,}.\n"
                "  Correct the one or the other, or fill the rows between with [unused…] tokens in the vocabulary."
            )
    tokens: dict[int, str] = {}
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if tokens.setdefault(index, token) != token:
            raise InvalidData(
                f"tokenizer {named}: {tokens[index]!r} and {token!r} have the same id {index} in transformers, which"
                " numbers an added token by counting distinct ones.\n  Correct repeated lines of the vocabulary."
            )
    normal: dict[str, str] = {}
    for token in backend.get_added_tokens_decoder().values():
        if not token.normalized or backend.normalizer is None:
            continue
        text = backend.normalizer.normalize_str(token.content)
        same = normal.setdefault(text, token.content)
        if not text or same != token.content:
            what = f"tokens {same!r} and {token.content!r} are one" if text else f"token {token.content!r} is nothing"
            raise InvalidData(
                f"tokenizer {named}: the added {what} to its normaliser, and which id a text gets is left to chance.\n"
                "  Take it out, or mark it as not normalized."
            )


def roles(found: Any, settings: Mapping[str, Any], named: Path) -> dict[str, str]:
    """Role -> token, of the roles that there are: as the tokenizer says, else by BERT's or RoBERTa's names if the
    vocabulary has all of them. A token that only transformers' default adds behind the vocabulary has no row in any
    model and is not taken."""
    backend = found.backend_tokenizer
    own = backend.get_vocab(with_added_tokens=False)
    listed = {token for _, token, _ in _added(settings, named)}
    for name in (CONFIG, "special_tokens_map.json"):
        values = (v.get("content") if isinstance(v, dict) else v for v in settings.get(name, {}).values())
        listed |= {value for value in values if isinstance(value, str)}
    known = {token for token in {*own, *listed} if backend.token_to_id(token) is not None}
    given = {role: str(token) for role in ROLES if (token := getattr(found, f"{role}_token", None)) is not None}
    usual = next((n for n in (SPECIAL, _ROBERTA) if all(given.get(role, n[role]) in known for role in n)), {})
    named_or_usual = {**usual, **given}
    special = {role: named_or_usual[role] for role in ROLES if named_or_usual.get(role) in known}
    unknown = getattr(backend.model, "unk_token", None)
    if type(backend.model).__name__ == "WordPiece" and unknown not in own:
        raise InvalidData(
            f"tokenizer {named}: the unknown token {unknown} is not in its vocabulary, so text with an unknown word"
            f" cannot be tokenised.\n  Add it there, or name the vocabulary's own in {CONFIG} (unk_token)."
        )
    return special


def sentinels(backend: Any) -> tuple[str, ...]:
    """T5's ``<extra_id_0>``, ``<extra_id_1>``, … as far as they go without a gap."""
    names = map("<extra_id_{}>".format, count())
    return tuple(takewhile(lambda name: backend.token_to_id(name) is not None, names))


def adds_bos(found: Any, special: Mapping[str, str]) -> bool:
    """Whether the tokenizer's template puts the bos token before a text."""
    if "bos" not in special:
        return False
    text, framed = (found(PROBE, add_special_tokens=added)["input_ids"] for added in (False, True))
    return framed[:1] == [found.backend_tokenizer.token_to_id(special["bos"])] and framed[: len(text)] != text


def check_use(made: TextTokenizer, found: Any, named: Path) -> None:
    """Refuse a tokenizer with which no objective could be trained."""
    if any(not lacks(objective, made.vocabulary) for objective in OBJECTIVES):
        return
    has = ", ".join(f"{role} {token}" for role, token in made.special.items()) or "none"
    raise InvalidData(
        f"tokenizer {named} can train {uses(made.vocabulary)}. Of special tokens, this {type(found).__name__}"
        f" has {has}.\n"
        f"  Name them in {CONFIG} (mask_token, cls_token and sep_token for BERT, eos_token for a decoder), add to the"
        " vocabulary what is not there, or leave --tokenizer out to train one."
    )


def contradictions(
    found: Any, state: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, named: Path
) -> Iterator[str]:
    """Settings that have no effect on the ids: refused if nobody's files say what transformers does, else a note."""
    config, kind = settings.get(CONFIG, {}), type(found).__name__
    bos = getattr(found, "bos_token", None)
    if config.get("add_bos_token") and bos and not adds_bos(found, {"bos": str(bos)}):
        yield (
            f"tokenizer {named}: {CONFIG} has add_bos_token = true, but as transformers reads this folder ({kind}) no"
            f" {bos} is put before a text, and documents begin without it. If the model was trained with it, put the"
            " template into tokenizer.json (post_processor)"
        )
    if _decodes_otherwise(found, state):
        yield (
            f"tokenizer {named}: {kind} turns ids into text in Python code, which a tokenizer.json does not keep:"
            " decode with the tokenizer's own folder; the ids are the same"
        )
    file = _file(folder / "tokenizer.json", named) if "tokenizer.json" in settings else None
    if file and {file["model"]["type"], state["model"]["type"]} != {"WordPiece"}:
        if names := _otherwise(file, state):
            yield (
                f"tokenizer {named}: transformers reads this folder as {kind}, which does not split text as its"
                f" tokenizer.json says ({', '.join(names)}); the ids are those of transformers. If tokenizer.json is"
                f" right, put tokenizer_class: PreTrainedTokenizerFast into {CONFIG}"
            )
        file = None
    if state["model"]["type"] != "WordPiece":
        return
    special = {str(token) for token in found.all_special_tokens}
    model, normal = state["model"], state["normalizer"] or {}
    _refuse_ignored(config, model, special, kind, named)
    if file:
        yield from _unlike_file(file, state, folder / "vocab.txt", kind, named)
    for name, field in _NORMAL.items():
        if config.get(name) is not None and normal.get("type") == "BertNormalizer" and config[name] != normal[field]:
            yield (
                f"tokenizer {named}: {CONFIG} has {name} = {json.dumps(config[name])}, but tokenizer.json, which"
                f" transformers reads here, has {field} = {json.dumps(normal[field])}; the ids are those of"
                " transformers"
            )
    unset = "tokenizer.json" not in settings and config.get("do_lower_case") is None
    capitals = [t for t in model["vocab"] if t not in special and t != t.lower()]
    if unset and normal.get("lowercase") and capitals:
        yield (
            f"tokenizer {named}: nothing says do_lower_case, so transformers lower-cases, and the {len(capitals)}"
            f" tokens with a capital never occur ({', '.join(capitals[:3])}); put do_lower_case: false into {CONFIG}"
            " if the vocabulary is a cased one"
        )


def _decodes_otherwise(found: Any, state: Mapping[str, Any]) -> bool:
    """Whether the class makes other text of ids than the tokenizer.json that is kept of it."""
    from tokenizers import Tokenizer

    ids = found(PROBE, add_special_tokens=False)["input_ids"]
    kept = Tokenizer.from_str(json.dumps(state)).decode(ids, skip_special_tokens=False)
    return bool(found.decode(ids, clean_up_tokenization_spaces=False) != kept)


def _refuse_ignored(
    config: Mapping[str, Any], model: Mapping[str, Any], special: set[str], kind: str, named: Path
) -> None:
    """Refuse a setting that transformers leaves without effect in a fast WordPiece tokenizer."""
    never = config.get("never_split") or []
    lost = {
        "do_basic_tokenize": config.get("do_basic_tokenize") is False,
        "never_split": not isinstance(never, list) or not set(map(str, never)) <= special,
        "wordpieces_prefix": config.get("wordpieces_prefix") not in (None, model["continuing_subword_prefix"]),
        "max_input_chars_per_word": config.get("max_input_chars_per_word")
        not in (None, model["max_input_chars_per_word"]),
        "word_tokenizer_type": config.get("word_tokenizer_type") not in (None, "basic"),
        "subword_tokenizer_type": config.get("subword_tokenizer_type") not in (None, "wordpiece"),
    }
    for name in (name for name, wrong in lost.items() if wrong):
        raise InvalidData(
            f"tokenizer {named}: {CONFIG} says {name}: {json.dumps(config[name], ensure_ascii=False)}, which"
            f" transformers does not honour in its fast {kind}: its ids would not be those that the vocabulary was"
            " made for.\n"
            f"  Take {name} out of {CONFIG} to have the text split as transformers does."
        )


def _unlike_file(
    file: Mapping[str, Any], state: Mapping[str, Any], vocabulary: Path, kind: str, named: Path
) -> Iterator[str]:
    """What the tokenizer does otherwise than its tokenizer.json, or has elsewhere than its vocab.txt."""
    for part in ("normalizer", "pre_tokenizer", "model"):
        for name, ours, theirs in _differences(part, file[part], state[part]):
            yield (
                f"tokenizer {named}: tokenizer.json has {name} = {json.dumps(ours)}, but transformers reads this"
                f" folder as {kind}, with {json.dumps(theirs)}; the ids are those of transformers"
            )
    if vocabulary.is_file():
        rows, lines = state["model"]["vocab"], vocabulary.read_text("utf-8", "replace").removesuffix("\n").split("\n")
        moved = [line for row, line in enumerate(lines) if line and rows.get(line.rstrip()) != row]
        if moved and len(set(lines)) == len(lines):
            yield (
                f"tokenizer {named}: {len(moved)} tokens of vocab.txt have other ids in tokenizer.json"
                f" ({', '.join(moved[:3])}); the ids are those of tokenizer.json, as in transformers"
            )


def _file(path: Path, named: Path) -> dict[str, Any]:
    """What the tokenizers library reads in a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        return dict(json.loads(Tokenizer.from_file(str(path)).to_str()))
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidData(
            f"tokenizer {named}: its tokenizer.json cannot be read by the tokenizers library: {error}.\n"
            "  Copy it again from its source, or take it out if the folder has a vocab.txt, too."
        ) from error


def _otherwise(file: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Parts of a tokenizer.json that are others in what transformers made of it, if text gets other ids by it alone.

    The classes write the same in many ways, so text decides.
    """
    from tokenizers import Tokenizer

    def ids(settings: Mapping[str, Any]) -> list[int]:
        plain = {**settings, "truncation": None, "padding": None}
        if plain["model"]["type"] == "BPE":
            plain["model"] = {**plain["model"], "dropout": None}
        return list(Tokenizer.from_str(json.dumps(plain)).encode(PROBE, add_special_tokens=False).ids)

    if ids(file) == ids(state):
        return []
    return [part for part in ("normalizer", "pre_tokenizer", "model") if file[part] != state[part]]


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("type") == theirs.get("type"):
        for key in sorted({*ours, *theirs} - {"vocab"}):
            yield from _differences(f"{name}.{key}", ours.get(key), theirs.get(key))
    elif ours != theirs:
        yield name, ours, theirs
