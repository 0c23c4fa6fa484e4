"""A model whose parameters lie on the meta device, run with values read from elsewhere: this project's core of the
architecture, or transformers' forward pass where there is none or it does not compute the config.

`Streamed` is a torch function mode: an operation that is given a meta parameter gets its values, which are dropped when
it is done. The model's own code stays in charge, whatever its architecture. A linear map runs over blocks of its rows,
an embedding reads the rows that are looked up, an expert of a fused tensor is read alone; of other operations (norms,
biases, GPT-2's transposed maps) the whole parameter is read. The head is not run: what it would read is kept, so that
its logits can be looked at block by block.

Computes no gradients. Refuses what `Weights` and `transformers_models.class_of` refuse, and a table and a class that
disagree (`InvalidCheckpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bert2bert.errors import InvalidCheckpoint
from bert2bert.measure.transformers_models import Double, NoReference, Sample, class_of, decoder_reads, reference
from bert2bert.model import registry
from bert2bert.model.batch import IGNORE, Batch, Decoder
from bert2bert.model.config import ACTIVATIONS
from bert2bert.model.core import LanguageModel
from bert2bert.model.streaming import Rows, Weights
from bert2bert.tables import table_for

_DEVICE = Tensor.device.__get__
_TOKENS = 512  # run at a time
_LOOKS = frozenset(
    {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
    | {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "requires_grad", "is_cuda")}
)
"""What is asked of a parameter without its values."""


@dataclass(frozen=True)
class Passed:
    """What a model has computed below its decoder. hidden: [predictions, hidden]; labels: [predictions]; pairs:
    next-sentence logits; decoder, bias: the names of the decoder's parameters, whose values ``weights`` reads."""

    hidden: Tensor
    labels: Tensor
    pairs: Tensor | None
    weights: Weights
    decoder: str
    bias: str | None = None

    @property
    def vocab(self) -> int:
        """The tokens that it knows."""
        return self.weights.shapes[self.decoder][0]

    def logits(self, start: int, stop: int) -> Tensor:
        """Those of tokens [start, stop): [predictions, tokens]."""
        bias = None if self.bias is None else self.weights.read(self.bias, start, stop)
        return F.linear(self.hidden, self.weights.read(self.decoder, start, stop), bias)


class Streamed(TorchFunctionMode):
    """On, parameters of ``model`` take their values from ``weights``. names: path in the model -> name in there; head:
    the path of the decoder's weight."""

    def __init__(self, model: nn.Module, names: dict[str, str], weights: Weights, head: str) -> None:
        super().__init__()
        paths = dict(model.named_parameters(remove_duplicate=False))
        self._names = {id(paths[path]): name for path, name in names.items()}
        self._head, self.weights = paths[head], weights
        self._hidden: Tensor | None = None

    def take(self) -> Tensor | None:
        """What the decoder would have read since this was last asked for."""
        found, self._hidden = self._hidden, None
        return found

    def _name(self, x: Any) -> str | None:
        return self._names.get(id(x)) if isinstance(x, Tensor) and x.is_meta else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = self._name(args[0]) if args else None
        if first is not None and func == _DEVICE:
            return torch.device("cpu")
        if first is not None and func in _LOOKS:
            return func(*args, **kwargs)
        if first is not None and func is Tensor.__getitem__ and _single(args[1]):
            return self.weights.read(first, int(args[1]), int(args[1]) + 1)[0]
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding and (name := self._name(args[1])) is not None:
            return self.weights.pick(name, args[0])
        return func(*tree_map(self._value, args), **tree_map(self._value, kwargs))

    def _value(self, x: Any) -> Any:
        name = self._name(x)
        return x if name is None else self.weights.whole(name)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is self._head:
            self._hidden = x
            return x.new_zeros((*x.shape[:-1], 0))
        name, bias = self._name(weight), self._value(bias)
        if name is None:
            return F.linear(x, weight, bias)
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        for start, stop in self.weights.blocks(name):
            part = None if bias is None else bias[start:stop]
            out[..., start:stop] = F.linear(x, self.weights.read(name, start, stop), part)
        return out


