"""A model of transformers whose parameters lie on the meta device, run with values read from elsewhere.

`Streamed` is a torch function mode: an operation that is given a meta parameter gets its values, which are dropped when
it is done. The model's own code stays in charge, whatever its architecture. A linear map runs over blocks of its rows,
an embedding reads the rows that are looked up, an expert of a fused tensor is read alone; of other operations (norms,
biases, GPT-2's transposed maps) the whole parameter is read. The head is not run: what it would read is kept, so that
its logits can be looked at block by block.

Computes no gradients. Refuses what `Weights` refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bert2bert.model.streaming import Weights

_DEVICE = Tensor.device.__get__
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
