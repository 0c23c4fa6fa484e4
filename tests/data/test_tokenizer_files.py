"""Tokenizers out of people's folders have the ids that transformers gives them; what it cannot or would not is refused.

The reference is transformers' own AutoTokenizer, on text of many scripts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from bert2bert.data.bins import TokenBins
from bert2bert.data.prepare import prepare
from bert2bert.data.tokenizer_files import load_tokenizer
from bert2bert.errors import InvalidData
from bert2bert.train.run_folder import TOKENIZER

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPOKEN = (
    "the cat sat on mat The Cat café cafe đến việt nam i̇stanbul istanbul İstanbul 中 文 中文 研究 を 👩‍💻 👩 ß ς 각 हिन"
)
WORDS = [*SPECIAL, *SPOKEN.split(" "), "\u2028", "العربية", *LETTERS, *".,'-", *("##" + c for c in LETTERS + "文ن")]
TEXTS = [
    "The cat sat on the mat. Café, cafe\u0301!",
    "xin chào, đến Việt Nam; Vie\u0323\u0302t",
    "İSTANBUL Istanbul ISPARTA ı",
    "中文研究を中 文",
    "العربية اللُّغَةُ हिन्दी 각가",
    "👩‍💻👩 a\u200db 🚀",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\u00a0i\u3000j",
    "a\x00b\x01c\x7fd\ufffde\ufefff\xad",
    "ΟΔΟΣ ς Straße ﬁn",
    "new [E1] token <url>x cats don't a.b",
    "  \t\r\n",
    "t" * 120 + " cat",
]
BERT = {"tokenizer_class": "BertTokenizer"}


def folder(at: Path, words: Sequence[str] | None = WORDS, end: str = "\n", **files: Any) -> Path:
    """A folder with a vocab.txt of ``words`` and the JSON ``files`` (name without .json)."""
    at.mkdir()
    if words is not None:
        (at / "vocab.txt").write_bytes("".join(word + end for word in words).encode())
    for name, content in files.items():
        (at / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return at


def serialised(words: Sequence[str] = WORDS, **normal: Any) -> dict[str, Any]:
    """A tokenizer.json of these words that cuts and pads."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(**normal)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(SPECIAL)
    made.enable_truncation(3)
    made.enable_padding(length=7)
    return dict(json.loads(made.to_str()))


