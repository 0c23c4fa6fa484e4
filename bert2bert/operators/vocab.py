"""Vocabulary and position operators: what new tokens, and positions beyond the old last one, start from.

Each returns the map of its axis, `vocab` or `pos`; old rows stay as they are, except with ``interpolate``. Refuses
(`InvalidConfig`) token ids that the source lacks and files that do not hold rows for the new tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bert2bert.algebra import axes
from bert2bert.algebra.maps import Gather, corner
from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.operators.decisions import Copying, Fresh, Pair, Reasons, Width
from bert2bert.operators.registry import operator

_OLD = "the logits of old tokens; not their probabilities, for new tokens enter the softmax"
_HEURISTIC = "new {what} carry moments of old ones, a heuristic"


def _tokens(pair: Pair, name: str, gather: Gather, *moments: str, **more: Any) -> Width:
    old, new = pair.small["vocab"], pair.large["vocab"]
    function: tuple[str, ...] = (
        f"vocab {old} -> {new}: logits of old tokens stay, but new tokens enter the softmax, so probabilities and the "
        f"loss change",
    )
    if "lm" not in pair.heads:
        function = ()
    notes = (f"a tokenizer is copied as it is: give it tokens {old} to {new - 1} before training on them",)
    return Width(name, {"vocab": gather}, reasons=Reasons(function, function, moments, notes), **more)


def _mean(pair: Pair) -> Gather:
    old, new = pair.small["vocab"], pair.large["vocab"]
    return Gather(np.minimum(np.arange(new), old), old, mix=np.full((1, old), 1.0 / old))


@operator("vocab", "mean", paper="Hewitt, Initializing New Word Embeddings, 2021", keeps=_OLD, moments="carried")
def mean(pair: Pair) -> Width:
    """New tokens are the mean of all old rows, in the embedding, in a head of its own and in its bias.

    What transformers' resize_token_embeddings draws its rows around. A mean row's logit is never far above the others',
    so new tokens take little probability. Their moments are means too, so that none is zero.
    """
    return _tokens(pair, "mean", _mean(pair), _HEURISTIC.format(what="tokens"))


@operator("vocab", "copy", paper="a token that means much the same", keeps=_OLD, moments="carried")
def copy(pair: Pair, *, of: str) -> Width:
    """New tokens are copies of old ones.

    of: the id to copy, or several joined by '+', one for each new token, taken round and round: copy:of=3+17.
    """
    old, new = pair.small["vocab"], pair.large["vocab"]
    ids = of.split("+")
    if not all(i.isascii() and i.isdigit() and int(i) < old for i in ids):
        raise InvalidConfig(f"--vocab copy:of={of}: expected ids of old tokens, 0 to {old - 1}, joined by '+'")
    fresh = np.resize(np.array(ids, dtype=np.int64), new - old)
    index = np.concatenate([np.arange(old, dtype=np.int64), fresh])
    return _tokens(pair, "copy", Gather(index, old), _HEURISTIC.format(what="tokens"))


@operator("vocab", "normal", paper="training from scratch", keeps=_OLD, moments="asymmetric")
def normal(pair: Pair) -> Width:
    """New tokens are drawn as for training from scratch; their biases and moments are zero."""
    return _tokens(pair, "normal", corner(pair.small["vocab"], pair.large["vocab"]))


@operator("vocab", "zeros", paper="padding of a vocabulary", keeps=_OLD, moments="asymmetric")
def zeros(pair: Pair) -> Width:
    """New tokens are zero, moments too: for rows that only pad the vocabulary to a round number."""
    gather = corner(pair.small["vocab"], pair.large["vocab"])
    return _tokens(pair, "zeros", gather, fresh=Fresh(blank=frozenset({"vocab", "~vocab"})))


@operator("vocab", "given", paper="rows made elsewhere", keeps=_OLD, moments="asymmetric")
def given(pair: Pair, *, file: str, sha256: str = "") -> Width:
    """New tokens are rows of a file, as wide as the source; they grow with everything else. Their moments are zero.

    file: a .npy of the embedding's rows [new tokens, width], or a .safetensors with tensors named as the model's, one
    row a new token; what it does not hold (a head of its own, a bias) takes the mean of its old rows. sha256: what the
    file must have; a recipe stores it, so that a growth is repeated only with the same rows.
    """
    path = Path(file).resolve()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InvalidConfig(f"--vocab given: {path} cannot be read ({error.strerror}); name a file of rows") from None
    if sha256 and digest != sha256:
        raise InvalidConfig(f"--vocab given: {path} has SHA-256 {digest}, expected {sha256}: these are other rows")
    if "," in str(path):
        raise InvalidConfig(f"--vocab given: {path}: a comma separates options; give the file a name without one")
    rows = _rows(pair, path)
    recorded, copying = f"given:file={path},sha256={digest}", Copying(given=rows)
    moments = "moments of given rows start at zero"
    return _tokens(pair, "given", _mean(pair), moments, copying=copying, recorded=recorded)


def _rows(pair: Pair, path: Path) -> dict[str, NDArray[Any]]:
    """Tensor -> rows of the new tokens. Raises InvalidConfig."""
    new = pair.large["vocab"] - pair.small["vocab"]
    known = {
        n: (new, *p.shape[1:])
        for n, p in pair.table.parameters(pair.source, pair.heads).items()
        if "vocab" in axes.axes_of(p.spec)
    }
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            found = load_file(path)
        else:
            found = {next(iter(known)): np.load(path, allow_pickle=False)}
    except Exception as error:  # both libraries raise what they like on a foreign file
        raise InvalidConfig(
            f"--vocab given: {path} is neither a .npy nor a .safetensors of float16, float32 or float64 ({error}); "
            f"save rows with numpy.save or safetensors.numpy.save_file"
        ) from None
    for name, rows in found.items():
        if name not in known:
            raise InvalidConfig(f"--vocab given: {path} holds {name!r}; {did_you_mean(name, known)}")
        if rows.shape != known[name] or rows.dtype.kind != "f":
            raise InvalidConfig(
                f"--vocab given: {path}: {name} is {rows.dtype} {list(rows.shape)}; expected floating "
                f"{list(known[name])}, one row for each of the {new} new tokens, as wide as the source"
            )
    return dict(found)


def _positions(pair: Pair, name: str, gather: Gather, moments: str = "", function: str = "") -> Width:
    last = pair.small["pos"] - pair.table.sizes.first_position
    notes = (f"sequences longer than {last} tokens use positions that were never trained: train on some",)
    reasons = Reasons(function=(function,) if function else (), moments=(moments,) if moments else (), notes=notes)
    return Width(name, {"pos": gather}, reasons=reasons)


@operator(
    "positions", "tile", paper="Beltagy et al., Longformer, 2020", keeps="the function, up to the old length",
    needs="a table of positions: bert, roberta, gpt2", moments="carried",
)  # fmt: skip
def tile(pair: Pair) -> Width:
    """New positions repeat the old ones, round and round: position p is old position p mod n.

    Neighbours stay neighbours everywhere but at the seams, which is why Longformer's copies need little training. The
    rows that RoBERTa keeps for padding stay.
    """
    first, old = pair.table.sizes.first_position, pair.small["pos"]
    rows = np.arange(pair.large["pos"])
    index = np.where(rows < old, rows, first + (rows - first) % (old - first))
    return _positions(pair, "tile", Gather(index, old), _HEURISTIC.format(what="positions"))


@operator(
    "positions", "normal", paper="training from scratch", keeps="the function, up to the old length",
    needs="a table of positions: bert, roberta, gpt2",
)  # fmt: skip
def normal_positions(pair: Pair) -> Width:
    """New positions are drawn as for training from scratch; their moments are zero."""
    return _positions(pair, "normal", corner(pair.small["pos"], pair.large["pos"]))


@operator(
    "positions", "interpolate", paper="Dosovitskiy et al., ViT, ICLR 2021: resized position tables",
    keeps="nothing exactly: all distances shrink", needs="a table of positions: bert, roberta, gpt2", moments="carried",
)  # fmt: skip
def interpolate(pair: Pair) -> Width:
    """The old table, stretched: position p of n' lies at p (n - 1) / (n' - 1) between two old rows, which are mixed.

    For tables that vary smoothly; short sequences change too, so tile where the old length must go on working.
    """
    first, old, new = pair.table.sizes.first_position, pair.small["pos"], pair.large["pos"]
    place = first + np.arange(new - first) * ((old - first - 1) / (new - first - 1))
    low = np.minimum(place.astype(np.int64), old - 2) if old - first > 1 else np.full(new - first, first)
    between = place - low
    mixed = np.nonzero((between > 0) & (between < 1))[0]
    mix = np.zeros((len(mixed), old))
    mix[np.arange(len(mixed)), low[mixed]] = 1 - between[mixed]
    mix[np.arange(len(mixed)), low[mixed] + 1] = between[mixed]
    index = np.concatenate([np.arange(first), low + (between == 1)])
    index[first + mixed] = old + np.arange(len(mixed))
    reason = f"pos {old} -> {new}: every position is interpolated, so distances shrink and logits change"
    return _positions(pair, "interpolate", Gather(index, old, mix=mix), function=reason)
