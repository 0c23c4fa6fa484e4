"""What a model costs: the matrix-product FLOPs that its mathematics needs, read off its table's specs. Torch-free.

One multiply-add is two FLOPs. Counted: every linear map that a spec describes, once a token that it reads (of experts
those of num_experts_per_tok, with the router and the shared expert); in attention the products with keys and with
values, 4 · heads · head size a pair of tokens; the language-model head, tied or not, with what comes before it, at the
predicted positions. Not counted: padding, recomputation, norms, activations, softmax, rotary angles, look-ups,
relative-position biases, heads for other tasks, the optimizer.

Pairs: the l² of each sequence of l tokens. A causal model counts them in full, too, though a half is masked, as the
field does (PaLM's appendix B, nanoGPT's 12·L·H·T, torch's FlopCounterMode). Where a layer has a window, only what is
inside counts: min(l, W) a token of a causal layer that sees W tokens, and the pairs at most local_attention // 2 apart
of one that sees both sides. Cross-attention has the decoder's length times the encoder's, and its keys and values are
maps over the encoder's tokens.

Backward: a product for the gradient of each factor, except for those that nobody asks for. A map's weight has one only
where its part learns. Inputs have one from the top down to the lowest part that learns, through what rests in between;
of that part itself (of the head, if it learns alone) the maps whose input is the residual stream need none, for the
gradient ends there. Those that read a norm's output do need it, because the norm's gain learns. The last norm of an
encoder learns with the head, so where that does the gradient goes down the whole decoder above it; of a decoder whose
lowest layers rest, the self-attention of the lowest, which has no gradient, is counted all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra import axes
from bert2bert.tables import Parameter, table_for

_LOOKED_UP = frozenset({"vocab", "pos", "types", "buckets"})  # axes of which a token takes one row
_CROSS = ".EncDecAttention."  # in the names of the maps of cross-attention
_OVER_ENCODER = tuple(f"{_CROSS}{name}.weight" for name in "kv")


@dataclass(frozen=True)
class Work:
    """What one forward pass reads. lengths: tokens of each sequence, filler left out. predicted: positions at which
    the language-model head predicts. decoder_lengths: of an encoder-decoder, what its decoder reads; the i-th answers
    the i-th sequence."""

    lengths: Sequence[int] | NDArray[np.int64]
    predicted: int
    decoder_lengths: Sequence[int] | NDArray[np.int64] = ()


class _Maps(NamedTuple):
    """Linear maps, in multiply-adds. own: a token of the own stack; encoder: a token of the encoder; residual: those
    of `own` whose input is the residual stream as it enters, a token."""

    own: int
    encoder: int
    residual: int


class _Window(NamedTuple):
    """How many tokens a token sees of its sequence: size (0: all), those behind it or on both sides."""

    size: int
    causal: bool

    def pairs(self, lengths: NDArray[np.int64]) -> int:
        """Pairs of tokens of sequences of these lengths."""
        if not self.size:
            seen = lengths * lengths
        elif self.causal:
            seen = lengths * np.minimum(lengths, self.size)
        else:
            side = np.minimum(lengths - 1, self.size // 2)
            seen = lengths * (2 * side + 1) - side * (side + 1)
        return int(seen.sum())


class _Block(NamedTuple):
    """A layer: its maps, its window, and whether it is a decoder's above an encoder."""

    maps: _Maps
    window: _Window
    crosses: bool


def _writes_stream(spec: str) -> bool:
    """Whether a map writes the residual stream."""
    return any(a.axis == "embed" and not a.reads for dim in axes.parse(spec) for product in dim for a in product)