def _single(index: Any) -> bool:
    """Whether an index names one row of dim 0."""
    whole = isinstance(index, int) or (isinstance(index, Tensor) and not index.is_floating_point() and not index.ndim)
    return whole and not isinstance(index, bool)


def outline(
    config: Mapping[str, Any], heads: frozenset[str], dtype: torch.dtype
) -> tuple[LanguageModel, dict[str, str]]:
    """The model of a config with these heads, in eval mode, all its parameters on the meta device and none tied; and
    the canonical name of each by its path. Raises NoReference, and InvalidCheckpoint where table and class disagree."""
    name = class_of(table_for(config), config, heads)
    if config["model_type"] != "bert" or config.get("hidden_act", "gelu") not in ACTIVATIONS:
        reference(table_for(config), config, heads)  # the other cores read a config through transformers
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = registry.outline({**config, "architectures": [name]})
    finally:
        torch.set_default_dtype(usual)
    names: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for own, p in list(module.named_parameters(recurse=False)):
            path = f"{prefix}.{own}" if prefix else own
            canonical = model.aliases.get(path, path)
            if canonical not in model.known or model.known[canonical].shape != p.shape:
                raise InvalidCheckpoint(f"the checkpoint does not fill a {name}: {path} {(*p.shape,)}")
            names[path] = canonical
            setattr(module, own, nn.Parameter(torch.empty(p.shape, dtype=dtype, device="meta"), requires_grad=False))
    if missing := sorted(model.known.keys() - names.values()):
        raise InvalidCheckpoint(f"the checkpoint does not fill a {name}: it has no {missing[0]}")
    return model.eval(), names


def passed(config: Mapping[str, Any], heads: frozenset[str], rows: Rows, sample: Sample, dtype: torch.dtype) -> Passed:
    """What the model of a config, with the parameters that ``rows`` reads, computes below its decoder, few rows in
    memory at a time. Raises what `outline` and `Weights` raise."""
    model, names = outline(config, heads, dtype)
    shapes = {n: p.shape for n, p in table_for(config).parameters(config, heads).items()}
    streamed = Streamed(model, names, Weights(rows, shapes, dtype), f"{model.head_path}.weight")
    hidden, pairs = [], []
    step = max(1, _TOKENS // sample.ids.shape[1])
    for ids, labels in zip(sample.ids.split(step), sample.labels.split(step), strict=True):
        batch = _batch(Sample(ids, labels), config)
        # within: what streamed reads is left as it is
        lifted = Double() if model.hosted and dtype == torch.float64 else nullcontext()
        with torch.no_grad(), streamed, lifted:
            _, found = model.outputs(batch)
        if (read := streamed.take()) is None:
            raise NoReference(f"a {model.name} of transformers does not end in its decoder {model.head_path}")
        hidden.append(read if batch.decoder is None else read[labels.flatten() != IGNORE])
        pairs += [] if found is None else [found]
    return Passed(
        torch.cat(hidden), sample.labels[sample.labels != IGNORE], torch.cat(pairs) if pairs else None,
        streamed.weights, names[f"{model.head_path}.weight"], names.get(f"{model.head_path}.bias"),
    )  # fmt: skip


def _batch(sample: Sample, config: Mapping[str, Any]) -> Batch:
    """Rows of one length as a flat batch. An encoder-decoder's decoder reads the labels, moved by one."""
    rows, length = sample.ids.shape
    labels, decoder = sample.labels.flatten(), None
    targets: Tensor | None = (labels != IGNORE).nonzero()[:, 0]
    if registry.objective_of(config) == "seq2seq":
        decoder = Decoder(decoder_reads(sample.labels, config.get).flatten(), *_offsets(rows, sample.labels.shape[1]))
        targets = None
    offsets = _offsets(rows, length)
    return Batch(
        sample.ids.flatten(), torch.arange(length).repeat(rows), torch.zeros(rows * length, dtype=torch.int64),
        offsets[0], offsets[1], targets, labels if targets is None else labels[targets], offsets[2], decoder=decoder,
    )  # fmt: skip


def _offsets(rows: int, length: int) -> tuple[Tensor, int, np.ndarray]:
    """cu_seqlens, the longest and the lengths of rows of one length."""
    return torch.arange(0, rows * length + 1, length, dtype=torch.int32), length, np.full(rows, length)
