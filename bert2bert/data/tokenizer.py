"""A tokenizer for the bins: trained on the text (WordPiece, BERT's normalisation) or taken from a file.

Refuses, with `InvalidData`: a tokenizer that is not there, cannot be read, or lacks one of `SPECIAL`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bert2bert.errors import InvalidConfig, InvalidData, UserError

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def _wordpiece(vocab: dict[str, int] | None, lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocab, unk_token=SPECIAL["unk"]) if vocab else models.WordPiece(unk_token=SPECIAL["unk"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(texts: Callable[[str], Iterator[str]], vocab_size: int) -> Any:
    """A lower-casing WordPiece tokenizer of at most `vocab_size` tokens (fewer when the text is small).

    texts(purpose): the training text from its beginning; read twice. The same text gives the same tokenizer.
    """
    from tokenizers import trainers
    from tokenizers.processors import TemplateProcessing

    if vocab_size < 64:
        raise InvalidConfig(f"--vocab-size is {vocab_size}, expected at least 64 (5 special tokens and an alphabet).")
    tokenizer = _wordpiece(None, lowercase=True)
    # Each character may cost two tokens, x and ##x; BERT's own limit is 1,000 characters.
    alphabet, inner = _alphabet(texts("alphabet"), tokenizer, min(1000, vocab_size // 4))
    failure: list[UserError] = []

    def guarded() -> Iterator[str]:
        # An exception inside the Rust trainer's iterator would lose its class.
        try:
            yield from texts("tokenizer")
        except UserError as error:
            failure.append(error)

    # The trainer numbers the ##x in the order of a randomly seeded hash table, and the numbers break ties between
    # merges (huggingface/tokenizers issue 1794). Named as special tokens they have fixed numbers; the tokenizer is then
    # rebuilt from the bare vocabulary.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL.values(), *("##" + character for character in inner)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(guarded(), trainer)
    if failure:
        raise failure[0]
    tokenizer = _wordpiece(tokenizer.get_vocab(), lowercase=True)
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def _alphabet(texts: Iterator[str], tokenizer: Any, limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters of the normalised text, and those of them that occur inside a word."""
    joins: dict[int, bool] = {}  # whether the character stays in a word, asked of the pre-tokenizer itself
    counts: Counter[int] = Counter()
    inner: set[int] = set()
    for text in _joined(texts, 1 << 16):
        codes = np.frombuffer(tokenizer.normalizer.normalize_str(text).encode("utf-32-le"), dtype=np.uint32)
        if not len(codes):
            continue
        unique, index, times = np.unique(codes, return_inverse=True, return_counts=True)
        for code in unique.tolist():
            if code not in joins:
                joins[code] = len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{chr(code)}a")) == 1
        counts.update(dict(zip(unique.tolist(), times.tolist(), strict=True)))
        word = np.array([joins[code] for code in unique.tolist()])[index]
        inner.update(np.unique(codes[1:][word[1:] & word[:-1]]).tolist())
    ranked = sorted((code for code in counts if not chr(code).isspace()), key=lambda code: (-counts[code], code))
    kept = sorted(ranked[:limit])
    return [chr(code) for code in kept], [chr(code) for code in kept if code in inner]


def _joined(texts: Iterator[str], size: int) -> Iterator[str]:
    """The texts in runs of about `size` characters, a space between them: many small ones at the cost of a few."""
    run: list[str] = []
    held = 0
    for text in texts:
        run.append(text)
        held += len(text)
        if held >= size:
            yield " ".join(run)
            run, held = [], 0
    if run:
        yield " ".join(run)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a tokenizer.json, a vocab.txt (WordPiece), or a folder that holds one of them.

    A vocab.txt lower-cases if tokenizer_config.json beside it says so, or, without one, if no token has a capital.
    """
    from tokenizers import Tokenizer

    path = path.expanduser()
    file = path
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise InvalidData(
                f"tokenizer folder {path} holds neither tokenizer.json nor vocab.txt.\n"
                "  Give a Hugging Face tokenizer folder, or leave --tokenizer out to train one."
            )
        file = found[0]
    if not file.is_file():
        raise InvalidData(
            f"tokenizer {path} does not exist.\n"
            "  Give the path of a tokenizer.json, a vocab.txt or their folder, or leave --tokenizer out to train one."
        )
    try:
        tokenizer = _from_vocab(file) if file.suffix == ".txt" else Tokenizer.from_file(str(file))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InvalidData(
            f"tokenizer {file} cannot be read: {error}\n  Expected a tokenizer.json of the tokenizers library, or a"
            " vocab.txt with one token a line."
        ) from error
    for token in SPECIAL.values():
        if tokenizer.token_to_id(token) is None:
            raise InvalidData(
                f"tokenizer {file} has no {token} token; BERT needs {' '.join(SPECIAL.values())}.\n"
                f"  Add it to the tokenizer, or leave --tokenizer out to train one."
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_vocab(file: Path) -> Any:
    vocab = {token: i for i, token in enumerate(file.read_text("utf-8").splitlines()) if token}
    config = file.parent / "tokenizer_config.json"
    setting = json.loads(config.read_text("utf-8")).get("do_lower_case") if config.is_file() else None
    lowercase = all(t == t.lower() for t in vocab if t not in SPECIAL.values()) if setting is None else bool(setting)
    tokenizer = _wordpiece(vocab, lowercase)
    tokenizer.add_special_tokens([token for token in SPECIAL.values() if token in vocab])
    return tokenizer


def special_ids(tokenizer: Any) -> dict[str, int]:
    """{'pad': id, 'unk': …, 'cls': …, 'sep': …, 'mask': …}."""
    return {key: tokenizer.token_to_id(token) for key, token in SPECIAL.items()}


def table_size(tokenizer: Any) -> int:
    """Rows an embedding table needs: the largest id + 1 (a vocabulary may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