class Flops:
    """FLOPs of a model by its Hugging Face config and heads; a model without a language-model head has none there.

    Layers are numbered as in `Work`'s model: those of an encoder-decoder through both stacks, the encoder's first.
    Raises InvalidConfig and UnsupportedGrowth for a config that its table does not describe.
    """

    def __init__(self, config: Mapping[str, Any], heads: frozenset[str]) -> None:
        self.table, self.config = table_for(config), config
        sizes = self.table.axis_sizes(config)
        query = sizes["heads"] if "heads" in sizes else sizes["kv"] * sizes["group"]
        self.pair = 2 * query * (sizes["qk"] + sizes["v"])  # FLOPs of an attended pair
        parts: dict[str, list[Parameter]] = {}
        for p in self.table.parameters(config, heads).values():
            parts.setdefault(p.part, []).append(p)
        self.head = self._maps(parts.pop("head", [])) if "lm" in heads else _Maps(0, 0, 0)
        self.parts = self.table.layer_parts(config)
        layers = [(parts[part][0], self._maps(parts[part])) for part in self.parts]
        first = self.table.sizes.depth[0]
        self.blocks = [_Block(maps, self._window(row.layer or 0), row.depth != first) for row, maps in layers]

    def _maps(self, rows: Sequence[Parameter]) -> _Maps:
        """The maps of one part, in the order in which they run. The rows of a word embedding that is the head's
        decoder come first, and read what its last norm writes."""
        own = encoder = residual = 0
        entered = True  # until something is written to the residual stream
        for p in rows:
            reads, looked_up = axes.read_axes(p.spec), axes.read_axes(p.spec) & _LOOKED_UP
            if "-" not in p.spec or len(p.shape) < 2 or (looked_up and p.part != "head"):
                continue
            products = prod(p.shape)
            if len(p.shape) == 3:  # of all experts
                products = products // p.shape[0] * self._experts()
            if p.name.endswith(_OVER_ENCODER):
                encoder += products
                continue
            own += products
            if entered and "embed" in reads:
                residual += products
            entered = entered and (bool(looked_up) or not _writes_stream(p.spec))
        return _Maps(own, encoder, residual)

    def _experts(self) -> int:
        """Of a mixture: how many experts a token is sent to."""
        return int(self.config.get("num_experts_per_tok") or self.table.compatible.must_agree["num_experts_per_tok"])

    def _window(self, layer: int) -> _Window:
        settings = self.table.compatible.must_agree
        if "local_attention" in settings:
            local = self.table.layer_kind(self.config, layer) == "sliding_attention"
            size = int(self.config.get("local_attention", settings["local_attention"]))
            return _Window(size if local else 0, causal=False)
        if "sliding_window" not in settings:  # others may have the key, and refuse that it is used
            return _Window(0, causal=True)
        found = self.config.get("sliding_window", settings["sliding_window"])
        return _Window(int(found or 0), causal=True)

    def forward(self, work: Work, run: Sequence[int] | None = None) -> int:
        """Forward FLOPs. run: the layers that run (default: all)."""
        run = range(len(self.blocks)) if run is None else run
        return sum(self._layers(work, run)) + self._head(work)

    def step(self, work: Work, run: Sequence[int] | None = None, learn: Collection[str] | None = None) -> int:
        """Forward and backward FLOPs. run: the layers that run, a number as often as it does (default: all once).
        learn: the parts that learn: "embeddings", those of layers (`parts`), "head" (default: all).

        All learning, it is three times the forward pass.
        """
        run = range(len(self.blocks)) if run is None else run
        learn = {"embeddings", "head", *self.parts} if learn is None else learn
        forward, head = self._layers(work, run), self._head(work)
        below = "embeddings" in learn
        total = sum(forward) + head
        for place, number in enumerate(run):
            block, learns = self.blocks[number], self.parts[number] in learn
            tokens = int(np.sum(work.decoder_lengths if block.crosses else work.lengths))
            maps = 2 * (block.maps.own * tokens + block.maps.encoder * int(np.sum(work.lengths)))
            if learns:
                total += maps
            if below or learns or (block.crosses and "head" in learn):
                total += maps + 2 * (forward[place] - maps)
                if not below:
                    total -= 2 * block.maps.residual * tokens
                below = True
        if "head" in learn:
            total += head
        return total + head - (0 if below else 2 * self.head.residual * work.predicted)

    def _head(self, work: Work) -> int:
        return 2 * self.head.own * work.predicted

    def _layers(self, work: Work, run: Sequence[int]) -> list[int]:
        """Forward FLOPs of each layer that runs."""
        read = np.asarray(work.lengths, dtype=np.int64)
        written = np.asarray(work.decoder_lengths, dtype=np.int64)
        across = int((read * written).sum()) if len(written) else 0
        known: dict[_Block, int] = {}
        for block in {self.blocks[number] for number in run}:
            own = written if block.crosses else read
            pairs = block.window.pairs(own) + (across if block.crosses else 0)
            maps = block.maps.own * int(own.sum()) + block.maps.encoder * int(read.sum())
            known[block] = 2 * maps + self.pair * pairs
        return [known[self.blocks[number]] for number in run]
