"""A tokenizer for the bins, and one trained on the text (WordPiece, BERT's normalisation).

`tokenizer_files.py` takes one from files. Refuses, with `InvalidConfig`, a vocabulary too small to train.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bert2bert.data.vocabulary import Vocabulary
from bert2bert.errors import InvalidConfig, UserError

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def failed(error: BaseException) -> bool:
    """Whether `tokenizers` failed: an exception, or a panic of its Rust code, which is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@dataclass(frozen=True)
class TextTokenizer:
    """A fast tokenizer and the roles of its special tokens.

    backend: a `tokenizers.Tokenizer`; special: role -> token, of those that it has; config: what a
    tokenizer_config.json beside its tokenizer.json must say so that transformers makes the same tokenizer of the two;
    notes: for the user, on how it was read; sentinels: ``<extra_id_0>``, … as far as there are; add_bos: whether it
    puts its bos token before a text.
    """

    backend: Any
    special: Mapping[str, str]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    sentinels: tuple[str, ...] = ()
    add_bos: bool = False

    @property
    def vocabulary(self) -> Vocabulary:
        """What it offers to an objective."""
        special = {role: self.backend.token_to_id(token) for role, token in self.special.items()}
        sentinels = tuple(self.backend.token_to_id(token) for token in self.sentinels)
        return Vocabulary(self.table_size, special, sentinels, self.add_bos)

    @property
    def table_size(self) -> int:
        """Rows an embedding table needs: the largest id + 1 (a vocabulary may have holes)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def ends_at_lines(self) -> bool:
        """Whether the ids of a text are those of its lines, one behind the other: a line end always ends a token."""
        state = json.loads(self.backend.to_str())
        kinds = [(state[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
        spaced = any(character.isspace() for token in state["added_tokens"] for character in token["content"])
        return kinds[0] in (None, "BertNormalizer") and kinds[1] == "BertPreTokenizer" and not spaced

    def for_text(self) -> Any:
        """The `tokenizers.Tokenizer` that encodes a corpus.

        "[MASK]" written in a text is six characters, not the mask, and so for every token with a role; other added
        tokens are tokens, special or not (with split_special_tokens the special ones are text, too). Nothing is drawn
        at random (BPE dropout), padded or cut.
        """
        from tokenizers import Tokenizer

        roles = {*self.special.values(), *self.sentinels}
        state = json.loads(self.backend.to_str())
        for token in state["added_tokens"]:
            split = token["special"] and self.config.get("split_special_tokens", False)
            token["special"] = split or token["content"] in roles
        if state["model"].get("dropout"):
            state["model"]["dropout"] = None
        if state["model"]["type"] == "Unigram":  # it would find them in a text as it finds any piece
            hidden = {token: f"\0{token}\0" for token in roles}
            state["model"]["vocab"] = [(hidden.get(piece, piece), score) for piece, score in state["model"]["vocab"]]
            for token in state["added_tokens"]:
                token["content"] = hidden.get(token["content"], token["content"])
        tokenizer = Tokenizer.from_str(
            json.dumps({**state, "truncation": None, "padding": None, "post_processor": None})
        )
        tokenizer.encode_special_tokens = True
        return tokenizer


def _wordpiece(vocab: dict[str, int] | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocab, unk_token=SPECIAL["unk"]) if vocab else models.WordPiece(unk_token=SPECIAL["unk"])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(texts: Callable[[str], Iterator[str]], vocab_size: int) -> TextTokenizer:
    """A lower-casing WordPiece tokenizer of at most `vocab_size` tokens (fewer when the text is small).

    texts(purpose): the training text from its beginning; read twice. The same text gives the same tokenizer.
    """
    from tokenizers import trainers
    from tokenizers.processors import TemplateProcessing

    if vocab_size < 64:
        raise InvalidConfig(f"--vocab-size is {vocab_size}, expected at least 64 (5 special tokens and an alphabet).")
    tokenizer = _wordpiece(None)
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
    tokenizer = _wordpiece(tokenizer.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    names = {f"{role}_token": token for role, token in SPECIAL.items()}
    return TextTokenizer(tokenizer, SPECIAL, {"tokenizer_class": "PreTrainedTokenizerFast", **names})


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
