"""What a model is trained to predict, as values: `Masked`, `Causal`, `SpanCorruption`.

An objective says which special tokens a document or a segment has, how many positions are predicted and which, and what
it needs of a tokenizer. Packing, loader, evaluation and `learn` ask it; nothing else knows what is predicted.

    Masked           cls text sep        a share of the text is hidden behind the mask token, or replaced, or kept
    Causal           bos document eos    every token predicts the next one of its segment
    SpanCorruption   text                spans of it are replaced by sentinels; the decoder writes what they held

Refuses (`InvalidConfig`): settings out of range, and a tokenizer or a row length that does not fit. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from bert2bert.data.masking import Masker
from bert2bert.data.packing import Frame
from bert2bert.data.rows import Predicted, Rows, laid_out, next_tokens
from bert2bert.data.spans import Corrupter, noise_of
from bert2bert.data.vocabulary import Vocabulary
from bert2bert.errors import InvalidConfig

Predictor = Callable[[Rows], Predicted]


def _share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise InvalidConfig(f"objective.{what} is {value!r}; expected a share between 0 and 1, such as 0.15")


@dataclass(frozen=True)
class Masked:
    """Some tokens are hidden and predicted from both sides (Devlin et al. 2019): BERT, RoBERTa, ModernBERT.

    ``mlm_probability``: share of the tokens to predict.
    """

    mlm_probability: float = 0.15
    kind: str = field(default="masked", init=False)
    trains: ClassVar[str] = "masked"
    needs: ClassVar[tuple[str, ...]] = ("pad", "cls", "sep", "mask")

    def __post_init__(self) -> None:
        _share("mlm_probability", self.mlm_probability)

    def frame(self, vocabulary: Vocabulary) -> Frame:
        """cls and sep around every segment."""
        special = vocabulary.special
        return Frame(special["cls"], special["sep"], each_segment=True)

    def predictor(self, vocabulary: Vocabulary, seq_len: int, seed: int) -> Predictor:
        """Masks rows of `seq_len` slots. Raises InvalidConfig if that leaves nothing to predict."""
        masker = Masker(vocabulary, seq_len, self.mlm_probability, seed)

        def predict(rows: Rows) -> Predicted:
            targets, labels = masker(rows.tokens.reshape(-1, seq_len), rows.numbers, rows.real_slots())
            count, length = rows.tokens.shape
            targets = targets.reshape(count, -1) - np.arange(0, count * length, length)[:, None]
            return laid_out(rows, targets, labels.reshape(count, -1))

        return predict


@dataclass(frozen=True)
class Causal:
    """Every token predicts the next: GPT-2, Llama, Mistral, Qwen and mixtures of them.

    A document begins with the bos token where the tokenizer's own template puts one, and ends with its end token. What
    does not fit a row goes on in another, without a false end: the last token of a segment predicts nothing.
    """

    kind: str = field(default="causal", init=False)
    trains: ClassVar[str] = "causal"
    needs: ClassVar[tuple[str, ...]] = ("eos",)

    def frame(self, vocabulary: Vocabulary) -> Frame:
        """bos (or nothing) and eos around every document."""
        special = vocabulary.special
        return Frame(special["bos"] if vocabulary.add_bos else None, special["eos"], each_segment=False)

    def predictor(self, vocabulary: Vocabulary, seq_len: int, seed: int) -> Predictor:
        """The next token at every position."""
        return lambda rows: laid_out(rows, None, next_tokens(rows))


@dataclass(frozen=True)
class SpanCorruption:
    """Spans of the text are replaced by sentinels and written by the decoder (Raffel et al. 2020): T5.

    ``noise_density``: share of the tokens in spans; ``mean_span_length``: their mean length in tokens. data.seq_len
    counts tokens of text: of 568, T5's encoder reads 512 and its decoder writes 114.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    kind: str = field(default="span-corruption", init=False)
    trains: ClassVar[str] = "seq2seq"
    needs: ClassVar[tuple[str, ...]] = ("eos", "pad")

    def __post_init__(self) -> None:
        _share("noise_density", self.noise_density)
        if not 1 <= self.mean_span_length < float("inf"):
            raise InvalidConfig(
                f"objective.mean_span_length is {self.mean_span_length!r}; expected at least 1, such as 3"
            )

    def frame(self, vocabulary: Vocabulary) -> Frame:
        """Nothing: the end token follows what is left of the text."""
        return Frame(None, None, each_segment=True)

    def predictor(self, vocabulary: Vocabulary, seq_len: int, seed: int) -> Predictor:
        """Corrupts every segment by itself. Raises InvalidConfig if a row can have more spans than there are
        sentinels."""
        most = int(noise_of(np.array([seq_len]), self.noise_density, self.mean_span_length)[1][0])
        known = len(vocabulary.sentinels)
        if most > known:
            raise InvalidConfig(
                f"rows of {seq_len} tokens have up to {most} spans of noise (objective.noise_density "
                f"{self.noise_density:g}, objective.mean_span_length {self.mean_span_length:g}), and "
                f"{vocabulary.where} has {known} sentinels: use a shorter data.seq_len or a longer "
                "objective.mean_span_length"
            )
        special = vocabulary.special
        return Corrupter(
            vocabulary.sentinels, special["eos"], special["pad"], self.noise_density, self.mean_span_length, seed
        )