def reference(at: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(at, local_files_only=True)
    found.backend_tokenizer.no_truncation()
    found.backend_tokenizer.no_padding()
    return found


def same(at: Path, kept: Path) -> list[list[int]]:
    """Assert the ids of transformers, here and in what is written; return them."""
    truth, found = reference(at), load_tokenizer(at)
    kept.mkdir()
    (kept / "tokenizer.json").write_text(found.backend.to_str(), encoding="utf-8")
    (kept / "tokenizer_config.json").write_text(json.dumps(found.config), encoding="utf-8")
    (kept / "config.json").write_text('{"model_type": "bert"}')
    again, encoder = reference(kept), found.for_text()
    found_ids = []
    for text in TEXTS:
        ids = truth(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode(text, add_special_tokens=False).ids == ids, text
        assert again(text)["input_ids"] == truth(text)["input_ids"], text
        assert again.decode(ids) == truth.decode(ids), text
        assert load_tokenizer(kept).for_text().encode(text, add_special_tokens=False).ids == ids
        found_ids.append(ids)
    assert found.table_size > max(max(ids, default=0) for ids in found_ids)
    for role, index in found.vocabulary.special.items():
        assert getattr(truth, f"{role}_token_id") in (index, None) and getattr(again, f"{role}_token_id") == index
    return found_ids


def swapped(**names: str) -> list[str]:
    return [names.get(word.strip("[]").lower(), word) if word in SPECIAL else word for word in WORDS]


ENTRY = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FOLDERS: dict[str, dict[str, Any]] = {
    "a class": {"tokenizer_config": BERT},
    "a model alone": {"config": {"model_type": "bert"}},
    "cased": {"tokenizer_config": {**BERT, "do_lower_case": False}},
    "accents kept": {"tokenizer_config": {**BERT, "do_lower_case": True, "strip_accents": False}},
    "accents stripped": {"tokenizer_config": {**BERT, "do_lower_case": False, "strip_accents": True}},
    "chinese in words": {"tokenizer_config": {**BERT, "tokenize_chinese_chars": False}},
    "windows line ends": {"end": "\r\n", "tokenizer_config": BERT},
    "spaces behind tokens": {"words": [w + " " * (i % 3) for i, w in enumerate(WORDS)], "tokenizer_config": BERT},
    "blank line at the end": {"words": [*WORDS, ""], "tokenizer_config": BERT},
    "a token twice": {"words": [*WORDS, "cat"], "tokenizer_config": BERT},
    "distilbert": {"tokenizer_config": {"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False}},
    "electra": {"tokenizer_config": {"tokenizer_class": "ElectraTokenizer"}, "config": {"model_type": "electra"}},
    "mobilebert": {"tokenizer_config": {"tokenizer_class": "MobileBertTokenizer"}},
    "another class than the model's": {"tokenizer_config": BERT, "config": {"model_type": "roberta"}},
    "renamed": {
        "words": swapped(mask="<m>", unk="<u>"),
        "tokenizer_config": {**BERT, "mask_token": "<m>", "unk_token": "<u>"},
    },
    "renamed in the map": {
        "words": swapped(mask="<m>", pad="<p>"),
        "tokenizer_config": BERT,
        "special_tokens_map": {"mask_token": {**ENTRY, "content": "<m>", "lstrip": True}, "pad_token": "<p>"},
    },
    "added tokens": {
        "tokenizer_config": BERT,
        "added_tokens": {"<url>": len(WORDS), "[E1]": len(WORDS) + 1},
    },
    "added tokens, some special": {
        "tokenizer_config": {**BERT, "additional_special_tokens": ["[E1]"]},
        "added_tokens": {"<url>": len(WORDS), "[E1]": len(WORDS) + 1},
    },
    "added tokens in the settings": {
        "tokenizer_config": {
            **BERT,
            "added_tokens_decoder": {
                "0": {**ENTRY, "content": "[PAD]", "special": True},
                str(len(WORDS)): {**ENTRY, "content": "new", "normalized": True, "special": False},
                str(len(WORDS) + 1): {**ENTRY, "content": "[E1]", "rstrip": True, "special": True},
            },
        }
    },
    "a short model": {"tokenizer_config": {**BERT, "model_max_length": 4}},
    "serialised": {
        "words": None,
        "tokenizer": serialised(lowercase=False, strip_accents=True),
    },
    "serialised, with roles": {
        "words": None,
        "tokenizer": serialised([*swapped(mask="<m>"), "[MASK]"], lowercase=False),
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<m>", "pad_token": "[PAD]"},
    },
    "serialised, of a class": {
        "words": None,
        "tokenizer": serialised(lowercase=True),
        "tokenizer_config": {**BERT, "do_lower_case": True},
    },
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    same(folder(tmp_path / "hub", **FOLDERS[name]), tmp_path / "kept")


def test_settings_that_contradict_a_tokenizer_json(tmp_path: Path) -> None:
    """transformers lets the class's settings rule, or the file, by class; either way the user sees a note."""
    for i, (name, lower, expected) in enumerate(
        [
            ("BertTokenizer", True, "normalizer.lowercase = false"),
            ("PreTrainedTokenizerFast", True, "do_lower_case = true"),
        ]
    ):
        config = {"tokenizer_class": name, "do_lower_case": lower, "mask_token": "[MASK]"}
        at = folder(tmp_path / f"{i}", None, tokenizer=serialised(lowercase=False), tokenizer_config=config)
        same(at, tmp_path / f"kept{i}")
        assert any(expected in note for note in load_tokenizer(at).notes)
    assert not load_tokenizer(folder(tmp_path / "whole", tokenizer_config={**BERT, "do_lower_case": True})).notes
    (note,) = load_tokenizer(folder(tmp_path / "untold", tokenizer_config=BERT)).notes
    assert "nothing says do_lower_case" in note and "(The, Cat, İstanbul)" in note


def test_a_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    """Lines of white space, and equal lines, are rows of the embedding table too: added tokens come behind them all."""
    words = [*SPECIAL, "cat", "\u2028", "\x85", "\x0b", "", "mat", "cat", "the"]
    at = folder(tmp_path / "hub", words, tokenizer_config=BERT, added_tokens={"newword": len(words)})
    found = load_tokenizer(at)
    ids = found.for_text().encode("the cat newword mat", add_special_tokens=False).ids
    assert ids == [12, 11, 13, 10] and found.table_size == 14


def test_a_vocab_file_alone_and_the_settings_beside_it(tmp_path: Path) -> None:
    text = "The Cat sat"
    at = folder(tmp_path / "hub", tokenizer_config={"do_lower_case": False})
    cased = transformers.BertTokenizer.from_pretrained(at)(text, add_special_tokens=False)["input_ids"]
    assert cased[0] == WORDS.index("The")
    (at / "my-vocab.txt").write_bytes((at / "vocab.txt").read_bytes())
    for path in (at, at / "vocab.txt", at / "my-vocab.txt"):
        assert load_tokenizer(path).for_text().encode(text, add_special_tokens=False).ids == cased
    (at / "tokenizer_config.json").unlink()
    lower = transformers.BertTokenizer(vocab=str(at / "vocab.txt"))(text, add_special_tokens=False)["input_ids"]
    assert lower[0] == WORDS.index("the")
    assert load_tokenizer(at / "vocab.txt").for_text().encode(text, add_special_tokens=False).ids == lower


def byte_level(at: Path, name: str = "RobertaTokenizer") -> Path:
    """vocab.json and merges.txt, as RoBERTa and GPT-2 have them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.trainers import BpeTrainer

    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat\n\n the cats\n"] * 3, trainer)
    folder(at, None, tokenizer_config={"tokenizer_class": name})
    made.model.save(str(at))
    return at


def test_byte_level_bpe_and_documents_of_many_lines(tmp_path: Path) -> None:
    at = byte_level(tmp_path / "hub")
    same(at, tmp_path / "kept")
    truth = reference(at)
    blocks = ["the cat\n  sat on\n\n\n the mat", "\u2028cats\r\nand", "last"]
    (tmp_path / "t.txt").write_bytes(b"\n".join(block.encode() for block in blocks[:1]))
    (tmp_path / "h.txt").write_text("the cats " * 9_000 + "\n" + "sat\n\n" * 9_000 + "end\n\n")
    paths = [tmp_path / "t.txt"], [tmp_path / "h.txt"]
    meta = prepare(paths[0], None, None, None, None, at, 64, paths[1], 0, "file", tmp_path / "bins", 0, False)
    bins = TokenBins.open(tmp_path / "bins")
    assert bins.split("train")[0].tolist() == truth(blocks[0], add_special_tokens=False)["input_ids"]
    held = (tmp_path / "h.txt").read_text().rstrip("\n")  # far longer than a piece
    assert bins.split("heldout")[0].tolist() == truth(held, add_special_tokens=False)["input_ids"]
    assert meta["special"] == {"pad": 1, "unk": 3, "cls": 0, "sep": 2, "mask": 4, "bos": 0, "eos": 2}
    written = reference(tmp_path / "bins")
    assert written("the cats")["input_ids"] == truth("the cats")["input_ids"]


SPELLED = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}


def byte_level_file(at: Path, name: str, **config: Any) -> Path:
    """A tokenizer.json alone, with its class."""
    made = Tokenizer.from_str(reference(byte_level(at.with_name("source"))).backend_tokenizer.to_str())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {f"{role}_token": token for role, token in SPELLED.items()}
    config = {"tokenizer_class": name, **names, **config}
    return folder(at, None, tokenizer=json.loads(made.to_str()), tokenizer_config=config)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LukeTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_alone_whatever_its_class_lists(tmp_path: Path, name: str) -> None:
    at = byte_level_file(tmp_path / "hub", name)
    assert same(at, tmp_path / "kept") and not load_tokenizer(at).notes


def test_a_class_that_does_not_read_its_tokenizer_json_is_reported(tmp_path: Path) -> None:
    at = byte_level_file(tmp_path / "hub", "GPT2Tokenizer")
    state = json.loads((at / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    (at / "tokenizer.json").write_text(json.dumps(state))
    (note,) = load_tokenizer(at).notes
    assert "as GPT2Tokenizer, which does not split text as its tokenizer.json says (normalizer" in note
    alone = Tokenizer.from_file(str(at / "tokenizer.json")).encode(TEXTS[0], add_special_tokens=False).ids
    assert same(at, tmp_path / "kept")[0] != alone
    config = json.loads((at / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (at / "tokenizer_config.json").write_text(json.dumps(config))  # the way out that the note names
    assert not load_tokenizer(at).notes
    assert same(at, tmp_path / "other")[0] == alone


def test_bpe_dropout_is_off(tmp_path: Path) -> None:
    """A file that draws merges at random is read and kept without the draws."""
    at = byte_level_file(tmp_path / "hub", "PreTrainedTokenizerFast")
    truth = [reference(at)(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    state = json.loads((at / "tokenizer.json").read_text())
    state["model"]["dropout"] = 0.9
    (at / "tokenizer.json").write_text(json.dumps(state))
    found = load_tokenizer(at)
    assert [found.for_text().encode(text, add_special_tokens=False).ids for text in TEXTS] == truth
    assert [found.backend.encode(text, add_special_tokens=False).ids for text in TEXTS] == truth and not found.notes


def test_a_class_that_decodes_in_python_is_reported(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers.trainers import BpeTrainer

    names, alphabet = ["<|startoftext|>", "<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=800, special_tokens=names, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat " + " ".join(alphabet)] * 3, trainer)
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": names[0], "eos_token": names[1]}
    at = folder(tmp_path / "hub", None, tokenizer=json.loads(made.to_str()), tokenizer_config=config)
    truth, found = reference(at)("the cat", add_special_tokens=False)["input_ids"], load_tokenizer(at)
    assert found.for_text().encode("the cat", add_special_tokens=False).ids == truth
    assert any("CLIPTokenizer turns ids into text in Python code" in note for note in found.notes)


def test_special_tokens_that_are_to_be_split(tmp_path: Path) -> None:
    """split_special_tokens makes every special token in a text text, and stays so in what is written."""
    extra = {"content": "<url>", "special": True, "normalized": False}
    extra |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    config = {**BERT, "added_tokens_decoder": {str(len(WORDS)): extra}, "additional_special_tokens": ["<url>"]}
    at = folder(tmp_path / "hub", tokenizer_config={**config, "split_special_tokens": True})
    (tmp_path / "t.txt").write_text("the cat <url> sat [MASK]\n")
    (tmp_path / "h.txt").write_text("the mat\n")
    paths = [tmp_path / "t.txt"], [tmp_path / "h.txt"]
    prepare(paths[0], None, None, None, None, at, 64, paths[1], 0, "line", tmp_path / "bins", 0, False)
    for truth in (reference(at), reference(tmp_path / "bins")):
        wanted = truth("the cat <url> sat [MASK]", add_special_tokens=False)["input_ids"]
        assert TokenBins.open(tmp_path / "bins").split("train")[0].tolist() == wanted and len(WORDS) not in wanted


def test_unigram(tmp_path: Path) -> None:
    """A sentencepiece vocabulary that was converted, as XLM-R and ALBERT have it."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [("▁" + word, -float(i)) for i, word in enumerate(("the", "cat", "sat", "on", "mat"))]
    scores = [*((name, 0.0) for name in names), *words]
    made = Tokenizer(models.Unigram([*scores, *((c, -20.0) for c in "abcdefghijklmnopqrstuvwxyz▁")], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.add_special_tokens(names)
    at = folder(tmp_path / "hub", None, tokenizer=json.loads(made.to_str()))
    config = {"tokenizer_class": "XLMRobertaTokenizer", "cls_token": "<s>", "mask_token": "<mask>"}
    (at / "tokenizer_config.json").write_text(json.dumps(config))
    same(at, tmp_path / "kept")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mecab": ({"tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "is a BertJapaneseTokenizer.*Python"),
    "unknown class": ({"tokenizer_config": {"tokenizer_class": "OurTokenizer"}}, r"\(OurTokenizer\) cannot be read"),
    "own code": (
        {"tokenizer_config": {**BERT, "auto_map": {"AutoTokenizer": ["ours.Ours", None]}}},
        r"code of its own \(ours.Ours\)",
    ),
    "a vocabulary of another kind": (
        {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}},
        "is a RobertaTokenizer .*holds none of merges.txt",
    ),
    "no basic split": ({"tokenizer_config": {**BERT, "do_basic_tokenize": False}}, "says do_basic_tokenize: false"),
    "words never split": ({"tokenizer_config": {**BERT, "never_split": ["a.b"]}}, r'says never_split: \["a.b"\]'),
    "another prefix": ({"tokenizer_config": {**BERT, "wordpieces_prefix": "@@"}}, 'says wordpieces_prefix: "@@"'),
    "longer words": ({"tokenizer_config": {**BERT, "max_input_chars_per_word": 9}}, "max_input_chars_per_word: 9"),
    "a hole": ({"tokenizer_config": BERT, "added_tokens": {"new": len(WORDS) + 2}}, "gives 'new' id"),
    "two that are one": (
        {"tokenizer_config": BERT, "added_tokens": {"new": len(WORDS), "New": len(WORDS) + 1}},
        "'new' and 'New' are one to its normaliser",
    ),
    "one that is nothing": (
        {"tokenizer_config": BERT, "added_tokens": {"\x7f": len(WORDS)}},
        r"token '\\x7f' is nothing to its normaliser",
    ),
    "no mask": (
        {"words": [w for w in WORDS if w != "[MASK]"], "tokenizer_config": BERT},
        r"can train nothing; not masked \(no mask token\)",
    ),
    "settings not JSON": ({"tokenizer_config": [BERT]}, r"tokenizer_config.json cannot be read: it holds a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(tmp_path: Path, name: str) -> None:
    files, message = REFUSED[name]
    with pytest.raises(InvalidData, match=message):
        load_tokenizer(folder(tmp_path / "hub", **files))


def test_special_tokens_that_transformers_alone_would_add_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidData, match=r"can train nothing; .*not causal \(no eos token\).*this GPT2Tokenizer has none"
    ):
        load_tokenizer(byte_level(tmp_path / "hub", "GPT2Tokenizer"))


def test_notes_on_files_that_disagree(tmp_path: Path) -> None:
    moved = [*SPECIAL, "mat", *(word for word in WORDS[5:] if word != "mat")]
    config = {**BERT, "do_lower_case": True}
    at = folder(tmp_path / "hub", moved, tokenizer=serialised(), tokenizer_config=config, config={"vocab_size": 50})
    moves, small = load_tokenizer(at).notes
    assert "tokens of vocab.txt have other ids in tokenizer.json (mat, the, cat)" in moves
    assert f"has {len(WORDS)} ids, the config.json beside it a vocab_size of 50" in small
    same(at, tmp_path / "kept")


def test_folders_without_a_vocabulary_that_can_be_read(tmp_path: Path) -> None:
    at = folder(tmp_path / "models--a--b", None)
    folder(at / "snapshots", None)
    folder(at / "snapshots/0a1b", tokenizer_config=BERT)
    with pytest.raises(InvalidData, match=r"hub's cache: give .*snapshots/0a1b"):
        load_tokenizer(at)
    assert load_tokenizer(at / "snapshots/0a1b").vocabulary.special["mask"] == 4
    (at / "snapshots/0a1b/added_tokens.json").symlink_to(at / "blobs/2c")
    with pytest.raises(InvalidData, match=r"added_tokens.json cannot be read: No such file"):
        load_tokenizer(at / "snapshots/0a1b")
    by_bytes = folder(tmp_path / "bytes", None, tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})
    with pytest.raises(InvalidData, match=r"is a ByT5Tokenizer, which splits text in Python code"):
        load_tokenizer(by_bytes)
    if importlib.util.find_spec("sentencepiece") is None:
        model = folder(tmp_path / "spm", None, tokenizer_config={"tokenizer_class": "AlbertTokenizer"})
        (model / "spiece.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 3)
        with pytest.raises(InvalidData, match=r"sentencepiece model alone \(spiece.model\).*\n.*pip install"):
            load_tokenizer(model)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"new": "last"}},
        {"added_tokens": ["new"]},
        {"tokenizer_config": {**BERT, "added_tokens_decoder": {"0": "[PAD]"}}},
        {"tokenizer_config": {**BERT, "never_split": 3}},
        {"tokenizer": {**serialised(), "added_tokens": [{"id": 0, "content": "[PAD]"}]}},
        {"tokenizer": {**serialised(), "added_tokens": True}},
        {"tokenizer": {"model": {}}},
    ],
)
def test_malformed_settings_are_refused_in_words(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(InvalidData, match=r"^tokenizer .*hub"):
        load_tokenizer(folder(tmp_path / "hub", **{"tokenizer_config": BERT, **files}))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 231508\n"
BEGINNINGS: list[tuple[str, bytes, str]] = [
    ("vocab.txt", POINTER.encode(), r"hub/vocab.txt is a git-lfs pointer.*231,508 bytes\. Run `git lfs pull`"),
    ("tokenizer.json", POINTER.encode(), "hub/tokenizer.json is a git-lfs pointer"),
    ("spiece.model", POINTER.encode(), "hub/spiece.model is a git-lfs pointer"),
    ("vocab.txt", b"\xef\xbb\xbf[PAD]\n[UNK]\n", "byte-order mark.*Write it again without"),
    ("tokenizer_config.json", b"\xef\xbb\xbf{}", "byte-order mark"),
    ("vocab.txt", "[PAD]\n[UNK]\n".encode("utf-16"), "UTF-16.*iconv"),
    ("vocab.txt", b"", "is empty"),
    ("vocab.txt", b"[PAD]\ncaf\xe9\n", "line 2 of its vocabulary is not UTF-8|begins"),
]


@pytest.mark.parametrize(("name", "content", "message"), BEGINNINGS)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    at = folder(tmp_path / "hub", tokenizer_config=BERT)
    (at / name).write_bytes(content)
    with pytest.raises(InvalidData, match=message):
        load_tokenizer(at)


@pytest.mark.parametrize("content", [POINTER.encode(), b"", b"<!DOCTYPE html>"])
def test_a_sentencepiece_model_that_transformers_does_not_read(tmp_path: Path, content: bytes) -> None:
    """Beside a tokenizer.json it is not looked at: a clone without git-lfs has a pointer in its place."""
    config = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "eos_token": "</s>"}
    vocab = {token: row for row, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁ab"])}
    made = transformers.LlamaTokenizer(vocab=vocab, merges=[("▁", "a"), ("▁a", "b")])
    at = folder(tmp_path / "hub", None, tokenizer=json.loads(made.backend_tokenizer.to_str()), tokenizer_config=config)
    (at / "tokenizer.model").write_bytes(content)
    same(at, tmp_path / "kept")


def test_bins_and_run_folders_carry_the_tokenizer(tmp_path: Path) -> None:
    """The written files load in transformers beside a BERT config, cased as they are, with added tokens counted."""
    config = {**BERT, "do_lower_case": False, "model_max_length": 512}
    at = folder(tmp_path / "hub", tokenizer_config=config, added_tokens={"<url>": len(WORDS)})
    for name in ("t", "h"):
        (tmp_path / f"{name}.txt").write_text("The Cat sat <url> [MASK]\nthe mat\n" * 3)
    paths = [tmp_path / "t.txt"], [tmp_path / "h.txt"]
    meta = prepare(paths[0], None, None, None, None, at, 64, paths[1], 0, "line", tmp_path / "bins", 0, False)
    truth = reference(at)
    assert meta["vocab_size"] == len(truth) == len(WORDS) + 1
    ids = TokenBins.open(tmp_path / "bins").split("train")[0]
    line = truth("The Cat sat <url>", add_special_tokens=False)["input_ids"]
    assert np.array_equal(ids[: len(line)], line) and truth.mask_token_id not in ids
    (tmp_path / "bins/config.json").write_text('{"model_type": "bert"}')
    written = reference(tmp_path / "bins")
    for text in TEXTS:
        assert written(text)["input_ids"] == truth(text)["input_ids"]
    assert (written.model_max_length, written.mask_token) == (512, "[MASK]")
    assert all((tmp_path / "bins" / name).is_file() for name in TOKENIZER)
