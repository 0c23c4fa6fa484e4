"""A model's forward with its weights read from wherever they lie, a few rows at a time, and dropped after use.

For checking a checkpoint of any size against another. `Weights` reads; `streamed_bert` is BERT's forward up to the
decoder, one layer in memory at a time: the same modules and the same arithmetic as `bert.Bert` in eval mode, so the
results are equal bit for bit. Nothing holds a vocabulary: an embedding reads the rows of the batch's tokens, and the
decoder is left to the caller, who can go through it in blocks. Computes no gradients and runs every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bert2bert.errors import InvalidCheckpoint
from bert2bert.model.attention import plan_for
from bert2bert.model.batch import Batch
from bert2bert.model.bert import first_tokens
from bert2bert.model.blocks import Embeddings, Layer, Pooler, Transform
from bert2bert.model.config import BertConfig
from bert2bert.model.core import Shared

Rows = Callable[[str, int, int], Tensor]
"""(name, first row, one past the last) -> those rows of dim 0 of a parameter."""

BLOCK = 1 << 20  # elements read at a time
_WORDS, _TOKENS = "word_embeddings.weight", "bert.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Weights:
    """A model's parameters by name, read when they are asked for and given in one dtype. shapes: of all of them.

    Raises InvalidCheckpoint for rows of another shape; whatever ``rows`` raises goes through.
    """

    rows: Rows
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0."""
        found, expected = self.rows(name, start, stop), (stop - start, *self.shapes[name][1:])
        if found.shape != expected:
            raise InvalidCheckpoint(
                f"weights for the model: rows {start} to {stop} of {name} have shape {tuple(found.shape)}, expected "
                f"{expected}; does the config describe these weights?"
            )
        return found.to(self.dtype)

    def blocks(self, name: str, across: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of the rows of a block; across: how many numbers are made of each row, if more than it has."""
        count, width = self.shapes[name][0], max(prod(self.shapes[name][1:]), across)
        for start in range(0, count, step := max(1, BLOCK // width)):
            yield start, min(count, start + step)

    def whole(self, name: str) -> Tensor:
        """A parameter."""
        out = torch.empty(self.shapes[name], dtype=self.dtype)
        for start, stop in self.blocks(name):
            out[start:stop] = self.read(name, start, stop)
        return out

    def pick(self, name: str, index: Tensor) -> Tensor:
        """Those rows of dim 0, in that order (an embedding's)."""
        flat = index.flatten()
        out = torch.empty((len(flat), *self.shapes[name][1:]), dtype=self.dtype)
        for start, stop in self.blocks(name):
            at = ((flat >= start) & (flat < stop)).nonzero()[:, 0]
            if len(at):
                out[at] = self.read(name, start, stop)[flat[at] - start]
        return out.view(*index.shape, *out.shape[1:])


@torch.no_grad()
def streamed_bert(config: BertConfig, weights: Weights, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What the decoder reads, [predicted, hidden], and the next-sentence logits, [sequences, 2], where that head is.

    weights: by Hugging Face name; tied copies are never asked for.
    """

    def run(module: nn.Module, prefix: str, *inputs: object, **given: Tensor) -> Tensor:
        needed = {name: prefix + name for name, _ in module.named_parameters() if name not in given}
        return functional_call(module, {n: weights.whole(full) for n, full in needed.items()} | given, inputs)

    with torch.device("meta"):
        embeddings, layer, transform = (kind(config).eval() for kind in (Embeddings, Layer, Transform))
        pooler, pair = Pooler(config), nn.Linear(config.hidden_size, 2)
    used, tokens = batch.tokens.unique(return_inverse=True)
    read = tokens, batch.types, batch.positions
    x = run(embeddings, "bert.embeddings.", *read, **{_WORDS: weights.pick(_TOKENS, used)})
    plan = plan_for(
        x, batch.cu_seqlens, batch.max_seqlen, config.head_size, config.attention_probs_dropout_prob, training=False
    )
    shared = Shared(batch.cu_seqlens, batch.max_seqlen, plan)
    for number in range(config.num_hidden_layers):
        x = run(layer, f"bert.encoder.layer.{number}.", x, shared)
    pairs = None
    if "nsp" in config.heads:
        pairs = run(pair, "cls.seq_relationship.", run(pooler, "bert.pooler.", first_tokens(x, batch)))
    return run(transform, "cls.predictions.transform.", batch.at_targets(x)), pairs
