"""Tokens on which two models are compared: given ids, held-out text of token bins, or random ones from a fixed seed.

Fewer for a larger model or vocabulary, so that a comparison stays cheap. What is predicted of text from bins, the
architecture's objective says; of other tokens, encoders predict 15 % of the places, decoders the next, encoder-decoders
a permutation of what they read.

Refuses ids that the models cannot read and rows of different lengths (`InvalidData`), and bins of another vocabulary or
of a tokenizer that does not fit the objective (`InvalidConfig`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bert2bert.data import objective as objectives
from bert2bert.data.bins import TokenBins
from bert2bert.data.rows import Rows
from bert2bert.errors import InvalidConfig, InvalidData
from bert2bert.files.sniff import describe
from bert2bert.growth.source_model import CheckpointModel
from bert2bert.measure.transformers_models import Sample
from bert2bert.model.batch import IGNORE
from bert2bert.model.registry import objective_of

_TOKENS, _RANDOM, _LENGTH, _PREDICTED = 2048, 512, 64, 0.15  # random tokens show a distance, which takes fewer
_WORK = 1 << 40  # multiply-adds
_SCORES = 1 << 26  # logits held at a time


@dataclass(frozen=True)
class Tokens:
    """Where the tokens come from: token bins, a file of ids, or (neither) a fixed seed."""

    bins: Path | None = None
    file: Path | None = None

    @property
    def are_text(self) -> bool:
        """Whether they are text, on which a loss says something."""
        return self.bins is not None or self.file is not None

    @property
    def text(self) -> str:
        """In words."""
        return f"tokens of {self.file}" if self.file else "held-out text" if self.bins else "random tokens"


def check(tokens: Tokens, vocab: int, *models: CheckpointModel) -> None:
    """Refuse at once what could not be read once the work is done. vocab: tokens that all models know."""
    if tokens.file:
        _given(tokens.file, vocab, min(map(positions, models)))
    elif tokens.bins:
        objectives.check(_objective(models[0]), open_bins(tokens.bins, vocab).vocabulary)


def _objective(model: CheckpointModel) -> objectives.Objective:
    return objectives.default(objective_of(model.config))


class Pieces:
    """Pieces of text as samples of the objective of an architecture that trains `what`: each a row of one segment.

    Raises InvalidConfig for a tokenizer that does not fit the objective.
    """

    def __init__(self, what: str, bins: TokenBins, length: int, seed: int) -> None:
        objective = objectives.default(what)
        objectives.check(objective, bins.vocabulary)
        self.predict, self.frame = objective.predictor(bins.vocabulary, length, seed), objective.frame(bins.vocabulary)

    def __call__(self, text: np.ndarray, first: int) -> Sample:
        """text: token ids [rows, length]; first: the number of the first row, from which the randomness follows."""
        ids, frame = text.astype(np.int64), self.frame
        if frame.each_segment and frame.before is not None and frame.after is not None:
            ids[:, 0], ids[:, -1] = frame.before, frame.after
        found = self.predict(Rows.whole(ids, first))
        read, labels = torch.from_numpy(found.read.tokens[0]), torch.from_numpy(found.labels[0])
        if found.targets is not None:
            answers, used = labels, labels != IGNORE
            labels = torch.full_like(read, IGNORE)
            labels[torch.from_numpy(found.targets[0])[used]] = answers[used]
        return Sample(read.view(len(ids), -1), labels.view(len(ids), -1))


def draw(model: CheckpointModel, vocab: int, tokens: Tokens, numel: int) -> Sample:
    """Rows of tokens for a model: fewer the more parameters it has."""
    what = objective_of(model.config)
    rng = np.random.default_rng(0)
    if tokens.file:
        ids = _given(tokens.file, vocab, positions(model))
    else:
        length = min(_LENGTH, trained_length(model), positions(model))
        rows = max(1, min(_TOKENS if tokens.bins else _RANDOM, _SCORES // vocab, _WORK // (2 * numel)) // length)
        if tokens.bins:
            bins = open_bins(tokens.bins, vocab)
            text = bins.split("heldout")[0]
            rows = min(rows, max(1, len(text) // length))
            return Pieces(what, bins, length, seed=0)(np.resize(text[: rows * length], (rows, length)), 0)
        pad = model.config.get("pad_token_id")
        known = np.array([i for i in range(vocab) if i != pad] or [0])  # padding may move positions
        ids = known[rng.integers(0, len(known), (rows, length))]
    labels = np.full(ids.shape, IGNORE)
    if what == "causal":
        labels[:, :-1] = ids[:, 1:]
    elif what == "seq2seq":
        labels = rng.permuted(ids, axis=1)
    else:
        at = rng.permutation(ids.size)[: max(1, round(_PREDICTED * ids.size))]
        labels.flat[at] = ids.flat[at]
    return Sample(torch.from_numpy(ids), torch.from_numpy(labels))


def trained_length(model: CheckpointModel) -> int:
    """The length of the rows that the source was trained on, where its manifest records it."""
    manifest = model.source.manifest
    recipe = manifest.training.recipe if manifest and manifest.training else {}
    return int(recipe.get("data", {}).get("seq_len", _LENGTH))


def positions(model: CheckpointModel) -> int:
    """Tokens that a row may have: position rows, less those kept for padding; rotary models know no end."""
    return model.table.positions(model.config) or 1 << 20


def open_bins(folder: Path, vocab: int) -> TokenBins:
    opened = TokenBins.open(folder)
    if opened.vocab_size > vocab:
        raise InvalidConfig(
            f"{folder}: a vocabulary of {opened.vocab_size} tokens, the model's has {vocab}; "
            f"give the bins that this model was trained on"
        )
    return opened


def _given(file: Path, vocab: int, positions: int) -> np.ndarray:
    """Ids of a text file, one row a line, all rows equally long."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = describe(file) if file.is_file() and isinstance(error, UnicodeDecodeError) else str(error)
        raise InvalidData(f"{file}: not readable as text ({why}); expected token ids, one row a line") from None
    rows = []
    for number, line in enumerate(lines, 1):
        words = re.split(r"[\s,;]+", line.strip("[](), \t\r"))
        if wrong := [word for word in words if not re.fullmatch(r"-?[0-9]{1,18}|", word)]:
            raise InvalidData(f"{file}: line {number} holds {wrong[0][:40]!r}; expected token ids, one row a line")
        if any(words):
            rows.append([int(word) for word in words if word])
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or not 2 <= lengths[0] <= positions:
        raise InvalidData(
            f"{file}: rows of {', '.join(map(str, lengths)) or 'no'} token ids; expected one row a line, all equally "
            f"long, of 2 to {positions} ids"
        )
    ids = np.array(rows)
    if not 0 <= ids.min() <= ids.max() < vocab:
        raise InvalidData(f"{file}: token ids from {ids.min()} to {ids.max()}; both models know 0 to {vocab - 1}")
    return ids