Objective = Masked | Causal | SpanCorruption
OBJECTIVES: tuple[Objective, ...] = (Masked(), Causal(), SpanCorruption())
"""One of each, as they are where a recipe names none."""

_REMEDIES = {
    "masked": "Prepare the text with a tokenizer that has (bert2bert prepare without --tokenizer trains one), or train "
    "an architecture that predicts the next token",
    "causal": "Name the token that ends a document in the tokenizer's tokenizer_config.json (eos_token) and prepare "
    "the text again",
    "span-corruption": "Prepare the text with a tokenizer that has, such as a T5's",
}


def default(trains: str) -> Objective:
    """The objective of an architecture that trains "masked", "causal" or "seq2seq"."""
    return next(objective for objective in OBJECTIVES if objective.trains == trains)


def lacks(objective: Objective, vocabulary: Vocabulary) -> str:
    """What the objective needs and the tokenizer does not have, in words ("no mask token"); empty where it fits."""
    roles = [role for role in objective.needs if role not in vocabulary.special]
    found = [f"no {' or '.join(filter(None, (', '.join(roles[:-1]), roles[-1])))} token"] if roles else []
    if isinstance(objective, SpanCorruption) and not vocabulary.sentinels:
        found.append("no sentinels (<extra_id_0>, …)")
    return " and ".join(found)


def uses(vocabulary: Vocabulary) -> str:
    """Which objectives a tokenizer can train, and what the others would need: a line for people."""
    without = {objective.kind: lacks(objective, vocabulary) for objective in OBJECTIVES}
    fit = ", ".join(kind for kind, what in without.items() if not what)
    return "; ".join([fit or "nothing", *(f"not {kind} ({what})" for kind, what in without.items() if what)])


def check(objective: Objective, vocabulary: Vocabulary) -> None:
    """Raise InvalidConfig for a tokenizer with which the objective cannot be trained."""
    if without := lacks(objective, vocabulary):
        raise InvalidConfig(
            f"{vocabulary.where} has {without}, which the objective {objective.kind!r} needs. "
            + _REMEDIES[objective.kind]
        )


def check_run(objective: Objective, vocabulary: Vocabulary, seq_len: int, model: Mapping[str, Any]) -> None:
    """Raise InvalidConfig for a tokenizer, a row length or a model's config that the objective cannot train."""
    check(objective, vocabulary)
    objective.predictor(vocabulary, seq_len, seed=0)
    start, pad = model.get("decoder_start_token_id"), vocabulary.special.get("pad")
    if objective.trains == "seq2seq" and start is not None and start != pad:
        raise InvalidConfig(
            f"model.decoder_start_token_id is {start}, but the padding token of {vocabulary.where} is {pad}, with "
            f"which what the decoder reads begins; set it to {pad}, or prepare the text with the model's tokenizer"
        )
